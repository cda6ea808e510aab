"""The evidence of one guardrail: what it has seen of both arms, and what that shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from airflow_mlops.rollout.evidence import (
    BETTER,
    WORSE,
    MeanDifference,
    arm_log_likelihood_ratios,
    log_e_rate_above,
    log_e_rate_below,
    log_mean_exp,
)
from airflow_mlops.rollout.observation import BUCKET_EDGES
from airflow_mlops.rollout.policy import Guardrail

NO_DATA, OPEN, OK, HARM = "no data", "open", "ok", "harm"
CALIBRATION_REQUESTS = 100
MAX_LOG = 300.0


def _bounded(log_e: float) -> float:
    return round(math.exp(max(min(log_e, MAX_LOG), -MAX_LOG)), 6)


class ShareEvidence:
    """A share of requests (failed, or slower than a threshold) in the canary against stable's.

    The latency threshold is fixed from stable's first requests, which are then not used as evidence: a threshold
    chosen on the data it judges would not be one.
    """

    def __init__(self, guardrail: Guardrail, state: Mapping[str, Any] | None = None) -> None:
        self.guardrail = guardrail
        state = state or {}
        self.harm = list(state.get("harm", [0.0] * len(WORSE)))
        self.ok = list(state.get("ok", [0.0] * len(BETTER)))
        self.trials = list(state.get("trials", [0, 0]))
        self.events = list(state.get("events", [0, 0]))
        self.bake = list(state.get("bake", [0, 0]))
        self.threshold: int | None = state.get("threshold")
        self.calibration = list(state.get("calibration", []))

    def state(self) -> dict[str, Any]:
        """Small JSON from which the evidence continues."""
        names = ("harm", "ok", "trials", "events", "bake", "threshold", "calibration")
        return {name: getattr(self, name) for name in names}

    def _counts(self, look: Mapping[str, Any]) -> tuple[int, int]:
        """(trials, events) of one arm in one look."""
        if self.guardrail.kind == "rate":
            return look["requests"], look[self.guardrail.metric]
        assert self.threshold is not None
        return look["latency"].n, sum(look["buckets"][self.threshold + 1 :])

    def _calibrate(self, stable: Mapping[str, Any]) -> None:
        self.calibration = [a + b for a, b in zip(self.calibration or [0] * len(stable["buckets"]), stable["buckets"])]
        total = sum(self.calibration)
        if total < CALIBRATION_REQUESTS:
            return
        seen, edge = 0, math.inf
        for index, count in enumerate(self.calibration[:-1]):
            seen += count
            if seen >= self.guardrail.quantile * total:
                edge = BUCKET_EDGES[index]
                break
        # The slowest bucket has no upper edge: nothing can then be called slower than stable.
        limit = min(self.guardrail.factor * edge, BUCKET_EDGES[-1])
        self.threshold = next(index for index, value in enumerate(BUCKET_EDGES) if value >= limit)
        self.calibration = []

    def add(self, stable: Mapping[str, Any], canary: Mapping[str, Any]) -> None:
        """Take in one look of both arms."""
        if self.guardrail.kind == "latency" and self.threshold is None:
            self._calibrate(stable)
            return
        (stable_n, stable_k), (canary_n, canary_k) = self._counts(stable), self._counts(canary)
        look, events = (stable_n, canary_n), (stable_k, canary_k)
        self.harm = arm_log_likelihood_ratios(self.harm, WORSE, 1 + self.guardrail.harm_margin, look, events)
        self.ok = arm_log_likelihood_ratios(self.ok, BETTER, 1 + self.guardrail.margin, look, events)
        self.trials = [self.trials[0] + stable_n, self.trials[1] + canary_n]
        self.events = [self.events[0] + stable_k, self.events[1] + canary_k]

    def add_bake(self, canary: Mapping[str, Any]) -> None:
        """Take in one look at 100 %, where only the canary has traffic."""
        if self.guardrail.kind == "latency" and self.threshold is None:
            return
        trials, events = self._counts(canary)
        self.bake = [self.bake[0] + trials, self.bake[1] + events]

    def baked_badly(self, alpha: float) -> bool:
        """Whether the share at 100 % is above what was acceptable beside stable's."""
        stable = self.events[0] / self.trials[0] if self.trials[0] else 0.0
        bound = min(max(self.guardrail.tolerance, (1 + self.guardrail.harm_margin) * stable, 1e-4), 0.99)
        return log_e_rate_above(self.bake[1], self.bake[0], bound) >= math.log(1 / alpha)

    def account(self, alpha: float, beta: float) -> dict[str, Any]:
        """Status and numbers at this look."""
        if 0 in self.trials:
            return {"status": NO_DATA, "stable": None, "canary": None}
        stable, canary = (events / trials for events, trials in zip(self.events, self.trials))
        harm = log_mean_exp(self.harm)
        below = log_e_rate_below(self.events[1], self.trials[1], self.guardrail.tolerance)
        ok = log_mean_exp([log_mean_exp(self.ok), below])
        status = OPEN
        if harm >= math.log(1 / alpha) and canary > self.guardrail.tolerance:
            status = HARM
        elif ok >= math.log(1 / beta):
            status = OK
        numbers = {"status": status, "stable": round(stable, 6), "canary": round(canary, 6)}
        if self.threshold is not None:
            numbers["slower_than_seconds"] = BUCKET_EDGES[self.threshold]
        return {
            **numbers,
            "requests": list(self.trials),
            "events": list(self.events),
            "e_harm": _bounded(harm),
            "e_harm_needed": round(1 / alpha, 3),
            "e_ok": _bounded(ok),
            "e_ok_needed": round(1 / beta, 3),
        }


