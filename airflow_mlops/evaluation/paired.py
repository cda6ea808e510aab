"""The advantage of one forecast over another on the same rows, with honest uncertainty.

Rows of one day share weather, and so on: they are not independent. Each test takes a cluster for each row and treats
clusters, not rows, as the independent units. A *gain* is positive when the challenger is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from airflow_mlops.evaluation.metrics import Floats, row_loss

Codes = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Gain:
    """An estimated gain of the challenger over the champion.

    :param metric: of what
    :param method: how its error was estimated
    :param estimate: the gain, in units of the metric
    :param standard_error: of the estimate
    :param degrees: of freedom of its t distribution
    :param interval: two-sided, covering with probability ``confidence``
    """

    metric: str
    method: str
    estimate: float
    standard_error: float
    degrees: int
    interval: tuple[float, float]
    confidence: float

    def p_value(self, bound: float) -> float:
        """One-sided p-value of the hypothesis that the true gain is at most ``bound``."""
        distance = self.estimate - bound
        if self.standard_error == 0:
            return 0.0 if distance > 0 else 1.0
        return float(stats.t.sf(distance / self.standard_error, self.degrees))

    def p_worse(self, bound: float) -> float:
        """One-sided p-value of the hypothesis that the true gain is at least ``bound``."""
        distance = self.estimate - bound
        if self.standard_error == 0:
            return 0.0 if distance < 0 else 1.0
        return float(stats.t.cdf(distance / self.standard_error, self.degrees))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {entry.name: getattr(self, entry.name) for entry in fields(Gain)} | {"interval": list(self.interval)}


@dataclass(frozen=True)
class NonparametricGain(Gain):
    """A gain whose p-value is not that of a t distribution.

    :param test: one-sided p-value of the hypothesis that the true gain is at most the bound it is given
    """

    test: Callable[[float], float] = field(default=lambda bound: 1.0, repr=False, compare=False)

    def p_value(self, bound: float) -> float:
        """One-sided p-value of the hypothesis that the true gain is at most ``bound``."""
        return self.test(bound)


def cluster_codes(clusters: npt.ArrayLike | None, rows: int) -> tuple[Codes, int]:
    """Clusters as 0, 1, ..., and how many there are; each row is its own when ``clusters`` is None."""
    if clusters is None:
        return np.arange(rows), rows
    names, codes = np.unique(np.asarray(clusters), return_inverse=True)
    return codes, len(names)


def t_gain(metric: str, method: str, estimate: float, error: float, degrees: int, alpha: float) -> Gain:
    """A gain whose error follows a t distribution."""
    half = float(stats.t.ppf(1 - alpha, degrees)) * error
    return Gain(metric, method, estimate, error, degrees, (estimate - half, estimate + half), 1 - 2 * alpha)


def loss_gain(
    metric: str,
    label: Any,
    champion: Floats,
    challenger: Floats,
    clusters: Any = None,
    alpha: float = 0.05,
    threshold: float = 0.5,
) -> Gain:
    """The reduction of the mean loss, with the cluster-robust error of a mean (CR1) and t on clusters - 1 degrees.

    Liang and Zeger, Biometrika 1986; the degrees of freedom after Cameron and Miller, J. Human Resources 2015.
    """
    codes, count = cluster_codes(clusters, len(champion))
    gain = row_loss(metric, label, champion, threshold) - row_loss(metric, label, challenger, threshold)
    mean = float(gain.mean())
    sums = np.bincount(codes, weights=gain - mean, minlength=count)
    error = math.sqrt(count / (count - 1) * float((sums**2).sum())) / len(gain)
    return t_gain(metric, "clustered t", mean, error, count - 1, alpha)


def _placements(label: Any, score: Floats) -> tuple[Floats, Floats]:
    """Share of negatives below each positive, and of positives above each negative; ties count half."""
    positive = np.asarray(label) == 1
    high, low = score[positive], score[~positive]
    low_sorted, high_sorted = np.sort(low), np.sort(high)
    below = (np.searchsorted(low_sorted, high, "left") + np.searchsorted(low_sorted, high, "right")) / (2 * len(low))
    above = 1 - (np.searchsorted(high_sorted, low, "left") + np.searchsorted(high_sorted, low, "right")) / (
        2 * len(high)
    )
    return below, above


def auc_gain(label: Any, champion: Floats, challenger: Floats, clusters: Any = None, alpha: float = 0.05) -> Gain:
    """The gain in AUC from placement values; both classes must be present.

    Without clusters: DeLong, DeLong and Clarke-Pearson, Biometrics 1988, in O(n log n). With clusters: the same
    placement values summed by cluster, after Obuchowski, Biometrics 1997, and t on clusters - 1 degrees.
    """
    positive = np.asarray(label) == 1
    (below, above), (below_champion, above_champion) = (_placements(label, p) for p in (challenger, champion))
    below, above = below - below_champion, above - above_champion
    gain = float(below.mean())
    m, n = len(below), len(above)
    if clusters is None:
        variance = (below.var(ddof=1) / m if m > 1 else 0.0) + (above.var(ddof=1) / n if n > 1 else 0.0)
        return t_gain("auc", "DeLong", gain, math.sqrt(variance), m + n - 1, alpha)
    codes, count = cluster_codes(clusters, len(positive))
    sums = np.bincount(codes[positive], weights=below - gain, minlength=count) / m
    sums += np.bincount(codes[~positive], weights=above - gain, minlength=count) / n
    error = math.sqrt(count / (count - 1) * float((sums**2).sum()))
    return t_gain("auc", "clustered DeLong", gain, error, count - 1, alpha)


def concordance(label: Any, score: Floats, codes: Codes, count: int) -> Floats:
    """(count, count): pairs of a positive in cluster g and a negative in cluster h that are in order, ties half."""
    positive = np.asarray(label) == 1
    high, own = score[positive], codes[positive]
    table = np.zeros((count, count))
    low, owner = score[~positive], codes[~positive]
    for cluster in range(count):
        sample = np.sort(low[owner == cluster])
        ordered = (np.searchsorted(sample, high, "left") + np.searchsorted(sample, high, "right")) / 2
        table[:, cluster] = np.bincount(own, weights=ordered, minlength=count)
    return table


def auc_gain_bootstrap(
    label: Any,
    champion: Floats,
    challenger: Floats,
    clusters: Any,
    replicates: int = 2000,
    alpha: float = 0.05,
    rng: np.random.Generator | None = None,
) -> Gain:
    """The gain in AUC with a bootstrap over whole clusters, percentile interval.

    The concordant pairs are counted once for each pair of clusters; a resample then is a quadratic form in how
    often each cluster was drawn, so that thousands of resamples of millions of rows cost one matrix product. Resamples
    without a row of either class are left out. With few clusters its interval is too narrow: evidence beside
    :func:`auc_gain`, not the test.
    """
    rng = rng or np.random.default_rng(0)
    codes, count = cluster_codes(clusters, len(champion))
    positive = np.asarray(label) == 1
    highs = np.bincount(codes[positive], minlength=count).astype(np.float64)
    lows = np.bincount(codes[~positive], minlength=count).astype(np.float64)
    table = concordance(label, challenger, codes, count) - concordance(label, champion, codes, count)
    estimate = float(table.sum() / (highs.sum() * lows.sum()))
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=replicates).astype(np.float64)
    pairs = (drawn @ highs) * (drawn @ lows)
    gains = ((drawn @ table) * drawn).sum(axis=1)[pairs > 0] / pairs[pairs > 0]
    low, high = np.quantile(gains, [alpha, 1 - alpha])
    error = float(gains.std(ddof=1))
    return Gain("auc", "cluster bootstrap", estimate, error, count - 1, (float(low), float(high)), 1 - 2 * alpha)


def holm(p_values: npt.ArrayLike) -> Floats:
    """p-values adjusted for their number, so that the chance of any false rejection stays at the stated level.

    Holm, Scandinavian Journal of Statistics 1979.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted
