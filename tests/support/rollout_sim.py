"""A canary and its stable version under simulated traffic, read as a judge reads real ones; and what can go wrong.

One seeded stream of requests per replica gives all counters: three rates, the latency and the prediction as histograms,
and the moments of predictions, two losses and a business value. Rates, times and values are multiplied by noise that
both arms share, by noise of their own and by what makes the canary worse; the prediction's odds are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import ndtr

from airflow_mlops.rollout import Observation

MINUTE = 60.0
ARMS = ("stable", "canary")


@dataclass(frozen=True)
class Noise:
    """What moves a metric although the versions are equal; every metric draws its own.

    :param looks: standard deviation of the log of a factor that both arms share, anew for each look
    :param arms: the same, but of each arm's own
    :param memory: correlation of one look's factor with the last one's (AR(1))
    :param replicas: standard deviation of the log of a replica's factor, the same for the whole run
    """

    looks: float = 0.0
    arms: float = 0.0
    memory: float = 0.0
    replicas: float = 0.0

    def factors(self, rng: np.random.Generator, looks: int, replicas: int) -> np.ndarray:
        """Factors with mean 1, shape (looks, arms, replicas)."""
        shared = self.looks * self._series(rng, looks, 1) + self.arms * self._series(rng, looks, 2)
        own = rng.normal(0.0, self.replicas, (1, 2, replicas))
        return np.exp(shared[:, :, None] + own - (self.looks**2 + self.arms**2 + self.replicas**2) / 2)

    def _series(self, rng: np.random.Generator, looks: int, arms: int) -> np.ndarray:
        series = rng.normal(size=(looks, arms))
        fresh = math.sqrt(1 - self.memory**2)
        for index in range(1, looks if self.memory else 0):
            series[index] = self.memory * series[index - 1] + fresh * series[index]
        return series


#: The noise that error rates are stated for.
CELLS = {
    "independent": Noise(),
    "AR(1) 0.8": Noise(looks=0.5, memory=0.8),
    "shared shocks": Noise(looks=1.0),
    "pod effects": Noise(replicas=0.2),
}

RATES = {"errors": 0.005, "timeouts": 0.005, "fallbacks": 0.01}


def _log(values: np.ndarray) -> np.ndarray:
    return np.log(values)


def _logit(values: np.ndarray) -> np.ndarray:
    return np.log(values / (1 - values))


@dataclass(frozen=True)
class Shape:
    """Distribution of a number per request: normal after ``scale``, and known to its bucket.

    :param middle: median
    :param spread: standard deviation on the scale
    :param edges: upper edges of the buckets, one more holds the rest
    """

    middle: float
    spread: float
    edges: np.ndarray
    scale: Callable[[np.ndarray], np.ndarray] = _log

    @property
    def values(self) -> np.ndarray:
        """What a request in each bucket counts as."""
        edges = self.edges
        return np.concatenate([[edges[0] / 2], (edges[1:] + edges[:-1]) / 2, [edges[-1] + (edges[-1] - edges[-2]) / 2]])

    def draw(self, rng: np.random.Generator, requests: np.ndarray, factors: np.ndarray) -> np.ndarray:
        """Requests per bucket, with the buckets as one more axis."""
        middle = self.scale(np.array(self.middle)) + np.log(factors)
        below = ndtr((self.scale(self.edges) - middle[..., None]) / self.spread)
        below = np.concatenate([np.zeros((*factors.shape, 1)), below, np.ones((*factors.shape, 1))], axis=-1)
        return rng.multinomial(requests, np.diff(below))


SHAPES = {
    "latency": Shape(0.05, 0.6, np.round(0.004 * 1.25 ** np.arange(34), 6)),
    "prediction": Shape(0.3, 0.8, np.round(np.arange(0.05, 1.0, 0.05), 2), _logit),
    "log_loss": Shape(0.35, 0.7, 0.02 * 1.3 ** np.arange(24)),
    "brier": Shape(0.12, 0.7, 0.006 * 1.3 ** np.arange(24)),
    "value": Shape(20.0, 0.5, 2.0 * 1.2 ** np.arange(28)),
}
HISTOGRAMS = ("latency", "prediction")
MOMENTS = ("prediction", "log_loss", "brier", "value")
EDGES = {name: SHAPES[name].edges.tolist() for name in HISTOGRAMS}
VALUES = {name: SHAPES[name].values for name in MOMENTS}


@dataclass(frozen=True)
class World:
    """Traffic and what is true of the versions.

    :param worse: metric to the canary's factor: 1.5 for half as many more errors, 0.5 for half the value
    :param traffic: requests per minute to both arms together
    :param share: share of them that the canary really gets, 0 to 1; the weight's, if not given
    :param replicas: of each arm
    :param looks: minutes until the traffic ends
    """

    noise: Noise = CELLS["independent"]
    worse: Mapping[str, float] = field(default_factory=dict)
    traffic: float = 1000.0
    share: float | None = None
    replicas: int = 10
    looks: int = 240


class Canary:
    """One rollout's traffic; the same seed and weights give the same traffic."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self._rng = np.random.default_rng(seed)
        names = (*RATES, *SHAPES)
        self._factors = {name: world.noise.factors(self._rng, world.looks, world.replicas) for name in names}
        for name, factor in world.worse.items():
            self._factors[name][:, 1] *= factor
        self._minute, self._epoch, self._weight = 0, 0, math.nan
        nothing = np.zeros((1, 2, world.replicas), int)
        self._totals = {name: nothing for name in ("requests", *RATES)}
        for name, shape in SHAPES.items():
            self._totals[name] = np.zeros((*nothing.shape, len(shape.edges) + 1), int)
        self._row, self._before = 0, nothing[0]

    def look(self, weight: float) -> Observation:
        """The counters after one more minute; when the weight is new, as they are then."""
        if weight != self._weight:
            self._weight, self._epoch = weight, self._epoch + 1
            self._totals = {name: rows[self._row : self._row + 1] for name, rows in self._totals.items()}
            self._row, self._before = 0, self._totals["requests"][0]
        else:
            if self._row + 1 == len(self._totals["requests"]):
                self._serve(min(60, self.world.looks - self._minute))
            self._row, self._minute = self._row + 1, self._minute + 1
        stable, canary = self._counters()
        routed = (self._totals["requests"][self._row] - self._before).sum(axis=1)
        return Observation(
            time=1000.0 + MINUTE * (self._minute + self._epoch),
            boot="boot",
            epoch=str(self._epoch),
            weight=weight,
            stable=stable,
            canary=canary,
            routed=(int(routed[0]), int(routed[1])),
        )

    def _serve(self, minutes: int) -> None:
        """Draw the requests of the next ``minutes``; the totals' first row is the last one so far."""
        if minutes <= 0:
            raise RuntimeError(f"the traffic ended after {self.world.looks} minutes")
        world = self.world
        share = self._weight / 100 if world.share is None else world.share
        rates = world.traffic / world.replicas * np.array([1 - share, share])
        requests = self._rng.poisson(np.broadcast_to(rates[:, None], (minutes, 2, world.replicas)))
        drawn = {"requests": requests}
        now = slice(self._minute, self._minute + minutes)
        for name, rate in RATES.items():
            drawn[name] = self._rng.binomial(requests, np.minimum(rate * self._factors[name][now], 1.0))
        for name, shape in SHAPES.items():
            drawn[name] = shape.draw(self._rng, requests, self._factors[name][now])
        last = {name: rows[-1:] for name, rows in self._totals.items()}
        self._totals = {name: np.concatenate([last[name], last[name] + rows.cumsum(0)]) for name, rows in drawn.items()}
        self._row = 0

    def _counters(self) -> list[dict[str, Any]]:
        """Replica to counters, of each arm."""
        row = {name: rows[self._row] for name, rows in self._totals.items()}
        plain = {name: row[name].tolist() for name in ("requests", *RATES, *HISTOGRAMS)}
        sums = {name: (row[name] @ VALUES[name]).tolist() for name in MOMENTS}
        squares = {name: (row[name] @ VALUES[name] ** 2).tolist() for name in MOMENTS}

        def replica(arm: int, number: int) -> dict[str, Any]:
            requests = plain["requests"][arm][number]
            return {
                "counts": {name: plain[name][arm][number] for name in ("requests", *RATES)},
                "histograms": {name: {"edges": EDGES[name], "counts": plain[name][arm][number]} for name in HISTOGRAMS},
                "moments": {name: [requests, sums[name][arm][number], squares[name][arm][number]] for name in MOMENTS},
            }

        return [
            {f"{arm}-{number}": replica(index, number) for number in range(self.world.replicas)}
            for index, arm in enumerate(ARMS)
        ]