class MeanEvidence:
    """The difference of a mean between the arms; positive means the canary is worse (or, for scores, higher)."""

    def __init__(self, guardrail: Guardrail, state: Mapping[str, Any] | None = None) -> None:
        self.guardrail = guardrail
        state = state or {}
        self.difference = MeanDifference.from_json(state.get("difference", []))
        self.totals = [list(arm) for arm in state.get("totals", [[0, 0.0], [0, 0.0]])]

    def state(self) -> dict[str, Any]:
        """Small JSON from which the evidence continues."""
        return {"difference": self.difference.to_json(), "totals": self.totals}

    def add(self, stable: Mapping[str, Any], canary: Mapping[str, Any]) -> None:
        """Take in one look of both arms."""
        if self.guardrail.metric not in stable or self.guardrail.metric not in canary:
            return
        looks = [arm[self.guardrail.metric] for arm in (stable, canary)]
        self.difference = self.difference.add(*looks)
        self.totals = [[n + look.n, total + look.total] for (n, total), look in zip(self.totals, looks)]

    def account(self, alpha: float, beta: float) -> dict[str, Any]:
        """Status and numbers at this look."""
        if not self.difference.usable():
            return {"status": NO_DATA, "stable": None, "canary": None, "values": [n for n, _ in self.totals]}
        guardrail, estimate = self.guardrail, self.difference.estimate
        two_sided = guardrail.kind == "score"
        worse = abs(estimate) if two_sided else (-estimate if guardrail.higher_is_better else estimate)
        harm_radius = self.difference.radius(alpha / 2 if two_sided else alpha)
        ok_radius = self.difference.radius(beta)
        status = OPEN
        if worse - harm_radius > guardrail.harm_margin:
            status = HARM
        elif worse + ok_radius < guardrail.margin:
            status = OK
        return {
            "status": status,
            "stable": round(self.totals[0][1] / self.totals[0][0], 6),
            "canary": round(self.totals[1][1] / self.totals[1][0], 6),
            "values": [n for n, _ in self.totals],
            "difference": round(estimate, 6),
            "worse_by_at_least": round(worse - harm_radius, 6),
            "worse_by_at_most": round(worse + ok_radius, 6),
            "margin": guardrail.margin,
        }


def evidence_for(guardrail: Guardrail, state: Mapping[str, Any] | None = None) -> ShareEvidence | MeanEvidence:
    """The evidence that belongs to ``guardrail``, new or continued from ``state``."""
    return ShareEvidence(guardrail, state) if guardrail.is_share else MeanEvidence(guardrail, state)
