"""The likelihood of the ratio of two arms' rates, and e-processes against ratios that are too high or too low.

Given that an event happened in a look, it belongs to the canary with probability ``ratio * n_c / (ratio * n_c + n_s)``,
whatever the rate of events in that look: a shock that both arms share cancels, and a changing split needs no
correction (Lindon & Malek, "Anytime-valid inference for multinomial count data", NeurIPS 2022). So the logarithm of the
likelihood on a grid of ratios is all that has to be kept.

Replicas with effects of their own make the arms' ratio ``ratio * exp(u)``, ``u`` normal with variance
``tau^2 (1/m_c + 1/m_s)``. Null and alternatives are both averaged over ``u``, and over ``tau`` with a prior and the
likelihood that the dispersion within the arms gives it (:mod:`.replicas`): for every ``tau`` of weight ``w`` the
evidence exceeds ``1/alpha`` with probability at most ``alpha / w`` by Ville's inequality, and where the dispersion
tells ``tau``, as it does long before requests tell more than replicas do, at about ``alpha``
(``tests/unit/rollout/test_error_rates.py`` says how far that holds).
"""

from __future__ import annotations

import functools
import math

import numpy as np

from airflow_mlops.rollout.replicas import FEW, SPREADS, Dispersion

WORSE = ((1.06, 0.01), (1.2, 0.02), (1.65, 0.54), (4.0, 0.41), (12.0, 0.02))
BETTER = ((0.1, 0.02), (0.3, 0.04), (0.7, 0.84), (0.8, 0.08), (0.95, 0.02))
LIKELY = (0.75, 0.07, 0.06, 0.04, 0.03, 0.03, 0.01, 0.005, 0.005)
TRUSTING = (0.92, 0.03, 0.02, 0.013, 0.01, 0.005, 0.001, 0.0005, 0.0005)
CAUTIOUS = (0.35, 0.12, 0.15, 0.13, 0.12, 0.08, 0.03, 0.01, 0.01)
FEW_REPLICAS = (0.3, 0.1, 0.15, 0.17, 0.2, 0.15, 0.05, 0.02, 0.01)
"""Priors of each of ``SPREADS``: of the alternatives; of a canary at the harm margin, trusting, as one that is equal
has that margin to spare and a single bad replica is looked for besides; of one at the margin, cautious, as promoting it
is what must not happen; and of the latter, weighing more than 1, where so few replicas tell little of their spread."""
PRIORS = {few: np.array([LIKELY, TRUSTING, LIKELY, FEW_REPLICAS if few else CAUTIOUS]) for few in (False, True)}
SQUARES = np.array(SPREADS) ** 2
LADDER = 1.1
LOG_LADDER = math.log(LADDER)
LOWEST = -690.0


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
    """Weights on the grid, by test (harm, ok) and side (alternative, null), then by spread."""
    points, rows = grid(harm, margin), []
    for null, alternatives in ((harm, WORSE), (margin, BETTER)):
        for sd in sds:
            rows.append(sum(weight * _cells(points, math.log(null * factor), sd) for factor, weight in alternatives))
        rows += [_cells(points, math.log(null), sd) for sd in sds]
    return np.array(rows)


@functools.lru_cache(maxsize=4096)
def _sds(known: bool, rung: int, least: float) -> tuple[float, ...]:
    """Standard deviation of the arms' own difference, by spread."""
    return tuple(round(max(spread, least) * LADDER ** (rung / 2), 6) for spread in (SPREADS if known else (0.0,)))


def _rung(uneven: float) -> int:
    """``uneven``, taken up to the next rung of a ladder: what it weighs need be computed only once."""
    return math.ceil(math.log(uneven) / LOG_LADDER - 1e-9)


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
        self.logs = np.round(logs - logs.max(), 3)

    def log_e(self, dispersion: Dispersion, least_spread: float = 0.0) -> tuple[float, float]:
        """Evidence of harm, and of no inferiority."""
        sds = _sds(dispersion.known, _rung(dispersion.uneven), least_spread)
        likelihood = np.exp(np.maximum(self.logs, LOWEST))
        sums = (_weights(self.harm, self.margin, sds) @ likelihood).reshape(4, len(sds))
        priors = _priors(dispersion)
        # The least representable number stands for a likelihood that is lost to underflow.
        worse, harmless, better, inferior = (math.log(value + 1e-300) for value in (sums * priors).sum(axis=1).tolist())
        return worse - harmless, better - inferior

    def interval(self, dispersion: Dispersion, alpha: float, least_spread: float = 0.0) -> tuple[float, float]:
        """Confidence sequence of the ratio, outwards to the next points of the grid.

        Ratios that a mixture over all ratios is not ``1/alpha`` times likelier than.
        """
        likelihood = np.exp(np.maximum(self.logs, LOWEST))
        sds = _sds(dispersion.known, _rung(dispersion.uneven), least_spread)
        cells = [np.array([_cells(self.points, point, sd) for point in self.points]) @ likelihood for sd in sds]
        each = _priors(dispersion)[3] @ np.array(cells)
        mixture = float(_cells(self.points, 0.0, 1.0) @ each)
        inside = np.flatnonzero(each >= min(mixture * alpha, each.max()))
        low, high = max(int(inside[0]) - 1, 0), min(int(inside[-1]) + 1, len(self.points) - 1)
        return float(self.ratios[low]), float(self.ratios[high])


def _priors(dispersion: Dispersion) -> np.ndarray:
    """Of each hypothesis, the prior of each spread times the likelihood that the dispersion in the arms gives it."""
    if not dispersion.known:
        return np.ones((4, 1))
    # Each arm's Q is chi-squared with df degrees of freedom, scaled by 1 + tau^2 information / df.
    q, df, information = np.array((dispersion.q, dispersion.df, dispersion.information))[:, :, None]
    scale = 1 + SQUARES * (information / df)
    logs = -0.5 * (df * np.log(scale) + q / scale).sum(axis=0)
    return PRIORS[sum(dispersion.df) < FEW] * np.exp(logs - logs.max())
