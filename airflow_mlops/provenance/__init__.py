"""Where a model version comes from, in papers that others can read, and a log of what was decided.

:func:`trace` answers for one version who, when, which code, data, parameters, environment, cost and verdicts;
:func:`versions_using` goes back from a dataset; :func:`reproduce` says how to train it again. ``bom`` (CycloneDX),
``card`` (model card), ``openlineage`` and ``audit`` are modules of their own. Nothing here imports Airflow.
"""

from __future__ import annotations

from airflow_mlops.provenance.record import ModelRecord

__all__ = ["ModelRecord"]
