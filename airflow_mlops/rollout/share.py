"""A share of requests, failed or slow, in the canary against stable's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from airflow_mlops.rollout.cuts import cut, slow_edge, total_histogram
from airflow_mlops.rollout.groupseq import Plan, ScoreTest
from airflow_mlops.rollout.guardrail import Guardrail
from airflow_mlops.rollout.ratio import RatioLikelihood
from airflow_mlops.rollout.replicas import Dispersion, ReplicaTallies, dispersion_of
from airflow_mlops.rollout.sequential import bounded, log_e_rate_above, log_e_rate_below
from airflow_mlops.rollout.terms import HARM, NO_DATA, OK, OPEN, Part, Terms, settle

BLOCK_EVENTS = 10
BELOW_WEIGHT = 0.1


class ShareEvidence:
    """Evidence on a ``rate`` or ``latency`` guardrail.

    The latency threshold is fixed from what stable had served before the first look that counts: a threshold chosen
    on the data it judges would not be one.

    :param guardrail: of kind ``rate`` or ``latency``
    :param state: :meth:`state` of an earlier one
    """

    def __init__(self, guardrail: Guardrail, state: Mapping[str, Any] | None = None) -> None:
        self.guardrail = guardrail
        self.per_request = guardrail.kind == "rate"
        state = state or {}
        self.likelihood = RatioLikelihood(1 + guardrail.harm_margin, 1 + guardrail.margin, state.get("logs"))
        self.trials = list(state.get("trials", [0, 0]))
        self.events = list(state.get("events", [0, 0]))
        self.expected: float = state.get("expected", 0.0)
        self.replicas = ReplicaTallies(state.get("replicas"))
        self.bake = list(state.get("bake", [0, 0]))
        self.block = list(state.get("block", [0, 0]))
        self.peak: float = state.get("peak", 0.0)
        self.settled: str = state.get("settled", OPEN)
        self.threshold: float | None = state.get("threshold")
        self.remark: str = state.get("remark", "")
        self.planned = ScoreTest(state.get("planned"))

    def state(self) -> dict[str, Any]:
        """Small JSON from which the evidence continues."""
        names = ("trials", "events", "expected", "bake", "block", "peak", "settled", "threshold", "remark")
        return {
            **{name: getattr(self, name) for name in names},
            "logs": self.likelihood.logs.tolist(),
            "replicas": self.replicas.state(),
            "planned": self.planned.state(),
        }

    def calibrate(self, stable: Sequence[Mapping[str, Any]]) -> None:
        """Fix what slow means, once stable has served enough."""
        if self.guardrail.kind != "latency" or self.threshold is not None:
            return
        histogram = total_histogram(stable, self.guardrail.metric)
        if histogram:
            self.threshold, self.remark = slow_edge(*histogram, self.guardrail.quantile, self.guardrail.factor)

    def reading(self, counters: Mapping[str, Any]) -> list[float] | None:
        """Cumulative (trials, events) of one replica, of a rate the events alone: its trials are the requests."""
        if self.guardrail.kind == "latency":
            if self.threshold is None:
                return None
            parts = cut(counters, self.guardrail.metric, [self.threshold])
            return None if parts is None else [parts[0] + parts[1], parts[1]]
        events = counters["counts"].get(self.guardrail.metric)
        return None if events is None or events > counters["counts"]["requests"] else [events]

    def add(self, stable: Sequence[Part], canary: Sequence[Part]) -> None:
        """Take in one look of both arms."""
        n = [sum(part.values[0] for part in arm) for arm in (stable, canary)]
        k = [sum(part.values[1] for part in arm) for arm in (stable, canary)]
        self.trials = [a + b for a, b in zip(self.trials, n)]
        self.events = [a + b for a, b in zip(self.events, k)]
        self._add_block(n[0], k[0])
        if 0 in n:
            return
        self.likelihood.add((n[0], n[1]), (k[0], k[1]))
        self.planned.add((n[0], n[1]), (k[0], k[1]), (self.likelihood.harm, self.likelihood.margin))
        self.expected = round(self.expected + k[0] * n[1] / n[0], 5)
        for index, arm in enumerate((stable, canary)):
            if k[index] and (len(arm) > 1 or self.replicas.arms[index]):
                for part in arm:
                    self.replicas.add(index, part.replica, part.values[1], k[index] * part.values[0] / n[index])

    def _add_block(self, trials: float, events: float) -> None:
        """Stable's highest rate over at least ten events: what can happen to a rate that no arm is beside."""
        self.block = [self.block[0] + trials, self.block[1] + events]
        if self.block[1] >= BLOCK_EVENTS:
            self.peak = round(max(self.peak, self.block[1] / self.block[0]), 9)
            self.block = [0, 0]

    def add_bake(self, canary: Sequence[Part]) -> None:
        """Take in one look at 100 %, where only the canary has traffic."""
        for part in canary:
            self.bake = [self.bake[0] + part.values[0], self.bake[1] + part.values[1]]

    def baked_badly(self, alpha: float) -> bool:
        """Whether the share at 100 % is above what was acceptable beside the worst that stable had."""
        stable = max(self.peak, self.events[0] / self.trials[0] if self.trials[0] else 0.0)
        bound = min(max(self.guardrail.tolerance, (1 + self.guardrail.harm_margin) * stable, 1e-4), 0.99)
        return self.bake[0] > 0 and log_e_rate_above(self.bake[1], self.bake[0], bound) >= math.log(1 / alpha)

    def dispersion(self) -> Dispersion:
        """How unevenly the events of each arm fell on its replicas."""
        arms = [[((o - e) / e if e else 0.0, e) for o, e in arm] for arm in self.replicas.arms]
        return dispersion_of(arms, least=1.0)

    def culprit(self) -> int | None:
        """The canary's replica without which the others are likelier to be as stable than to be as their arm is.

        With fewer than three replicas nobody can tell.
        """
        rows = self.replicas.arms[1]
        total = sum(expected for _, expected in rows)
        active = [i for i, (_, expected) in enumerate(rows) if expected > 0]
        if len(active) < 3:
            return None
        # Half an event more in stable, so that none at all is no certainty.
        wanted = self.expected + 0.5 * self.trials[1] / self.trials[0]
        each = [expected * wanted / total for _, expected in rows]
        worst = max(active, key=lambda i: (rows[i][0] - each[i]) / math.sqrt(each[i]))
        ratio = self.events[1] / wanted
        events, others = self.events[1] - rows[worst][0], wanted - each[worst]
        if ratio <= 1:
            return None
        # A bad model has to be twice as likely as one bad replica, given the others.
        return worst if events * math.log(ratio) - others * (ratio - 1) < math.log(2) else None

    def account(self, terms: Terms) -> dict[str, Any]:
        """Status and numbers at this look."""
        if 0 in self.trials:
            return {"status": NO_DATA, "stable": None, "canary": None, **self._remark()}
        stable, canary = (events / trials for events, trials in zip(self.events, self.trials))
        dispersion = self.dispersion()
        numbers: dict[str, Any] = {"stable": round(stable, 6), "canary": round(canary, 6), **self._remark()}
        numbers |= {"requests": list(self.trials), "events": list(self.events)}
        if dispersion.known:
            numbers["replica_spread"] = round(math.sqrt(dispersion.variance), 3)
        worse, fine, evidence = self._tests(terms, dispersion)
        intolerable = canary > self.guardrail.tolerance
        culprit = self.culprit() if intolerable else None
        if culprit is not None and not worse and not self._harm_of_requests(terms):
            culprit = None
        if culprit is not None:
            numbers["culprit"] = culprit
        harm = worse and intolerable and culprit is None
        self.settled = settle(self.settled, harm, fine, evidence.pop("lost"))
        return {"status": self.settled, **numbers, **evidence}

    def _remark(self) -> dict[str, Any]:
        if self.threshold is None:
            return {}
        return {"slower_than_seconds": self.threshold, **({"remark": self.remark} if self.remark else {})}

    def _below(self, terms: Terms, dispersion: Dispersion) -> float:
        """Evidence that the canary's share is below what is acceptable whatever stable's is."""
        if self.guardrail.tolerance <= 0:
            return -math.inf
        variance = dispersion.of_difference(terms.replica_sd)[1]
        bound = self.guardrail.tolerance * math.exp(-2 * math.sqrt(variance))
        return log_e_rate_below(self.events[1], self.trials[1], bound)

    def _tests(self, terms: Terms, dispersion: Dispersion) -> tuple[bool, bool, dict[str, Any]]:
        below = self._below(terms, dispersion)
        if terms.plan is not None:
            return self._planned_tests(terms, terms.plan, dispersion, below)
        harm, ok = self.likelihood.log_e(dispersion, terms.replica_sd)
        if below > -math.inf:
            ok = max(ok + math.log1p(-BELOW_WEIGHT), below + math.log(BELOW_WEIGHT))
        numbers = {
            "e_harm": bounded(harm),
            "e_harm_needed": round(1 / terms.alpha, 3),
            "e_ok": bounded(ok),
            "e_ok_needed": round(1 / terms.beta, 3),
            "lost": ok < 0,
        }
        return harm >= math.log(1 / terms.alpha), ok >= math.log(1 / terms.beta), numbers

    def _planned_tests(
        self, terms: Terms, plan: Plan, dispersion: Dispersion, below: float
    ) -> tuple[bool, bool, dict[str, Any]]:
        harm, ok, numbers = self.planned.look(plan, dispersion.of_difference(terms.replica_sd), terms)
        return harm, ok or below >= math.log(1 / terms.beta), numbers

    def _harm_of_requests(self, terms: Terms) -> bool:
        """Whether it would be harm if replicas did not differ: only then is a single one to blame for it."""
        return self.likelihood.log_e(Dispersion(), 0.0)[0] >= math.log(1 / terms.alpha)

    def report(self, terms: Terms) -> dict[str, Any]:
        """The effect with its confidence sequence: canary's rate over stable's."""
        if 0 in self.trials:
            return {"effect": "ratio of rates", "estimate": None, "interval": None}
        low, high = self.likelihood.interval(self.dispersion(), terms.beta, terms.replica_sd)
        estimate = self.events[1] / self.expected if self.expected else None
        return {
            "effect": "ratio of rates",
            "estimate": None if estimate is None else round(estimate, 4),
            "interval": [round(low, 4), round(high, 4)],
            "confidence": 1 - terms.beta,
        }


__all__ = ["HARM", "NO_DATA", "OK", "OPEN", "ShareEvidence"]
