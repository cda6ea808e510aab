"""The judge of a rollout: observations in, verdicts out, nothing else.

It has no clock, no network and no randomness. Its state is small JSON, so that another process continues where one
died, and the same observations always give the same verdicts in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from airflow_mlops.rollout.evidence import UNBALANCED, Moments, arm_log_likelihood_ratios, log_mean_exp
from airflow_mlops.rollout.guards import HARM, NO_DATA, OK, MeanEvidence, ShareEvidence, evidence_for
from airflow_mlops.rollout.observation import MOMENTS, Observation, arm_problem
from airflow_mlops.rollout.policy import Guardrail, RolloutPolicy, parse_guardrails

HOLD, PROMOTE_STEP, PROMOTE, ROLLBACK = "HOLD", "PROMOTE_STEP", "PROMOTE", "ROLLBACK"


@dataclass(frozen=True)
class Verdict:
    """What one look decided, on which numbers.

    :param decision: ``HOLD``, ``PROMOTE_STEP`` (go to ``weight``), ``PROMOTE`` (go to 100 % and stay) or ``ROLLBACK``
    :param weight: canary share in percent that the route is to have after this verdict
    :param step: index of the step this look was made in
    :param look: number of the look, from 1
    :param reasons: why, in words
    :param guardrails: name to status (``no data``, ``open``, ``ok``, ``harm``) and numbers
    :param requests: judged requests so far, by arm
    """

    decision: str
    weight: float
    step: int
    look: int
    reasons: list[str] = field(default_factory=list)
    guardrails: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: dict[str, int] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        """Whether the rollout ends with it."""
        return self.decision in (PROMOTE, ROLLBACK)

    def to_json(self) -> dict[str, Any]:
        """Plain Python types, no NaN."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Verdict:
        """Inverse of :meth:`to_json`."""
        return cls(**value)