def watch(world: World, seed: int, weight: float = 10.0) -> Iterator[Observation]:
    """All looks at one weight; the first has counters that nothing can be told from yet."""
    canary = Canary(world, seed)
    for _ in range(world.looks + 1):
        yield canary.look(weight)


def _without(observation: Observation, name: str) -> Observation:
    assert observation.canary is not None
    canary = {
        replica: {**counters, "counts": {key: n for key, n in counters["counts"].items() if key != name}}
        for replica, counters in observation.canary.items()
    }
    return dataclasses.replace(observation, canary=canary)


def _not_a_number(observation: Observation) -> Observation:
    assert observation.canary is not None
    canary = {
        replica: {
            **counters,
            "counts": {**counters["counts"], "errors": math.nan},
            "moments": {name: [values[0], math.nan, math.nan] for name, values in counters["moments"].items()},
        }
        for replica, counters in observation.canary.items()
    }
    return dataclasses.replace(observation, canary=canary)


def _since(counters: Any, before: Any) -> Any:
    if isinstance(counters, Mapping):
        return {name: value if name == "edges" else _since(value, before[name]) for name, value in counters.items()}
    if isinstance(counters, list):
        return [_since(*pair) for pair in zip(counters, before, strict=True)]
    return counters - before


def _started_anew(observation: Observation, before: Observation) -> Observation:
    """Counters of the last minute only, under the same names."""
    return dataclasses.replace(
        observation,
        stable=_since(observation.stable, before.stable),
        canary=_since(observation.canary, before.canary),
    )


