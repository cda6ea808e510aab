"""Ledger entries as the Dag's last task writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def _score(version: int, auc: float, log_loss: float, rate: float) -> dict[str, Any]:
    return {"version": str(version), "auc": auc, "log_loss": log_loss, "base_rate": rate}


@pytest.fixture
def ledger() -> Callable[..., dict[str, Any]]:
    """``ledger(month, ...)`` makes one entry; a model's score is ``(version, auc, log_loss)``."""

    def make(
        month: str,
        *,
        champion: tuple[int, float, float] | None = None,
        frozen: tuple[int, float, float] | None = None,
        rate: float = 0.2,
        verdict: str | None = None,
        trained: bool = False,
        gate: bool | None = None,
        canary: str | None = None,
        before: int | None = None,
        after: int | None = None,
    ) -> dict[str, Any]:
        scores = {"champion": champion, "frozen": frozen}
        models = {name: _score(*score, rate) if score else None for name, score in scores.items()}
        return {
            "month": month,
            "window": {"start": f"{month}-01T00:00:00+00:00", "end": None},
            "champion_before": before and str(before),
            "champion_after": after and str(after),
            "drift": verdict
            and {
                "verdict": verdict,
                "retrain": verdict == "harm",
                "reasons": ["log loss <0.51> against 0.44"],
                "columns": [{"column": "origin_delay", "distance": 0.3}, "wind_gust"],
                "harm": {"log_loss": 0.51, "p_value": 0.0004},
                "report_uri": "/somewhere/else",
            },
            "score": {"rows": 9, "models": models} if champion or frozen else None,
            "training": {"status": "SUCCEEDED", "cpu_seconds": 21.5, "gpu_seconds": 0.0} if trained else None,
            "gate": None if gate is None else {"passed": gate, "reasons": ["paired difference -0.016"]},
            "register": None,
            "canary": canary
            and {
                "verdict": canary,
                "requests": {"stable": 4200, "canary": 1810},
                "steps": [{"weight": 10, "requests": 412}],
                "guardrails": {"error_rate": {"passed": True, "canary": 0.01}},
                "reasons": ["no guardrail was crossed"],
            },
            "tasks": {},
            "seconds": 50.0,
        }

    return make
