"""What the judge needs of whatever counts requests."""

from __future__ import annotations

from typing import Protocol

from airflow_mlops.rollout.observation import Observation
from airflow_mlops.rollout.targets.protocol import TargetState

ARMS = ("stable", "canary")


class EvidenceSource(Protocol):
    """Reads what happened to the requests of both arms."""

    async def check(self, state: TargetState, now: float) -> None:
        """Find what no waiting mends, before a rollout begins; a service that is only away is none of that.

        :raises InvalidInputError: a query that Prometheus refuses, an unknown metric, a column that is missing
        """

    async def observe(self, state: TargetState, now: float) -> Observation:
        """Counters of both arms as of ``now``, Unix seconds.

        It never raises for what is missing, stale, not finite or out of reach: that is the observation's ``problem``.
        """


class TargetCounters:
    """The counters of a target that counts itself, such as the Ray Serve route of this package."""

    async def check(self, state: TargetState, now: float) -> None:
        """Nothing can be wrong before the first look."""

    async def observe(self, state: TargetState, now: float) -> Observation:
        """What the target says, at the target's own time."""
        problem = state.problem
        if state.counters is None and problem is None:
            problem = "the target counts no requests; name a source of evidence, for example Prometheus"
        counters = state.counters or {}
        return Observation(
            time=state.time,
            boot=state.boot,
            epoch=state.epoch,
            weight=state.weight,
            stable=counters.get("stable"),
            canary=counters.get("canary"),
            routed=state.routed,
            shadow=state.shadow,
            problem=problem,
        )
