"""What the evidence of every guardrail has in common: its statuses, its terms, its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

NO_DATA, OPEN, OK, HARM = "no data", "open", "ok", "harm"


class Part(NamedTuple):
    """What one replica added in one look.

    :param replica: its index in its arm, 0 from the first that was seen
    :param values: the numbers of the guardrail's reading, since the last look
    """

    replica: int
    values: list[float]


@dataclass(frozen=True)
class Terms:
    """How sure a guardrail must be.

    :param alpha: error rate of harm, this guardrail's part of it
    :param beta: error rate of no inferiority
    :param replica_sd: least spread of replicas that is assumed
    :param plan: :class:`~airflow_mlops.rollout.groupseq.Plan` of a group-sequential rollout
    """

    alpha: float
    beta: float
    replica_sd: float = 0.0
    plan: Any = None


def settle(before: str, harm: bool, fine: bool, lost: bool) -> str:
    """The status after a look.

    What was once shown to be no worse stays so while the evidence still points that way: an e-process may be stopped
    at its highest (Ville's inequality), and with many guardrails they need not all be highest at one look.
    """
    if harm:
        return HARM
    if fine or (before == OK and not lost):
        return OK
    return OPEN