Fault = Callable[[Observation, Observation, Observation], Observation]
#: Name to what it makes of an observation, the one before it and the first.
FAULTS: dict[str, Fault] = {
    "NaN": lambda now, before, first: _not_a_number(now),
    "empty": lambda now, before, first: dataclasses.replace(now, stable={}, canary={}),
    "canary missing": lambda now, before, first: dataclasses.replace(now, canary=None),
    "stable missing": lambda now, before, first: dataclasses.replace(now, stable=None),
    "errors not counted": lambda now, before, first: _without(now, "errors"),
    "stale scrape": lambda now, before, first: first,
    "stale counters": lambda now, before, first: dataclasses.replace(first, time=now.time),
    "route unlike the request": lambda now, before, first: dataclasses.replace(now, weight=now.weight + 5),
    "counters reset each look": lambda now, before, first: _started_anew(now, before),
    "Prometheus down": lambda now, before, first: Observation(now.time, problem="connection refused"),
    "500s": lambda now, before, first: Observation(now.time, problem="HTTP 500 from Prometheus"),
    "API server down": lambda now, before, first: Observation(
        now.time, now.boot, now.epoch, now.weight, now.stable, now.canary, now.routed, problem="no answer"
    ),
}
#: Name to a world in which the traffic itself is what is wrong, at a weight of 10 %.
FAULTY_WORLDS: dict[str, dict[str, Any]] = {
    "zero traffic": {"traffic": 0.0},
    "no traffic to the canary": {"share": 0.0},
    "no traffic to stable": {"share": 1.0},
    "sample ratio mismatch": {"share": 0.08},
}


def faulty(world: World, seed: int, fault: str, weight: float = 10.0) -> Iterator[Observation]:
    """The looks of :func:`watch` with one fault in all of them.

    :param fault: one of ``FAULTS`` or ``FAULTY_WORLDS``
    """
    if fault in FAULTY_WORLDS:
        yield from watch(dataclasses.replace(world, **FAULTY_WORLDS[fault]), seed, weight)
        return
    looks = watch(world, seed, weight)
    first = before = next(looks)
    yield FAULTS[fault](first, first, first)
    for now in looks:
        yield FAULTS[fault](now, before, first)
        before = now
