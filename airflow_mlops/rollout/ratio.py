"""The likelihood of the ratio of two arms' rates, and e-processes against ratios that are too high or too low.

Given that an event happened in a look, it belongs to the canary with probability ``ratio * n_c / (ratio * n_c + n_s)``,
whatever the rate of events in that look: a shock that both arms share cancels, and a changing split needs no
correction (Lindon & Malek 2022). So the logarithm of the likelihood on a grid of ratios is all that has to be kept.

Replicas with effects of their own make the arms' ratio ``ratio * exp(u)``, ``u`` normal with variance
``tau^2 (1/m_c + 1/m_s)``. Null and alternatives are both averaged over ``u``; of the unknown ``tau``, the alternative
is averaged over a prior and the null has the value that suits it best, each with the likelihood that the dispersion
within the arms gives it (universal inference, see :mod:`.replicas`).
"""

from __future__ import annotations

import functools
import math

import numpy as np

from airflow_mlops.rollout.replicas import SPREADS, Dispersion

WORSE = ((1.06, 0.01), (1.2, 0.02), (1.65, 0.52), (4.0, 0.42), (12.0, 0.03))
BETTER = ((0.1, 0.02), (0.3, 0.04), (0.7, 0.84), (0.8, 0.08), (0.95, 0.02))
PRIOR_OF_SPREAD = (0.6, 0.1, 0.1, 0.08, 0.07, 0.03, 0.01, 0.005, 0.005)
LADDER = 1.1


@functools.lru_cache(maxsize=64)
def grid(harm: float, margin: float) -> np.ndarray:
    """Logarithms of ratios: every 5 % around 1, wider outside, with both nulls and their alternatives.

    :param harm: largest ratio that is not harm
    :param margin: smallest ratio that is not acceptable
    """
    points = [0.05 * i for i in range(-18, 27)]
    points += [-4.0, -3.0, -2.2, -1.7, -1.35, -1.1, 1.5, 1.75, 2.0, 2.3, 2.7, 3.2, 3.8, 4.5]
    points += [math.log(harm), *(math.log(harm * factor) for factor, _ in WORSE)]
    points += [math.log(margin), *(math.log(margin * factor) for factor, _ in BETTER)]
    return np.array(sorted({round(point, 6) for point in points}))


def _cells(points: np.ndarray, centre: float, sd: float) -> np.ndarray:
    """Probability of each point's cell under a normal around ``centre``, a point of the grid."""
    if sd < 1e-9:
        return (np.arange(len(points)) == np.argmin(np.abs(points - centre))).astype(float)
    edges = (points[1:] + points[:-1]) / 2
    below = np.array([0.5 * math.erfc((centre - edge) / (sd * math.sqrt(2))) for edge in edges])
    return np.diff(np.concatenate(([0.0], below, [1.0])))


@functools.lru_cache(maxsize=1024)
def _weights(harm: float, margin: float, sds: tuple[float, ...]) -> np.ndarray:
    """Weights on the grid, rows by test (harm, ok), side (alternative, null) and spread."""
    points, rows = grid(harm, margin), []
    for null, alternatives in ((harm, WORSE), (margin, BETTER)):
        for sd in sds:
            rows.append(sum(weight * _cells(points, math.log(null * factor), sd) for factor, weight in alternatives))
        rows += [_cells(points, math.log(null), sd) for sd in sds]
    return np.array(rows)


class RatioLikelihood:
    """Log likelihood of the ratio of the canary's rate to stable's, on :func:`grid`.

    :param harm: largest ratio that is not harm, above 0
    :param margin: smallest ratio that is not acceptable
    :param logs: those of an earlier one
    """

    def __init__(self, harm: float, margin: float, logs: list[float] | None = None) -> None:
        self.harm, self.margin = harm, margin
        self.points = grid(harm, margin)
        self.ratios = np.exp(self.points)
        self.logs = np.zeros(len(self.points)) if logs is None else np.array(logs)

    def add(self, trials: tuple[float, float], events: tuple[float, float]) -> None:
        """Add the (stable, canary) trials and events of one look."""
        total = events[0] + events[1]
        if trials[0] <= 0 or trials[1] <= 0 or total == 0:
            return
        logs = self.logs + events[1] * self.points - total * np.log1p(self.ratios * (trials[1] / trials[0]))
        self.logs = np.round(logs - logs.max(), 4)

    def log_e(self, dispersion: Dispersion, least_spread: float = 0.0) -> tuple[float, float]:
        """Evidence of harm, and of no inferiority."""
        spreads = SPREADS if dispersion.known else (0.0,)
        spreads = tuple(max(spread, least_spread) for spread in spreads)
        prior: tuple[float, ...] = PRIOR_OF_SPREAD if dispersion.known else (1.0,)
        sds = _sds(spreads, dispersion.uneven)
        seen = np.array([dispersion.log_likelihood(spread) for spread in spreads])
        seen -= seen.max()
        # The least representable number stands for a likelihood that is lost to underflow.
        sums = np.log(_weights(self.harm, self.margin, sds) @ np.exp(np.maximum(self.logs, -690.0)) + 1e-300)
        k = len(spreads)
        logs = []
        for start in (0, 2 * k):
            alternative = sums[start : start + k] + seen
            null = sums[start + k : start + 2 * k] + seen
            logs.append(_log_dot(prior, alternative) - _log_dot(prior, null))
        return logs[0], logs[1]

    def interval(self, dispersion: Dispersion, alpha: float, least_spread: float = 0.0) -> tuple[float, float]:
        """Confidence sequence of the ratio, outwards to the next points of the grid.

        Ratios that a mixture over all ratios is not ``1/alpha`` times likelier than.
        """
        spreads = tuple(max(spread, least_spread) for spread in (SPREADS if dispersion.known else (0.0,)))
        likelihood = np.exp(np.maximum(self.logs, -690.0))
        wide = _cells(self.points, 0.0, 1.0)
        nulls, mixture = [], []
        for spread, sd in zip(spreads, _sds(spreads, dispersion.uneven)):
            seen = dispersion.log_likelihood(spread)
            each = np.log(np.array([_cells(self.points, point, sd) @ likelihood for point in self.points]) + 1e-300)
            nulls.append(each + seen)
            mixture.append(math.log(float(wide @ np.exp(each)) + 1e-300) + seen)
        top = max(mixture)
        prior = PRIOR_OF_SPREAD if dispersion.known else (1.0,)
        total = top + math.log(sum(p * math.exp(m - top) for p, m in zip(prior, mixture)))
        inside = np.flatnonzero(np.max(nulls, axis=0) > total - math.log(1 / alpha))
        if not len(inside):
            inside = np.array([int(np.argmax(np.max(nulls, axis=0)))])
        last = len(self.points) - 1
        low, high = max(int(inside[0]) - 1, 0), min(int(inside[-1]) + 1, last)
        return float(self.ratios[low]), float(self.ratios[high])


def _log_dot(weights: tuple[float, ...], logs: np.ndarray) -> float:
    top = logs.max()
    return float(top + math.log(np.dot(weights, np.exp(logs - top))))


def _sds(spreads: tuple[float, ...], uneven: float) -> tuple[float, ...]:
    """Standard deviation of the arms' own difference per spread, ``uneven`` taken up to the next rung of a ladder."""
    rung = LADDER ** math.ceil(round(math.log(uneven) / math.log(LADDER), 6))
    return tuple(round(spread * math.sqrt(rung), 6) for spread in spreads)
