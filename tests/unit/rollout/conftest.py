"""A simulated route: two arms of replicas with known rates, read as the judge reads a real one."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest

from airflow_mlops.rollout import Judge, Observation
from airflow_mlops.rollout.observation import LATENCY_EDGES

PREDICTION_EDGES = [round(0.05 * i, 2) for i in range(1, 20)]


class SimulatedRoute:
    """Cumulative counters of two arms; ``look`` sends one batch of traffic and reads them.

    :param errors: error rate of (stable, canary), and so on
    :param shock: standard deviation of the logarithm of a factor on all error rates, new at every look
    :param ar: how much of one look's shock is left in the next
    :param replicas: of (stable, canary); with one each they have the name ""
    :param pods: standard deviation of the logarithm of each replica's own factor on its error rate
    :param bad: replica name to a factor on its error rate, its latency and its loss
    :param true_share: of the canary, when the route does not follow its weight
    :param count: counters of the router itself; without, ``routed`` is None
    """

    def __init__(
        self,
        seed: int,
        *,
        errors: tuple[float, float] = (0.005, 0.005),
        latency: tuple[float, float] = (0.02, 0.02),
        loss: tuple[float, float] = (0.45, 0.45),
        score: tuple[float, float] = (0.3, 0.3),
        traffic: int = 1000,
        shock: float = 0.0,
        ar: float = 0.0,
        replicas: tuple[int, int] = (1, 1),
        pods: float = 0.0,
        bad: dict[str, float] | None = None,
        true_share: float | None = None,
        count: bool = True,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.errors, self.latency, self.loss, self.score = errors, latency, loss, score
        self.traffic, self.shock, self.ar, self.true_share, self.count = traffic, shock, ar, true_share, count
        self.time, self.epoch, self.weight, self.log_shock = 1000.0, 0, -1.0, 0.0
        self.routed = [0, 0]
        names = [[f"{arm}-{i}" for i in range(m)] if max(replicas) > 1 else [""] for arm, m in zip("sc", replicas)]
        self.arms = [{name: self.empty() for name in arm} for arm in names]
        self.own = {name: math.exp(self.rng.normal(0, pods)) if pods else 1.0 for arm in names for name in arm}
        self.bad = bad or {}

    @staticmethod
    def empty() -> dict[str, Any]:
        return {
            "counts": {"requests": 0, "errors": 0},
            "histograms": {
                "latency": {"edges": list(LATENCY_EDGES), "counts": [0] * (len(LATENCY_EDGES) + 1)},
                "prediction": {"edges": PREDICTION_EDGES, "counts": [0] * (len(PREDICTION_EDGES) + 1)},
            },
            "moments": {name: [0, 0.0, 0.0] for name in ("latency", "prediction", "log_loss")},
        }

    def look(self, weight: float, seconds: float = 60.0) -> Observation:
        """One look after ``seconds`` of traffic at ``weight`` percent; a new weight only shows the counters."""
        self.time += seconds
        if weight != self.weight:
            self.weight, self.epoch, self.routed = weight, self.epoch + 1, [0, 0]
        else:
            new = self.rng.normal(0, self.shock) if self.shock else 0.0
            self.log_shock = self.ar * self.log_shock + math.sqrt(1 - self.ar**2) * new
            share = weight / 100 if self.true_share is None else self.true_share
            canary = int(self.rng.binomial(self.traffic, share)) if weight else self.traffic
            for arm, n in enumerate((self.traffic - canary * (weight > 0), canary)):
                self.routed[arm] += n
                self._arm(arm, n)
        stable, canary_arm = copy.deepcopy(self.arms)
        routed = (self.routed[0], self.routed[1]) if self.count else None
        return Observation(self.time, "boot", str(self.epoch), weight, stable, canary_arm, routed, shadow=weight == 0)

    def _arm(self, arm: int, n: int) -> None:
        names = list(self.arms[arm])
        for name, own in zip(names, self.rng.multinomial(n, [1 / len(names)] * len(names))):
            if own:
                self._serve(arm, name, int(own))

    def _serve(self, arm: int, name: str, n: int) -> None:
        factor = self.own[name] * self.bad.get(name, 1.0)
        counters = self.arms[arm][name]
        counters["counts"]["requests"] += n
        counters["counts"]["errors"] += int(
            self.rng.binomial(n, min(self.errors[arm] * math.exp(self.log_shock) * factor, 1.0))
        )
        seconds = self.rng.lognormal(math.log(self.latency[arm] * self.bad.get(name, 1.0)), 0.4, n)
        scores = self.rng.normal(self.score[arm], 0.15, n)
        for metric, values, edges in (("latency", seconds, LATENCY_EDGES), ("prediction", scores, PREDICTION_EDGES)):
            old = counters["histograms"][metric]["counts"]
            buckets = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1)
            counters["histograms"][metric]["counts"] = [a + int(b) for a, b in zip(old, buckets)]
        losses = self.rng.gamma(1.0, self.loss[arm] * self.bad.get(name, 1.0), n)
        for metric, values in (("latency", seconds), ("prediction", scores), ("log_loss", losses)):
            old = counters["moments"][metric]
            new = [old[0] + n, old[1] + float(values.sum()), old[2] + float((values**2).sum())]
            counters["moments"][metric] = new

    def run(self, judge: Judge, looks: int = 400) -> list[Any]:
        """Look until the judge is done; returns the verdicts."""
        verdicts = []
        for _ in range(looks):
            verdicts.append(judge.observe(self.look(judge.weight)))
            if verdicts[-1].final:
                break
        return verdicts


@pytest.fixture
def route():
    return SimulatedRoute