class Judge:
    """Judges the looks of one rollout in their order.

    :param policy: steps, error rates, deadline
    :param guardrails: what must not be worse; errors and latency by default
    :param state: :meth:`state` of an earlier judge of the same rollout
    """

    def __init__(
        self,
        policy: RolloutPolicy,
        guardrails: Sequence[Guardrail | Mapping[str, Any] | str] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.policy = policy
        self.guardrails = parse_guardrails(guardrails)
        state = state or {}
        self.step = int(state.get("step", 0))
        self.looks = int(state.get("looks", 0))
        self.started: float | None = state.get("started")
        self.step_started: float | None = state.get("step_started")
        self.requests = list(state.get("requests", [0, 0]))
        self.step_requests = list(state.get("step_requests", [0, 0]))
        self.ratio = list(state.get("ratio", [0.0] * len(UNBALANCED)))
        self.last: dict[str, Any] | None = state.get("last")
        saved = state.get("evidence", {})
        self.evidence = {guard.name: evidence_for(guard, saved.get(guard.name)) for guard in self.guardrails}

    def state(self) -> dict[str, Any]:
        """Everything a later judge needs, as small JSON."""
        names = ("step", "looks", "started", "step_started", "requests", "step_requests", "ratio", "last")
        return {
            **{name: getattr(self, name) for name in names},
            "evidence": {name: evidence.state() for name, evidence in self.evidence.items()},
        }

    @property
    def weight(self) -> float:
        """Canary share in percent that the current step asks for."""
        return self.policy.weights[self.step]

    @property
    def _baking(self) -> bool:
        return self.step == len(self.policy.steps) - 1

    def observe(self, observation: Observation) -> Verdict:
        """Judge one more look; observations must come in time order."""
        self.looks += 1
        now = observation.time
        self.started = now if self.started is None else self.started
        self.step_started = now if self.step_started is None else self.step_started
        problem = self._take(observation)
        accounts = self._accounts()
        decision, reasons = self._decide(now, problem, accounts)
        if decision == HOLD and now - self.started >= self.policy.deadline_seconds:
            decision = ROLLBACK
            reasons = [f"not decided within the deadline of {self.policy.deadline_seconds:g} s", *reasons]
        judged_step = self.step
        if decision == PROMOTE_STEP:
            self.step, self.step_started, self.step_requests, self.last = self.step + 1, now, [0, 0], None
        weight = {PROMOTE: 100, ROLLBACK: 0}.get(decision, self.weight)
        return Verdict(
            decision,
            weight,
            judged_step,
            self.looks,
            reasons,
            accounts,
            {"stable": self.requests[0], "canary": self.requests[1]},
        )

    def _take(self, observation: Observation) -> str | None:
        """Add what happened since the last look to the evidence; or say why nothing could be added."""
        if observation.problem:
            return f"nothing observed: {observation.problem}"
        if not math.isfinite(observation.weight) or abs(observation.weight - self.weight) > 1e-6:
            self.last = None
            return f"the route sends {observation.weight:g} % to the canary, expected {self.weight:g} %"
        arms = {"canary": observation.canary} if self._baking else {}
        arms = arms or {"stable": observation.stable, "canary": observation.canary}
        for name, counters in arms.items():
            problem = arm_problem(counters)
            if problem:
                return f"the {name} arm {problem}"
        routed = list(observation.routed or (0, 0))
        current: dict[str, Any] = {
            "time": observation.time,
            "boot": observation.boot,
            "epoch": observation.epoch,
            "routed": routed,
            "arms": {name: _summed(counters or {}) for name, counters in arms.items()},
        }
        last: dict[str, Any] | None = self.last
        self.last = current
        if last is None:
            return "first look at this weight"
        if last["boot"] != observation.boot:
            return "the route's counters started anew"
        if last["epoch"] != observation.epoch:
            return "the route was changed since the last look"
        if observation.time <= last["time"]:
            self.last = last
            return "the observation is stale"
        looks = {name: difference(current["arms"][name], last["arms"][name]) for name in arms}
        new_routed = [a - b for a, b in zip(routed, last["routed"])]
        if any(look is None for look in looks.values()) or min(new_routed) < 0:
            return "counters went backwards"
        return self._add({name: look for name, look in looks.items() if look}, new_routed)

    def _add(self, looks: Mapping[str, Mapping[str, Any]], routed: Sequence[int]) -> str | None:
        seen = [looks["stable"]["requests"] if "stable" in looks else 0, looks["canary"]["requests"]]
        self.requests = [a + b for a, b in zip(self.requests, seen)]
        self.step_requests = [a + b for a, b in zip(self.step_requests, seen)]
        if self._baking:
            for evidence in self.evidence.values():
                if isinstance(evidence, ShareEvidence):
                    evidence.add_bake(looks["canary"])
            return None if seen[1] else "no requests since the last look"
        share = self.weight / 100
        self.ratio = arm_log_likelihood_ratios(
            self.ratio, UNBALANCED, 1.0, (1 - share, share), (int(routed[0]), int(routed[1]))
        )
        for evidence in self.evidence.values():
            evidence.add(looks["stable"], looks["canary"])
        # Labels come after their request, so a look without requests can still add evidence.
        missing = [name for name, count in zip(("stable", "canary"), self.step_requests) if count == 0]
        if missing:
            return f"no requests in the {' or the '.join(missing)} arm at this weight"
        return None if sum(seen) else "no requests since the last look"

    def _accounts(self) -> dict[str, dict[str, Any]]:
        alpha = self.policy.alpha / len(self.guardrails)
        return {name: evidence.account(alpha, self.policy.beta) for name, evidence in self.evidence.items()}

    def _decide(
        self, now: float, problem: str | None, accounts: Mapping[str, Mapping[str, Any]]
    ) -> tuple[str, list[str]]:
        if log_mean_exp(self.ratio) >= math.log(1 / self.policy.srm_alpha):
            return HOLD, [
                f"sample ratio mismatch: the arms' requests do not follow the weight of {self.weight:g} % "
                f"(error rate {self.policy.srm_alpha:g}); no comparison of the arms is valid"
            ]
        harmful = [name for name, account in accounts.items() if account["status"] == HARM]
        if harmful:
            return ROLLBACK, [f"{name}: the canary is worse ({_numbers(accounts[name])})" for name in harmful]
        if self._baking:
            alpha = self.policy.alpha / len(self.guardrails)
            bad = [n for n, e in self.evidence.items() if isinstance(e, ShareEvidence) and e.baked_badly(alpha)]
            if bad:
                return ROLLBACK, [f"{name}: worse at 100 % than was acceptable beside stable" for name in bad]
        if problem:
            return HOLD, [problem]
        waiting = self._waiting(now, accounts)
        if waiting:
            return HOLD, waiting
        if self._baking or (self.step == len(self.policy.steps) - 2 and self.policy.bake_seconds == 0):
            return PROMOTE, ["every guardrail shows that the canary is not worse"]
        return PROMOTE_STEP, [f"no harm at {self.weight:g} %; next {self.policy.weights[self.step + 1]:g} %"]

    def _waiting(self, now: float, accounts: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """What the current step still waits for."""
        reasons = []
        for index, name in enumerate(("stable", "canary")):
            if self.step_requests[index] < self.policy.min_requests and not (self._baking and name == "stable"):
                reasons.append(f"{self.step_requests[index]} of {self.policy.min_requests} requests in the {name} arm")
        baked = now - (self.step_started or now)
        if baked < self.policy.bake_seconds:
            reasons.append(f"baking: {baked:.0f} of {self.policy.bake_seconds:g} s")
        enough = {OK} if self.step >= len(self.policy.steps) - 2 else {OK, "open"}
        for name, account in accounts.items():
            if account["status"] == NO_DATA:
                reasons.append(f"{name}: not enough data of both arms")
            elif account["status"] not in enough and not self._baking:
                reasons.append(f"{name}: not yet shown to be no worse ({_numbers(account)})")
        return reasons


def _summed(arm: Mapping[str, Any]) -> dict[str, Any]:
    """One arm's totals over its replicas."""
    total: dict[str, Any] = {}
    for replica in arm.values():
        flat = {**replica["counts"], "buckets": replica["histograms"]["latency"]["counts"], **replica["moments"]}
        for name, value in flat.items():
            old = total.get(name)
            both = [a + b for a, b in zip(old or [0] * len(value), value)] if isinstance(value, list) else None
            total[name] = value + (old or 0) if both is None else both
    return total


def difference(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any] | None:
    """Totals since ``old``; ``None`` when a count went backwards."""
    result: dict[str, Any] = {name: new[name] - old[name] for name in new if not isinstance(new[name], list)}
    result["buckets"] = [a - b for a, b in zip(new["buckets"], old["buckets"], strict=True)]
    for name in MOMENTS:
        if name in new:
            result[name] = Moments(*new[name]).minus(Moments(*old[name]))
    counts = [result["requests"], result["errors"], *result["buckets"]]
    return None if min(counts) < 0 else result


def _numbers(account: Mapping[str, Any]) -> str:
    text = f"stable {account['stable']:.4g}, canary {account['canary']:.4g}"
    if "e_ok" in account:
        return f"{text}, evidence of harm {account['e_harm']:.3g}, of no harm {account['e_ok']:.3g}"
    return f"{text}, worse by {account['worse_by_at_least']:.4g} to {account['worse_by_at_most']:.4g}"


__all__ = ["HOLD", "PROMOTE", "PROMOTE_STEP", "ROLLBACK", "Judge", "MeanEvidence", "ShareEvidence", "Verdict"]
