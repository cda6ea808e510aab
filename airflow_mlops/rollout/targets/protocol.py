"""What a rollout needs of the thing that splits traffic, whatever it is: Ray Serve, KServe, a Gateway API route."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

ENDED = "the rollout {} was ended from outside: its task was killed, or another one took the target"


@dataclass(frozen=True)
class TargetState:
    """A reading of where traffic goes, taken where it is split, not from the request that asked for it.

    :param time: the target's clock, seconds
    :param epoch: changes whenever weights or versions do
    :param weight: share of traffic that goes to the canary, percent
    :param configured: share that was last asked for; differs from ``weight`` while the canary is not ready, its lease
        has run out, or somebody changed the route
    :param stable: version of the model that serves as stable; None when none does
    :param canary: the same of the canary
    :param shadow: whether the canary gets copies of stable's requests
    :param ready: arms that can serve
    :param rollout: what the rollout keeps on the target, small JSON; empty when there is none
    :param owner: whose lease holds the target; None when it has run out
    :param counters: arm to replica to cumulative counters, as :class:`~airflow_mlops.rollout.observation.Observation`
        has them, of targets that count themselves; None of others
    :param routed: requests sent to (stable, canary) in this epoch; None where the target does not count
    :param workloads: arm to the name that metrics know it by: a revision, a Deployment, a Service; None where a
        version's name is all there is
    :param boot: changes when the counters start anew
    :param problem: why the target does not do what it was asked, for example a route that its gateway refuses
    """

    time: float
    epoch: str
    weight: float
    configured: float
    stable: str | None
    canary: str | None
    shadow: bool = False
    ready: frozenset[str] = frozenset()
    rollout: Mapping[str, Any] = field(default_factory=dict)
    owner: str | None = None
    counters: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None
    routed: tuple[int, int] | None = None
    workloads: Mapping[str, str] | None = None
    boot: str = ""
    problem: str | None = None


class Target(Protocol):
    """One model's traffic. Every call may be repeated: after a lost answer, a retry, by another process.

    ``shadows``: it can copy requests to a canary. ``whole``: it takes whole percents only.

    Errors: :class:`~airflow_mlops.exceptions.ConcurrentChangeError` when another rollout holds the target or somebody
    changed it meanwhile, :class:`~airflow_mlops.exceptions.ExternalSystemError` for what a retry may mend,
    :class:`~airflow_mlops.exceptions.InvalidInputError` for what it cannot.
    """

    name: str
    shadows: bool
    whole: bool

    @property
    def unattended(self) -> str | None:
        """What becomes of a canary that nobody looks at any more, in words; None when it ends by itself."""

    async def state(self) -> TargetState | None:
        """Where traffic goes now; None when nothing is deployed."""

    async def deploy(self, version: str, uri: str) -> None:
        """Deploy the first version, with all traffic; returns when it serves."""

    async def claim(self, owner: str, ttl: float) -> None:
        """Take the target for one rollout, for ``ttl`` seconds from now; by the same owner again: prolong it."""

    async def renew(self, owner: str, ttl: float, annotation: Mapping[str, Any]) -> None:
        """Prolong the claim and keep ``annotation`` on the target; not when another owner or attempt has it."""

    async def load(self, version: str, uri: str) -> None:
        """Bring a version up without traffic; returns when it could serve.

        :raises InvalidInputError: it never will, and why
        """

    async def restore(self, version: str, uri: str) -> None:
        """Make a version the stable one with all traffic, because the registry's champion moved since."""

    async def split(self, version: str, weight: float, annotation: Mapping[str, Any], *, shadow: bool = False) -> None:
        """Give the loaded ``version`` that share of traffic, percent, or with ``shadow`` copies of stable's requests.

        Returns when traffic is split so, as read back.
        """

    async def promote(self, annotation: Mapping[str, Any]) -> None:
        """Make the canary stable with all traffic and free the claim; the old version stays warm until the next one."""

    async def roll_back(self, owner: str, annotation: Mapping[str, Any]) -> None:
        """Give all traffic to stable, free the claim; returns when the canary has none, as read back."""

    async def clean_up(self) -> None:
        """Release what only stayed warm."""
