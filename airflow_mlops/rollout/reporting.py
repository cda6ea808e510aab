"""A rollout's looks as text for a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from airflow_mlops.rollout.judge import Verdict


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"


def look_table(verdict: Verdict) -> str:
    """One look: verdict and reasons, then a row per guardrail."""
    lines = [
        f"look {verdict.look}: {verdict.decision}, canary weight {verdict.weight:g} %, "
        f"{verdict.requests.get('stable', 0)} stable and {verdict.requests.get('canary', 0)} canary requests",
        *(f"  {reason}" for reason in verdict.reasons),
        f"  {'guardrail':<12}{'status':<9}{'stable':>10}{'canary':>10}  evidence",
    ]
    for name, account in verdict.guardrails.items():
        if "e_ok" in account:
            evidence = (
                f"harm {account['e_harm']:.3g} of {account['e_harm_needed']:.3g}, "
                f"no harm {account['e_ok']:.3g} of {account['e_ok_needed']:.3g}"
            )
        elif "z_ok" in account:
            evidence = (
                f"z of harm {account['z_harm']:.3g} of {account['z_harm_needed']:.3g}, "
                f"of no harm {account['z_ok']:.3g} of {account['z_ok_needed']:.3g}"
            )
        elif "margin" in account:
            least, most = account["worse_by_at_least"], account["worse_by_at_most"]
            evidence = f"worse by {least:.4g} to {most:.4g}, margin {account['margin']:.4g}"
        else:
            evidence = "-"
        stable, canary = _number(account["stable"]), _number(account["canary"])
        evidence += f", but for replica {account['culprit']}" if "culprit" in account else ""
        lines.append(f"  {name:<12}{account['status']:<9}{stable:>10}{canary:>10}  {evidence}")
    return "\n".join(lines)


class LookLog:
    """Writes a look when it decides something, else at most one every ``every`` seconds.

    :param write: takes one text, e.g. ``logger.info``
    :param every: seconds
    :param clock: seconds, rising
    """

    def __init__(
        self, write: Callable[[str], Any], every: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._every = every
        self._clock = clock
        self._last: float | None = None

    def __call__(self, verdict: Verdict) -> None:
        now = self._clock()
        if verdict.decision != "HOLD" or self._last is None or now - self._last >= self._every:
            self._write(look_table(verdict))
            self._last = now
