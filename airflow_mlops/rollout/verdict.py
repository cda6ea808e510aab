"""What one look decided, on which numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

HOLD, PROMOTE_STEP, PROMOTE, ROLLBACK = "HOLD", "PROMOTE_STEP", "PROMOTE", "ROLLBACK"
APPROVE, CONCLUDE = "APPROVE", "CONCLUDE"


@dataclass(frozen=True)
class Verdict:
    """What one look decided, on which numbers.

    :param decision: ``HOLD``, ``PROMOTE_STEP`` (go to ``weight``), ``PROMOTE`` (go to 100 % and stay), ``ROLLBACK``,
        ``APPROVE`` (everything is shown, a person has to agree; evidence goes on being judged) or ``CONCLUDE`` (an A/B
        test has run its time: a report, no winner)
    :param weight: canary share in percent that the route is to have after this verdict
    :param step: index of the step this look was made in
    :param look: number of the look, from 1
    :param reasons: why, in words
    :param guardrails: name to status (``no data``, ``open``, ``ok``, ``harm``) and numbers
    :param requests: judged requests so far, by arm
    :param report: of a final verdict, name to the effect: estimate and confidence sequence
    """

    decision: str
    weight: float
    step: int
    look: int
    reasons: list[str] = field(default_factory=list)
    guardrails: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: dict[str, int] = field(default_factory=dict)
    report: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        """Whether the rollout ends with it."""
        return self.decision in (PROMOTE, ROLLBACK, CONCLUDE)

    def to_json(self) -> dict[str, Any]:
        """Plain Python types, no NaN."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Verdict:
        """Inverse of :meth:`to_json`."""
        return cls(**value)
