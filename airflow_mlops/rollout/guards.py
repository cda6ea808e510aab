"""The evidence that belongs to a guardrail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow_mlops.rollout.drift import DriftEvidence
from airflow_mlops.rollout.guardrail import Guardrail
from airflow_mlops.rollout.mean import MeanEvidence
from airflow_mlops.rollout.share import ShareEvidence

Evidence = ShareEvidence | MeanEvidence | DriftEvidence


def evidence_for(guardrail: Guardrail, state: Mapping[str, Any] | None = None) -> Evidence:
    """The evidence that belongs to ``guardrail``, new or continued from ``state``."""
    if guardrail.is_share:
        return ShareEvidence(guardrail, state)
    return DriftEvidence(guardrail, state) if guardrail.kind == "drift" else MeanEvidence(guardrail, state)
