"""A rollout's looks as text for a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from airflow_mlops.rollout import words
from airflow_mlops.rollout.judge import Verdict

_HEADS = ("guardrail", "status", "stable", "canary", "measured", "evidence")
#: Columns of numbers.
_RIGHT = (2, 3)
_NAME = 32


def look_table(verdict: Verdict) -> str:
    """One look: verdict and reasons, then a row per guardrail with the numbers of both arms and the evidence."""
    rows = [
        (
            _short(name),
            str(account.get("status")),
            *(words.of_arm(account, arm) for arm in ("stable", "canary")),
            words.measured(account),
            words.evidence(account),
        )
        for name, account in verdict.guardrails.items()
    ]
    lines = [
        f"look {verdict.look}: {verdict.decision}, canary weight {verdict.weight:g} %, "
        f"{verdict.requests.get('stable', 0):,} stable and {verdict.requests.get('canary', 0):,} canary requests",
        *(f"  {reason}" for reason in verdict.reasons),
        *(f"  {line}" for line in (_aligned([_HEADS, *rows]) if rows else [])),
    ]
    return "\n".join(lines)


def _short(name: str) -> str:
    """A name that keeps the table one line per row."""
    line = " ".join(name.split())
    return line if len(line) <= _NAME else f"{line[: _NAME - 3]}..."


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.rjust(width) if index in _RIGHT else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


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
