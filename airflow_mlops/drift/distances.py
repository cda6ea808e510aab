"""Distances between two profiles of one column, their value without drift, and their significance.

Every distance is computed from counts. ``raw`` is the distance itself, as Evidently computes it from the rows;
``effect`` is what is left of it when the part that two samples of one distribution show on average is taken off,
so that small windows and columns with many categories do not look drifted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from airflow_mlops.drift.categories import SAMPLE, Categories
from airflow_mlops.drift.histogram import Histogram, edges
from airflow_mlops.drift.profile import Column

_PSI_FLOOR = 1e-4
# Cochran's rule for the chi-squared approximation.
_MIN_EXPECTED = 5


@dataclass(frozen=True)
class Distance:
    """How far the current values of a column are from the reference's.

    :param method: ``wasserstein`` (in standard deviations of the reference) or ``jensenshannon`` (square root of
        the divergence in nats, 0 to 0.83)
    :param raw: the distance between the two samples
    :param effect: ``raw`` less what sampling alone is expected to give, not below 0
    :param psi: population stability index (numeric: over the reference's deciles)
    :param p_value: of no change: Kolmogorov-Smirnov for numbers, two-sample chi-squared for categories
    :param unseen: share of current values in categories that the reference never had, beyond what sampling
        explains; 0 for numbers
    """

    method: str
    raw: float
    effect: float
    psi: float
    p_value: float
    unseen: float = 0.0


def numeric(reference: Column, current: Column) -> Distance:
    """The normalised Wasserstein-1 distance and the Kolmogorov-Smirnov test, from two histograms.

    Without drift, the expected W1 of samples of n and m values is ``sqrt(2/pi) * integral sqrt(F(1-F)) *
    sqrt(1/n + 1/m)`` (the mean of the Brownian bridge's absolute value; del Barrio, Gine, Matran, 1999).

    :param reference: numeric column with at least one finite value
    :param current: the same
    """
    assert isinstance(reference.minimum, float) and isinstance(reference.maximum, float)
    assert isinstance(current.minimum, float) and isinstance(current.maximum, float)
    lowest, highest = min(reference.minimum, current.minimum), max(reference.maximum, current.maximum)
    n, m = reference.count, current.count
    keys, a, b, shift = _align(reference.histogram, current.histogram)
    low, high = edges(keys, shift, lowest, highest)
    with np.errstate(over="ignore"):
        scale = _spread(reference, current)
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
    p_value = float(stats.kstwobign.sf(np.abs(difference).max() * np.sqrt(n * m / (n + m))))
    return Distance(
        "wasserstein", distance, float(np.sqrt(max(distance**2 - noise**2, 0.0))), _psi_numeric(a, b), p_value
    )


def categorical(reference: Column, current: Column) -> Distance:
    """The Jensen-Shannon distance and the two-sample chi-squared test, from two sets of counts.

    The reference is a sample too, so the test has a cell for each side; categories too rare for the chi-squared
    approximation (fewer than 5 expected on the smaller side) are pooled; a pool that is still too rare is judged
    against the rest by Fisher's exact test, and the two p-values combined after Bonferroni. The divergence expected
    without drift is that of splitting each category's values over the two sides at random.
    """
    a, b, unseen = _cells(reference.categories, current.categories)
    n, m = a.sum(), b.sum()
    p, q = a / n, b / m
    divergence = float(np.sum(_js_terms(p, q)))
    debiased = max(divergence - _js_noise(a + b, int(n), int(m)), 0.0)
    return Distance(
        "jensenshannon", float(np.sqrt(max(divergence, 0.0))), float(np.sqrt(debiased)), _psi(p, q), _chi2(a, b), unseen
    )


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


def _psi_numeric(a: np.ndarray, b: np.ndarray) -> float:
    ranks = np.minimum((np.cumsum(a) - a / 2) / a.sum() * 10, 9.999).astype(int)
    return _psi(np.bincount(ranks, a, 10) / a.sum(), np.bincount(ranks, b, 10) / b.sum())


def _psi(p: np.ndarray, q: np.ndarray) -> float:
    p, q = np.maximum(p, _PSI_FLOOR), np.maximum(q, _PSI_FLOOR)
    return float(np.sum((q - p) * np.log(q / p)))


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


def _js_noise(totals: np.ndarray, n: int, m: int) -> float:
    """The divergence expected when the ``totals`` are split at random over samples of ``n`` and ``m``."""
    noise = 0.0
    sizes, occurrences = np.unique(totals.astype(np.int64), return_counts=True)
    for size, occurrence in zip(sizes.tolist(), occurrences.tolist()):
        if size > 200:
            noise += occurrence * (1 - size / (n + m)) * (1 / n + 1 / m) / 8
            continue
        left = np.arange(size + 1)
        weights = stats.binom.pmf(left, size, n / (n + m))
        noise += occurrence * float(np.sum(weights * _js_terms(left / n, (size - left) / m)))
    return noise


def _chi2(a: np.ndarray, b: np.ndarray) -> float:
    """The p-value that both sets of counts come from one distribution."""
    smaller = min(a.sum(), b.sum()) / (a.sum() + b.sum())
    rare = (a + b) * smaller < _MIN_EXPECTED
    if not rare.any():
        return _pearson(a, b)
    pool = np.array([a[rare].sum(), b[rare].sum()])
    a, b = a[~rare], b[~rare]
    if pool.sum() * smaller >= _MIN_EXPECTED:
        return _pearson(np.r_[a, pool[0]], np.r_[b, pool[1]])
    exact = float(stats.fisher_exact([[pool[0], a.sum()], [pool[1], b.sum()]]).pvalue)
    return min(2 * min(exact, _pearson(a, b)), 1.0) if len(a) > 1 else exact


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    totals = a + b
    if len(totals) < 2:
        return 1.0
    share = a.sum() / totals.sum()
    statistic = np.sum((a - totals * share) ** 2 / (totals * share * (1 - share)))
    return float(stats.chi2.sf(statistic, len(totals) - 1))
