"""From cumulative counters to what every replica did since the last look, or why nothing can be said of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from airflow_mlops.rollout.guards import Evidence
from airflow_mlops.rollout.observation import Counters, Observation, arm_problem
from airflow_mlops.rollout.terms import Part

ARMS = ("stable", "canary")
#: A replica whose counters start anew in so many of so many looks is not believed in between either: after the next
#: restart they may by chance be larger than before.
RESTARTS, OF_LOOKS = 3, 10


@dataclass
class Look:
    """What happened between two observations.

    :param requests: of (stable, canary)
    :param parts: per guardrail, of (stable, canary): what each replica added
    :param routed: requests routed to (stable, canary); ``None`` when they cannot be told for this look
    :param missing: guardrail to the arms that do not report what it reads
    :param notes: what was left out
    """

    requests: list[int]
    parts: list[tuple[list[Part], list[Part]]]
    routed: tuple[int, int] | None = None
    missing: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Intake:
    """Keeps the last believed counters of every replica, no more of them than the guardrails read.

    :param evidence: by guardrail, in a fixed order
    :param state: :meth:`state` of an earlier one
    """

    def __init__(self, evidence: Mapping[str, Evidence], state: Mapping[str, Any] | None = None) -> None:
        self.evidence = evidence
        state = state or {}
        self.names: list[list[str]] = [list(names) for names in state.get("names", [[], []])]
        self.last: dict[str, Any] | None = state.get("last")
        #: By arm and replica the latest looks as bits, those in which it started anew set.
        self.restarts: dict[str, int] = dict(state.get("restarts", {}))

    def state(self) -> dict[str, Any]:
        """Small JSON."""
        return {"names": self.names, "last": self.last, "restarts": self.restarts}

    def restart(self) -> None:
        """Take the next observation as the first."""
        self.last = None

    def take(self, observation: Observation, weight: float, alone: bool) -> Look | str:
        """What was added since the last observation, or why nothing was.

        :param weight: canary's share that the route should have
        :param alone: the canary has all traffic, so that no stable arm is expected
        """
        if observation.problem:
            return f"nothing observed: {observation.problem}"
        if not math.isfinite(observation.time):
            return "the observation has no time"
        if not math.isfinite(observation.weight) or abs(observation.weight - weight) > 1e-6:
            self.last = None
            return f"the route sends {observation.weight:g} % to the canary, expected {weight:g} %"
        if weight == 0 and not observation.shadow:
            self.last = None
            return "the canary gets no copies of stable's requests"
        arms: dict[int, Mapping[str, Counters]] = {}
        for index, (name, counters) in enumerate(zip(ARMS, (observation.stable, observation.canary))):
            if alone and name == "stable":
                continue
            problem = arm_problem(counters)
            if problem or counters is None:
                return f"the {name} arm {problem}"
            arms[index] = counters
        last = self.last
        if last and last["boot"] == observation.boot and observation.time <= last["time"]:
            return "the observation is stale"
        if 0 in arms:
            for evidence in self.evidence.values():
                evidence.calibrate(list(arms[0].values()))
        self.last = self._current(observation, arms)
        if last is None:
            return "first look at this weight"
        if last["boot"] != observation.boot:
            return "the route's counters started anew"
        if last["epoch"] != observation.epoch:
            return "the route was changed since the last look"
        return self._difference(last, self.last, list(arms))

    def _current(self, observation: Observation, arms: Mapping[int, Mapping[str, Counters]]) -> dict[str, Any]:
        return {
            "time": observation.time,
            "boot": observation.boot,
            "epoch": observation.epoch,
            "routed": None if observation.routed is None else [int(n) for n in observation.routed],
            "arms": {
                ARMS[index]: {str(self._index(index, name)): self._readings(each) for name, each in arm.items()}
                for index, arm in arms.items()
            },
        }

    def _index(self, arm: int, name: str) -> int:
        names = self.names[arm]
        if name not in names:
            names.append(name)
        return names.index(name)

    def _readings(self, counters: Counters) -> list[Any]:
        return [counters["counts"]["requests"], *(each.reading(counters) for each in self.evidence.values())]

    def _difference(self, last: Mapping[str, Any], current: Mapping[str, Any], arms: Sequence[int]) -> Look | str:
        look = Look([0, 0], [([], []) for _ in self.evidence])
        whole = True
        for arm in arms:
            before, now = last["arms"].get(ARMS[arm], {}), current["arms"][ARMS[arm]]
            kept = 0
            for replica, readings in now.items():
                old = before.get(replica)
                anew = old is not None and _backwards(readings, old)
                if problem := self._restarting(arm, replica, anew):
                    return problem
                if old is not None and not anew:
                    kept += 1
                    look.requests[arm] += readings[0] - old[0]
                    self._add_parts(look, arm, int(replica), readings, old)
                    continue
                whole = False
                if old is not None:
                    name = self.names[arm][int(replica)]
                    look.notes.append(f"{ARMS[arm]} replica {name} started anew: its last interval is left out")
            whole = whole and len(before) == kept
            if not kept:
                return f"counters of the {ARMS[arm]} arm started anew or went backwards"
        for name, parts in zip(self.evidence, look.parts):
            silent = [ARMS[arm] for arm in arms if not parts[arm]]
            if silent:
                look.missing[name] = silent
        if current["routed"] is None or last["routed"] is None:
            # A replica that came or went takes its interval with it, and with that the sample ratio.
            look.routed = (look.requests[0], look.requests[1]) if whole else None
            return look
        stable, canary = (a - b for a, b in zip(current["routed"], last["routed"]))
        if min(stable, canary) < 0:
            return "counts of routed requests went backwards"
        look.routed = (stable, canary)
        return look

    def _restarting(self, arm: int, replica: str, anew: bool) -> str | None:
        """Remember whether a replica has started anew; says so when it keeps doing that."""
        key = f"{arm}:{replica}"
        seen = (self.restarts.pop(key, 0) << 1 | anew) & (1 << OF_LOOKS) - 1
        if seen:
            self.restarts[key] = seen
        if seen.bit_count() < RESTARTS:
            return None
        name = self.names[arm][int(replica)]
        return (
            f"the counters of the {ARMS[arm]} arm{f', replica {name},' if name else ''} keep starting anew: "
            f"{seen.bit_count()} times in {OF_LOOKS} looks"
        )

    def _add_parts(self, look: Look, arm: int, replica: int, readings: Sequence[Any], old: Sequence[Any]) -> None:
        requests = [readings[0] - old[0]]
        for evidence, parts, new, before in zip(self.evidence.values(), look.parts, readings[1:], old[1:]):
            if new is not None and before is not None:
                values = [a - b for a, b in zip(new, before)]
                parts[arm].append(Part(replica, requests + values if evidence.per_request else values))


def _backwards(readings: Sequence[Any], old: Sequence[Any]) -> bool:
    """Whether a count is smaller than before; of a reading, the first number always is a count."""
    if readings[0] < old[0]:
        return True
    return any(
        new is not None and before is not None and new[0] < before[0] for new, before in zip(readings[1:], old[1:])
    )
