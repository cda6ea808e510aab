"""Distances between two profiles of one column, their value without drift, and their significance.

Every distance is computed from counts. ``raw`` is the distance between the two samples; ``effect`` is what is left of
it when the part that two samples of one distribution show on average is taken off, so that small windows and columns
with many categories do not look drifted.

``wasserstein`` (numbers)
    W1 divided by the reference's standard deviation; significance by Kolmogorov and Smirnov. Evidently's.
``js`` (categories; numbers on request)
    Jensen-Shannon distance: square root of the divergence in nats, 0 to 0.83; significance by the two-sample
    chi-squared test. Evidently's on categories.
``psi`` (on request)
    population stability index, ``sum (q - p) ln(q / p)``, shares below 1e-4 taken for 1e-4; chi-squared. Evidently's on
    categories of which none is empty or rarer than that.
``ks`` (numbers, on request)
    the Kolmogorov-Smirnov statistic, the largest gap between the two distribution functions, and its test with the
    asymptotic p-value. ``scipy.stats.ks_2samp``'s, whose p-value is what Evidently calls the distance.

``js`` and ``psi`` of numbers are over 20 bins that hold a twentieth of the reference each. Evidently cuts the range of
both samples into bins of equal width instead, so that a single outlier puts all else into one bin and hides any drift.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from airflow_mlops.drift.categories import SAMPLE, Categories
from airflow_mlops.drift.column import Column
from airflow_mlops.drift.histogram import Histogram, edges

#: The methods of each kind of column, its default first.
METHODS = {"numeric": ("wasserstein", "js", "psi", "ks"), "categorical": ("js", "psi")}
_BINS = 20
_PSI_FLOOR = 1e-4
# Cochran's rule for the chi-squared approximation.
_MIN_EXPECTED = 5
# Values expected on the smaller side from which on the expansion of a cell's noise is as good as its exact sum.
_EXPANDED = 50
# Counts that so many expected ones stay below: more than ten deviations above do not happen.
_TAIL = 128


@dataclass(frozen=True)
class Distance:
    """How far the current values of a column are from the reference's.

    :param method: ``wasserstein``, ``jensenshannon``, ``psi`` or ``ks``
    :param raw: the distance between the two samples
    :param effect: ``raw`` less what sampling alone is expected to give, not below 0
    :param psi: population stability index
    :param p_value: of no change
    :param unseen: share of current values in categories that the reference never had, beyond what sampling
        explains; 0 for numbers
    """

    method: str
    raw: float
    effect: float
    psi: float
    p_value: float
    unseen: float = 0.0


def between(reference: Column, current: Column, method: str | None = None, scale: float | None = None) -> Distance:
    """The distance of two columns of one kind, both with at least one value.

    :param method: one of :data:`METHODS` of that kind; the first of them when not given
    :param scale: see :func:`numeric`
    """
    if reference.kind == "numeric":
        return numeric(reference, current, method or "wasserstein", scale)
    return categorical(reference, current, method or "js")


def numeric(reference: Column, current: Column, method: str = "wasserstein", scale: float | None = None) -> Distance:
    """The distance between two histograms.

    Without drift, the expected W1 of samples of n and m values is ``sqrt(2/pi) * integral sqrt(F(1-F)) *
    sqrt(1/n + 1/m)`` (the mean of the Brownian bridge's absolute value; del Barrio, Gine, Matran, 1999), and the
    expected Kolmogorov-Smirnov statistic ``sqrt(pi/2) ln 2 * sqrt(1/n + 1/m)`` (the mean of its supremum).

    :param reference: numeric column with at least one finite value
    :param current: the same
    :param method: ``wasserstein``, ``js``, ``psi`` or ``ks``
    :param scale: what the Wasserstein distance is divided by; the reference's standard deviation when not given
    """
    keys, a, b, shift = _align(reference.histogram, current.histogram)
    n, m = reference.count, current.count
    binned = _bin(a, b)
    if method in ("js", "psi"):
        return _over_cells(*binned, method)
    psi = _psi(binned[0] / n, binned[1] / m)
    gap = float(np.abs(np.cumsum(a) / n - np.cumsum(b) / m).max())
    p_value = float(stats.kstwobign.sf(gap * np.sqrt(n * m / (n + m))))
    if method == "ks":
        noise = np.sqrt(np.pi / 2) * np.log(2) * np.sqrt(1 / n + 1 / m)
        return Distance("ks", gap, float(np.sqrt(max(gap**2 - noise**2, 0.0))), psi, p_value)
    distance, noise = _wasserstein(reference, current, keys, a, b, shift, scale)
    return Distance("wasserstein", distance, float(np.sqrt(max(distance**2 - noise**2, 0.0))), psi, p_value)


def categorical(reference: Column, current: Column, method: str = "js") -> Distance:
    """The distance between two sets of counts, ``js`` or ``psi``.

    The reference is a sample too, so the test has a cell for each side; categories too rare for the chi-squared
    approximation (fewer than 5 expected on the smaller side) are put together until there are enough; a single group
    that is still too rare is judged against the rest by Fisher's exact test, and the two p-values combined after
    Bonferroni. The divergence expected without drift is that of splitting each category's values over the two sides
    at random.
    """
    a, b, unseen = _cells(reference.categories, current.categories)
    return _over_cells(a, b, method, unseen)


def _over_cells(a: np.ndarray, b: np.ndarray, method: str, unseen: float = 0.0) -> Distance:
    n, m = int(a.sum()), int(b.sum())
    p, q = a / n, b / m
    terms, curvature = (_js_terms, 1 / 8) if method == "js" else (_psi_terms, 1.0)
    total = max(float(np.sum(terms(p, q))), 0.0)
    rest = max(total - _noise(a + b, n, m, terms, curvature), 0.0)
    if method == "js":
        return Distance("jensenshannon", float(np.sqrt(total)), float(np.sqrt(rest)), _psi(p, q), _chi2(a, b), unseen)
    return Distance("psi", total, rest, total, _chi2(a, b), unseen)


def _wasserstein(
    reference: Column,
    current: Column,
    keys: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    shift: int,
    scale: float | None,
) -> tuple[float, float]:
    """The normalised W1 distance and its expectation without drift."""
    assert isinstance(reference.minimum, float) and isinstance(reference.maximum, float)
    assert isinstance(current.minimum, float) and isinstance(current.maximum, float)
    lowest, highest = min(reference.minimum, current.minimum), max(reference.maximum, current.maximum)
    n, m = reference.count, current.count
    low, high = edges(keys, shift, lowest, highest)
    with np.errstate(over="ignore"):
        scale = scale or _spread(reference, current)
        # Scaled first: the integral of huge values would overflow.
        width, gap = (high / scale - low / scale), (low[1:] / scale - high[:-1] / scale)
    pooled = np.cumsum(a + b) / (n + m)
    difference = np.cumsum(a) / n - np.cumsum(b) / m
    before = np.r_[0.0, difference[:-1]]
    distance = float(np.sum(_integral_of_absolute_line(before, difference) * width))
    distance += float(np.sum(np.abs(difference[:-1]) * gap))
    spread = np.sqrt(np.clip(pooled * (1 - pooled), 0, None))
    middle = (np.r_[0.0, spread[:-1]] + spread) / 2
    noise = float(np.sum(middle * width) + np.sum(spread[:-1] * gap)) * np.sqrt(2 / np.pi * (1 / n + 1 / m))
    return distance, noise


def _align(first: Histogram, second: Histogram) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Both counts over the union of the two histograms' bins, at the coarser one's resolution."""
    shift = max(first.shift, second.shift)
    first, second = first.coarser(shift), second.coarser(shift)
    keys = np.union1d(first.keys, second.keys)
    a, b = np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64)
    a[np.searchsorted(keys, first.keys)] = first.counts
    b[np.searchsorted(keys, second.keys)] = second.counts
    return keys, a, b, shift


