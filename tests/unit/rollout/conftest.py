"""A simulated route: two arms with known rates, read as the judge reads a real one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from airflow_mlops.rollout import Judge, Observation
from airflow_mlops.rollout.observation import BUCKET_EDGES, MOMENTS


class SimulatedRoute:
    """Cumulative counters of two arms; ``look`` sends one batch of traffic and reads them."""

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
        true_share: float | None = None,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.errors, self.latency, self.loss, self.score = errors, latency, loss, score
        self.traffic, self.shock, self.true_share = traffic, shock, true_share
        self.time, self.epoch, self.weight = 1000.0, 0, -1.0
        self.routed = [0, 0]
        self.arms = [self.empty(), self.empty()]

    @staticmethod
    def empty() -> dict[str, Any]:
        zero = {name: [0, 0.0, 0.0] for name in MOMENTS}
        return {"requests": 0, "errors": 0, "buckets": [0] * (len(BUCKET_EDGES) + 1), **zero}

    def _moments(self, arm: int, name: str, values: np.ndarray) -> None:
        old = self.arms[arm][name]
        new = [old[0] + len(values), old[1] + float(values.sum()), old[2] + float((values**2).sum())]
        self.arms[arm] = {**self.arms[arm], name: new}

    def look(self, weight: float, seconds: float = 60.0) -> Observation:
        """One look after ``seconds`` of traffic at ``weight`` percent; a new weight only shows the counters."""
        self.time += seconds
        if weight != self.weight:
            self.weight, self.epoch, self.routed = weight, self.epoch + 1, [0, 0]
        else:
            shock = math.exp(self.rng.normal(0, self.shock)) if self.shock else 1.0
            share = weight / 100 if self.true_share is None else self.true_share
            canary = int(self.rng.binomial(self.traffic, share))
            for arm, n in enumerate((self.traffic - canary, canary)):
                self.routed[arm] += n
                self._serve(arm, n, shock)
        stable, canary_arm = ({**arm, "buckets": list(arm["buckets"])} for arm in self.arms)
        routed = (self.routed[0], self.routed[1])
        return Observation(self.time, "boot", self.epoch, weight, stable, canary_arm, routed)

    def _serve(self, arm: int, n: int, shock: float) -> None:
        if n == 0:
            return
        failed = int(self.rng.binomial(n, min(self.errors[arm] * shock, 1.0)))
        seconds = self.rng.lognormal(math.log(self.latency[arm]), 0.4, n)
        buckets = np.bincount(np.searchsorted(BUCKET_EDGES, seconds), minlength=len(BUCKET_EDGES) + 1)
        old = self.arms[arm]
        self.arms[arm] = {
            **old,
            "requests": old["requests"] + n,
            "errors": old["errors"] + failed,
            "buckets": [a + int(b) for a, b in zip(old["buckets"], buckets)],
        }
        self._moments(arm, "latency", seconds)
        self._moments(arm, "log_loss", self.rng.gamma(1.0, self.loss[arm], n))
        self._moments(arm, "prediction", self.rng.normal(self.score[arm], 0.15, n))

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
