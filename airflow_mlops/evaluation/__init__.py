"""Is the challenger better than the champion? Paired evidence on the same rows, a stated error rate, one verdict.

    from airflow_mlops.evaluation import GatePolicy, evaluate

    verdict = evaluate(label, champion, challenger, clusters=day, policy=GatePolicy(alpha=0.05))

Nothing here imports Airflow. A Dag can import :class:`GatePolicy` at its top: the numerical libraries are loaded
only when something is computed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from airflow_mlops.evaluation.policy import GatePolicy
from airflow_mlops.evaluation.verdict import Check, GateVerdict

if TYPE_CHECKING:
    from airflow_mlops.evaluation.gate import evaluate
    from airflow_mlops.evaluation.metrics import score

_LAZY = {"evaluate": "airflow_mlops.evaluation.gate", "score": "airflow_mlops.evaluation.metrics"}

__all__ = ["Check", "GatePolicy", "GateVerdict", "evaluate", "score"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