def _spread(reference: Column, current: Column) -> float:
    """The reference's standard deviation; of a constant reference, that of both together."""
    if reference.std:
        return reference.std
    both = Column("numeric", "")
    both.merge(reference)
    both.merge(current)
    return both.std or 1.0


def _integral_of_absolute_line(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The integral over [0, 1] of the absolute value of the line from ``start`` to ``end``."""
    total = np.abs(start) + np.abs(end)
    with np.errstate(invalid="ignore", divide="ignore"):
        crossing = (start**2 + end**2) / (2 * total)
    return np.where(start * end >= 0, total / 2, crossing)


def _bin(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both counts over bins that hold equal shares of ``a``."""
    ranks = np.minimum((np.cumsum(a) - a / 2) / a.sum() * _BINS, _BINS - 1e-3).astype(int)
    return np.bincount(ranks, a, _BINS), np.bincount(ranks, b, _BINS)


def _psi(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.sum(_psi_terms(p, q)))


def _psi_terms(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    p, q = np.maximum(p, _PSI_FLOOR), np.maximum(q, _PSI_FLOOR)
    return (q - p) * np.log(q / p)


def _cells(reference: Categories, current: Categories) -> tuple[np.ndarray, np.ndarray, float]:
    """Both sides' counts cell by cell, and the share of current values that the reference never had."""
    if not reference.hashed and not current.hashed:
        cells = sorted(set(reference.names) | set(current.names))
        a = np.array([reference.names.get(cell, 0) for cell in cells], float)
        b = np.array([current.names.get(cell, 0) for cell in cells], float)
        return a, b, _unseen(a, b, by_category=False)
    reference, current = reference.as_hashed(), current.as_hashed()
    buckets = sorted(set(reference.buckets) | set(current.buckets))
    a = np.array([reference.buckets.get(bucket, 0) for bucket in buckets], float)
    b = np.array([current.buckets.get(bucket, 0) for bucket in buckets], float)
    # Only below the smaller of the two limits did both sides keep every category.
    full = [max(side.sample) for side in (reference, current) if len(side.sample) >= SAMPLE]
    limit = min(full, default=1 << 64)
    keys = sorted(key for key in set(reference.sample) | set(current.sample) if key <= limit)
    sampled_a = np.array([reference.sample.get(key, 0) for key in keys], float)
    sampled_b = np.array([current.sample.get(key, 0) for key in keys], float)
    return a, b, _unseen(sampled_a, sampled_b, by_category=True)


def _unseen(a: np.ndarray, b: np.ndarray, *, by_category: bool) -> float:
    """Three standard errors below the share of ``b`` in cells where ``a`` is 0, less the share expected of a sample.

    The expected share is Good and Turing's: that of the reference's own singletons (Good, 1953).

    :param by_category: the cells are a sample of the categories, so each counts as one draw
    """
    if not a.sum() or not b.sum():
        return 1.0 if b.sum() else 0.0
    new, single = b[a == 0], a[a == 1]
    share, expected = new.sum() / b.sum(), single.sum() / a.sum()
    variance = (np.sum(new**2) / b.sum() ** 2 if by_category else share / b.sum()) + single.sum() / a.sum() ** 2
    return float(max(share - expected - 3 * np.sqrt(variance), 0.0))


def _js_terms(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.where(p > 0, p * np.log(p / middle), 0.0)
        right = np.where(q > 0, q * np.log(q / middle), 0.0)
    return (left + right) / 2


def _noise(totals: np.ndarray, n: int, m: int, terms: Callable[..., np.ndarray], curvature: float) -> float:
    """The sum of ``terms`` expected when the ``totals`` are split at random over samples of ``n`` and ``m``.

    :param terms: a cell's part of a divergence, given its two shares
    :param curvature: a cell's part is about ``curvature`` times its squared difference over its share
    """
    sizes, occurrences = np.unique(totals[totals > 0].astype(np.int64), return_counts=True)
    share = min(n, m) / (n + m)
    many = sizes * share > _EXPANDED
    noise = curvature * (1 / n + 1 / m) * float(np.sum((1 - sizes[many] / (n + m)) * occurrences[many]))
    sizes, occurrences = sizes[~many], occurrences[~many]
    if len(sizes):
        small = np.arange(_TAIL)[:, None]
        # The binomial distribution by its recursion: 0 from the first count on that exceeds the size.
        ratios = np.empty((_TAIL, len(sizes)))
        ratios[0] = np.exp(sizes * np.log1p(-share))
        ratios[1:] = (sizes - small[:-1]) / small[1:] * (share / (1 - share))
        weights = np.cumprod(ratios, axis=0)
        large = np.maximum(sizes - small, 0)
        split = (small / n, large / m) if n <= m else (large / n, small / m)
        noise += float(np.sum(weights * terms(*np.broadcast_arrays(*split)) * occurrences))
    return noise


def _chi2(a: np.ndarray, b: np.ndarray) -> float:
    """The p-value that both sets of counts come from one distribution."""
    smaller = min(a.sum(), b.sum()) / (a.sum() + b.sum())
    expected = (a + b) * smaller
    rare = expected < _MIN_EXPECTED
    if not rare.any():
        return _pearson(a, b)
    groups = _group_rare(expected[rare])
    pools = np.array([np.bincount(groups, side[rare]) for side in (a, b)])
    a, b = a[~rare], b[~rare]
    if pools[:, 0].sum() * smaller >= _MIN_EXPECTED:
        return _pearson(np.r_[a, pools[0]], np.r_[b, pools[1]])
    pool = pools[:, 0]
    exact = float(stats.fisher_exact([[pool[0], a.sum()], [pool[1], b.sum()]]).pvalue)
    return min(2 * min(exact, _pearson(a, b)), 1.0) if len(a) > 1 else exact


def _group_rare(expected: np.ndarray) -> np.ndarray:
    """A group for each rare cell, the most frequent first, so that each group has enough expected, or there is one.

    Groups are made by what both sides have together, which says nothing on how it is split.
    """
    groups, group, filled = np.empty(len(expected), int), 0, 0.0
    for cell in np.argsort(-expected, kind="stable"):
        if filled >= _MIN_EXPECTED:
            group, filled = group + 1, 0.0
        groups[cell] = group
        filled += expected[cell]
    if filled < _MIN_EXPECTED and group:
        groups[groups == group] = group - 1
    return groups


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    totals = a + b
    if len(totals) < 2:
        return 1.0
    share = a.sum() / totals.sum()
    statistic = np.sum((a - totals * share) ** 2 / (totals * share * (1 - share)))
    return float(stats.chi2.sf(statistic, len(totals) - 1))
