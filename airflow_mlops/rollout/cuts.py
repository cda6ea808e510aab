"""Histograms cut at a few of their own edges, which are fixed once from what stable had served before."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CALIBRATION_REQUESTS = 100
COARSE = 1.5
GROUPS = 10


def total_histogram(replicas: Iterable[Mapping[str, Any]], metric: str) -> tuple[list[float], list[int]] | None:
    """Edges and summed counts of an arm, from its first replica's edges; ``None`` when it has too few values."""
    edges: list[float] | None = None
    counts: list[int] = []
    for counters in replicas:
        histogram = (counters.get("histograms") or {}).get(metric)
        if not histogram:
            continue
        if edges is None:
            edges, counts = list(histogram["edges"]), [0] * len(histogram["counts"])
        if list(histogram["edges"]) == edges:
            counts = [a + b for a, b in zip(counts, histogram["counts"])]
    return (edges, counts) if edges and sum(counts) >= CALIBRATION_REQUESTS else None


def slow_edge(edges: Sequence[float], counts: Sequence[int], quantile: float, factor: float) -> tuple[float, str]:
    """The edge beyond which a request counts as slow: the first at or above ``factor`` times the quantile.

    :return: the edge, and a remark when the histogram cannot tell what was asked for
    """
    seen, at, total = 0, math.inf, sum(counts)
    for edge, count in zip(edges, counts):
        seen += count
        if seen >= quantile * total:
            at = edge
            break
    # The last bucket has no upper edge: nothing can then be called slower than stable.
    wanted = min(factor * at, edges[-1])
    chosen = next(edge for edge in edges if edge >= wanted)
    if not math.isfinite(at):
        return (
            chosen,
            f"stable's {quantile:g} quantile is beyond the last edge, {edges[-1]:g} s: the edges are too coarse",
        )
    if chosen > COARSE * wanted or (factor * at > edges[-1]):
        return (
            chosen,
            f"slow should mean {factor * at:.4g} s, the nearest edge is {chosen:g} s: the edges are too coarse",
        )
    return chosen, ""


def group_edges(edges: Sequence[float], counts: Sequence[int], groups: int = GROUPS) -> list[float]:
    """At most ``groups - 1`` of the edges, between which stable's values are about as many each."""
    total, seen = sum(counts), 0
    chosen: list[float] = []
    for edge, count in zip(edges, counts):
        seen += count
        if seen >= (len(chosen) + 1) * total / groups and seen < total:
            chosen.append(edge)
            while len(chosen) < groups and seen >= (len(chosen) + 1) * total / groups:
                groups -= 1
        if len(chosen) >= groups - 1:
            break
    return chosen


def cut(counters: Mapping[str, Any], metric: str, edges: Sequence[float]) -> list[float] | None:
    """Counts between the ``edges`` of one replica's histogram; ``None`` when it has none, or lacks one of the edges."""
    histogram = (counters.get("histograms") or {}).get(metric)
    if not histogram:
        return None
    own, counts, ends = histogram["edges"], histogram["counts"], [0]
    for edge in edges:
        index = bisect.bisect_left(own, edge * (1 - 1e-9))
        if index == len(own) or own[index] > edge * (1 + 1e-9) + 1e-12:
            return None
        ends.append(index + 1)
    ends.append(len(counts))
    return [sum(counts[a:b]) for a, b in itertools.pairwise(ends)]
