"""Resampling tests of a paired gain: bootstrap and permutation, of clusters or, without any, of rows.

The bootstrap gives a standard error, used with t on clusters - 1 degrees: percentiles of a bootstrap over few clusters
are too narrow. The permutation exchanges the arms, cluster by cluster, and counts how often the gain grows as large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from airflow_mlops.evaluation.metrics import Floats, row_loss
from airflow_mlops.evaluation.objective import Objective
from airflow_mlops.evaluation.paired import (
    Gain,
    NonparametricGain,
    auc_gain_bootstrap,
    cluster_codes,
    t_gain,
)
from airflow_mlops.exceptions import InvalidInputError

#: Up to here the table of pairs of clusters is small, and a resample of it costs next to nothing.
MAX_TABLE = 400
#: Up to here clusters are drawn with replacement; beyond, each counts twice or not at all, at a bit each.
MAX_DRAWN = 10_000
#: Up to here all exchanges of arms are counted instead of sampled.
MAX_EXACT = 12
#: Share of resamples that may lack what the metric needs.
MAX_LOST = 0.05


def weights(rng: np.random.Generator, count: int, replicates: int) -> Iterator[npt.NDArray[Any]]:
    """How often each of ``count`` units is in each resample; mean 1 and variance 1, shape (count,).

    Drawn with replacement (multinomial), or, when there are many, each unit twice or never with equal probability,
    which costs one random bit and has the same variance: the double-or-nothing bootstrap of Owen and Eckles, Annals
    of Applied Statistics 2012, here as 0 and 1, since every statistic divides by the sum of the weights.
    """
    for _ in range(replicates):
        if count <= MAX_DRAWN:
            yield np.bincount(rng.integers(0, count, count), minlength=count).astype(np.int32)
        else:
            yield np.unpackbits(np.frombuffer(rng.bytes(-(-count // 8)), np.uint8), count=count)


class WeightedAuc:
    """The AUC of one arm under integer weights of the rows, in linear time after one sort; ties count half."""

    def __init__(self, label: Any, score: Floats) -> None:
        order = np.argsort(score, kind="stable").astype(np.int32)
        positive = np.asarray(label)[order] == 1
        ranked = score[order]
        begins = np.append(True, ranked[1:] != ranked[:-1])
        self._order = order
        self._high = np.flatnonzero(positive).astype(np.int32)
        self._low = (~positive).astype(np.uint8)
        self._before = self._after = self._high
        if not begins.all():
            edges = np.append(np.flatnonzero(begins), len(order)).astype(np.int32)
            tied = np.cumsum(begins)[self._high]
            self._before, self._after = edges[tied - 1], edges[tied]

    def __call__(self, weight: npt.NDArray[Any]) -> float:
        """NaN when a class has no weight."""
        drawn = weight[self._order]
        below = np.zeros(len(drawn) + 1, dtype=np.int32)
        np.cumsum(drawn * self._low, dtype=np.int32, out=below[1:])
        high = drawn[self._high].astype(np.int64)
        pairs = int(high.sum()) * int(below[-1])
        if not pairs:
            return math.nan
        if self._before is self._after:
            return float((below[self._before] * high).sum() / pairs)
        return float(((below[self._before].astype(np.int64) + below[self._after]) * high).sum() / (2 * pairs))


def auc_bootstrap(
    label: Any,
    champion: Floats,
    challenger: Floats,
    clusters: Any = None,
    alpha: float = 0.05,
    replicates: int = 2000,
    rng: np.random.Generator | None = None,
) -> Gain:
    """The gain in AUC with the standard error of a bootstrap over clusters, or over rows without any.

    Time grows linearly in rows and replicates, memory in rows only.
    """
    rng = rng or np.random.default_rng(0)
    codes, count = cluster_codes(clusters, len(champion))
    if count <= MAX_TABLE:
        found = auc_gain_bootstrap(label, champion, challenger, codes, replicates, alpha, rng)
        return _with_t(found.estimate, found.standard_error, "auc", count, alpha, clusters)
    # Rows by the champion's score: one of the two orders then costs no random access.
    order = np.argsort(champion, kind="stable")
    y, codes = np.asarray(label)[order], codes[order]
    new, old = WeightedAuc(y, challenger[order]), WeightedAuc(y, champion[order])
    every = np.ones(len(y), dtype=np.uint8)
    gains = np.empty(replicates)
    for i, weight in enumerate(weights(rng, count, replicates)):
        rows = weight if clusters is None else weight[codes]
        gains[i] = new(rows) - old(rows)
    return _with_t(new(every) - old(every), _spread(gains, "auc"), "auc", count, alpha, clusters)


def mean_bootstrap(
    metric: str,
    label: Any,
    champion: Floats,
    challenger: Floats,
    clusters: Any = None,
    alpha: float = 0.05,
    threshold: float = 0.5,
    replicates: int = 2000,
    rng: np.random.Generator | None = None,
) -> Gain:
    """The reduction of a mean loss, or the gain in accuracy, with the standard error of a bootstrap."""
    rng = rng or np.random.default_rng(0)
    sums, sizes, count = _cluster_sums(metric, label, champion, challenger, clusters, threshold)
    gains = np.array(
        [float(weight @ sums) / max(float(weight @ sizes), 1.0) for weight in weights(rng, count, replicates)]
    )
    return _with_t(float(sums.sum() / sizes.sum()), _spread(gains, metric), metric, count, alpha, clusters)


def mean_permutation(
    metric: str,
    label: Any,
    champion: Floats,
    challenger: Floats,
    clusters: Any = None,
    alpha: float = 0.05,
    threshold: float = 0.5,
    replicates: int = 2000,
    rng: np.random.Generator | None = None,
) -> Gain:
    """The reduction of a mean loss, or the gain in accuracy, tested by flipping the sign of whole clusters.

    Against a margin the rows' gains are shifted by it first. Exact when the clusters' sums are symmetric around the
    bound, as they are for arms that can be exchanged; else as close as the central limit theorem. The interval is the
    bootstrap's.
    """
    rng = rng or np.random.default_rng(0)
    sums, sizes, count = _cluster_sums(metric, label, champion, challenger, clusters, threshold)
    shown = mean_bootstrap(metric, label, champion, challenger, clusters, alpha, threshold, replicates, rng)
    seed = int(rng.integers(2**32))

    def test(bound: float) -> float:
        shifted = sums - bound * sizes
        total = float(shifted.sum())
        return _tail(total, lambda flip: total - 2 * float(flip @ shifted), count, replicates, seed)

    return _permuted(shown, test, count)


def bootstrap(
    metric: Objective,
    label: Any,
    champion: Floats,
    challenger: Floats,
    clusters: Any = None,
    alpha: float = 0.05,
    replicates: int = 2000,
    rng: np.random.Generator | None = None,
) -> Gain:
    """The gain in any metric with the standard error of a bootstrap over clusters, or over rows without any.

    :raises InvalidInputError: the metric cannot be computed on more than one resample in 20
    """
    rng = rng or np.random.default_rng(0)
    y = np.asarray(label)
    codes, count = cluster_codes(clusters, len(champion))
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(count + 1))
    gains = np.empty(replicates)
    for i in range(replicates):
        drawn = rng.integers(0, count, count)
        rows = drawn if clusters is None else np.concatenate([order[bounds[g] : bounds[g + 1]] for g in drawn])
        gains[i] = metric.gain(y[rows], champion[rows], challenger[rows])
    return _with_t(
        metric.gain(y, champion, challenger), _spread(gains, metric.name), metric.name, count, alpha, clusters
    )


def permutation(
    metric: Objective,
    label: Any,
    champion: Floats,
    challenger: Floats,
    clusters: Any = None,
    alpha: float = 0.05,
    replicates: int = 2000,
    rng: np.random.Generator | None = None,
) -> Gain:
    """The gain in any metric, tested by exchanging the arms within whole clusters.

    Tests that the arms can be exchanged, against a gain above 0; other bounds have no such test. What is exchanged are
    the probabilities, so that both arms have to be on one scale. The interval is the bootstrap's.
    """
    rng = rng or np.random.default_rng(0)
    y = np.asarray(label)
    shown = bootstrap(metric, y, champion, challenger, clusters, alpha, replicates, rng)
    codes, count = cluster_codes(clusters, len(champion))
    seed = int(rng.integers(2**32))

    def exchanged(flip: npt.NDArray[Any]) -> float:
        swap = flip[codes] == 1
        return metric.gain(y, np.where(swap, challenger, champion), np.where(swap, champion, challenger))

    def test(bound: float) -> float:
        if bound:
            raise InvalidInputError(f"a permutation cannot test a margin in {metric.name}; use method='bootstrap'")
        return _tail(shown.estimate, exchanged, count, replicates, seed)

    return _permuted(shown, test, count)


def _tail(
    found: float, exchanged: Callable[[npt.NDArray[Any]], float], count: int, replicates: int, seed: int
) -> float:
    """The share of exchanges that gain at least ``found``, the one that was seen among them.

    Phipson and Smyth, Statistical Applications in Genetics and Molecular Biology 2010: never 0 from a sample.
    """
    if count <= MAX_EXACT:
        flips = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        values = np.array([exchanged(flip) for flip in flips])
        seen = 0
    else:
        rng = np.random.default_rng(seed)
        values = np.empty(replicates)
        for i in range(replicates):
            bits = np.frombuffer(rng.bytes(-(-count // 8)), np.uint8)
            values[i] = exchanged(np.unpackbits(bits, count=count))
        seen = 1
    # Equal sums in another order differ by rounding; what cannot be computed counts against the challenger.
    slack = 1e-9 * max(abs(found), float(np.nanmax(np.abs(values), initial=0.0)))
    extreme = int((~(values < found - slack)).sum())
    return (extreme + seen) / (len(values) + seen)


def _permuted(shown: Gain, test: Callable[[float], float], count: int) -> Gain:
    unit = "all exchanges" if count <= MAX_EXACT else "exchanges"
    return NonparametricGain(
        metric=shown.metric,
        method=f"permutation, {unit}; interval of the {shown.method}",
        estimate=shown.estimate,
        standard_error=shown.standard_error,
        degrees=shown.degrees,
        interval=shown.interval,
        confidence=shown.confidence,
        test=test,
    )


def _cluster_sums(
    metric: str, label: Any, champion: Floats, challenger: Floats, clusters: Any, threshold: float
) -> tuple[Floats, Floats, int]:
    codes, count = cluster_codes(clusters, len(champion))
    gain = row_loss(metric, label, champion, threshold) - row_loss(metric, label, challenger, threshold)
    if clusters is None:
        return gain, np.ones(count), count
    sums, sizes = np.bincount(codes, gain, count), np.bincount(codes, minlength=count)
    return sums.astype(np.float64), sizes.astype(np.float64), count


def _spread(gains: Floats, metric: str) -> float:
    known = gains[np.isfinite(gains)]
    if len(known) < (1 - MAX_LOST) * len(gains):
        raise InvalidInputError(
            f"{metric} cannot be computed on {len(gains) - len(known)} of {len(gains)} resamples of these rows; are "
            "there rows of both classes in more than a few clusters?"
        )
    return float(known.std(ddof=1))


def _with_t(estimate: float, error: float, metric: str, count: int, alpha: float, clusters: Any) -> Gain:
    method = "bootstrap" if clusters is None else "cluster bootstrap"
    # A resample of few units varies less than a new sample, by (count - 1) / count.
    return replace(t_gain(metric, method, estimate, error * math.sqrt(count / (count - 1)), count - 1, alpha))
