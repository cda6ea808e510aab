"""What a rollout's evidence was over time, small enough to be kept on the target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow_mlops.rollout.judge import Verdict

#: Numbers of a guardrail's account that a look keeps, the first pair that there is.
EVIDENCE = (("e_harm", "e_ok"), ("worse_by_at_least", "worse_by_at_most"), ("z_harm", "z_ok"))
_MOST = 60
#: Decisions that a rollout may repeat look after look.
_WAITING = ("HOLD", "APPROVE")


class History:
    """A rollout's looks, thinned to at most 60: every second one is dropped as often as needed.

    Looks that decide something are kept.

    :param every: how many looks one kept look stands for
    :param looks: ``[time, weight, decision, {guardrail: [status, stable, canary, one, other]}, [stable, canary]]``,
        where one and other are the numbers that :data:`EVIDENCE` names, and the last are the arms' requests so far
    """

    def __init__(self, every: int = 1, looks: list[list[Any]] | None = None) -> None:
        self.every = every
        self.looks = looks or []

    def add(self, now: float, verdict: Verdict) -> None:
        """Take in one look at ``now``, seconds since the epoch."""
        if verdict.decision in _WAITING and verdict.look % self.every:
            return
        self.looks.append([round(now, 2), verdict.weight, verdict.decision, _numbers(verdict), _requests(verdict)])
        if len(self.looks) > _MOST:
            self.every *= 2
            decided = [look for look in self.looks if look[2] not in _WAITING]
            held = [look for look in self.looks if look[2] in _WAITING][::2]
            self.looks = sorted(decided[-_MOST // 2 :] + held, key=lambda look: look[0])

    def to_json(self) -> dict[str, Any]:
        """Plain Python types."""
        return {"every": self.every, "looks": self.looks}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> History:
        """Inverse of :meth:`to_json`; empty for None."""
        return cls(int(value["every"]), [list(look) for look in value["looks"]]) if value else cls()


def _requests(verdict: Verdict) -> list[int | None]:
    return [verdict.requests.get(arm) for arm in ("stable", "canary")]


def _numbers(verdict: Verdict) -> dict[str, list[Any]]:
    found = {}
    for name, account in verdict.guardrails.items():
        pair = next((pair for pair in EVIDENCE if pair[0] in account), None)
        numbers = [account[key] for key in pair] if pair else [None, None]
        found[name] = [account["status"], account.get("stable"), account.get("canary"), *numbers]
    return found
