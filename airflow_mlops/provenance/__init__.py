"""Where a model version comes from, in papers that others can read, and a log of what was decided.

:func:`trace` answers for one version who, when, which code, data, parameters, environment, cost and verdicts;
:func:`versions_using` goes back from a dataset; :func:`check_data` says whether the data are still those;
:func:`reproduce` says how to train it again. ``bom`` (CycloneDX), ``card`` (model card), ``openlineage`` and ``audit``
are modules of their own, and so are ``signing`` and, for pickles, ``sandbox``. Nothing here imports Airflow.
"""

from __future__ import annotations

from airflow_mlops.provenance.audit import AuditLog, verify
from airflow_mlops.provenance.data import check_data, require_data
from airflow_mlops.provenance.record import ModelRecord
from airflow_mlops.provenance.reproduce import compare_metrics, reproduce
from airflow_mlops.provenance.trace import trace, versions_using

__all__ = [
    "AuditLog",
    "ModelRecord",
    "check_data",
    "compare_metrics",
    "reproduce",
    "require_data",
    "trace",
    "verify",
    "versions_using",
]
