"""From series to the counters that the judge takes: buckets, moments, and what makes them unusable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from airflow_mlops.rollout.sources.prometheus_api import whole


class Unusable(ValueError):
    """Numbers that are no counters; the message says of what and why. ``permanent``: waiting does not mend it."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


def count_of(value: float, what: str) -> int:
    """A count.

    :raises Unusable: not finite, negative or a fraction
    """
    if not math.isfinite(value):
        raise Unusable(f"{what} is {value}")
    count = whole(value)
    if count is None:
        raise Unusable(f"{what} is {value:g}, which is no count; give a counter, not a rate or a ratio", permanent=True)
    return count


def histogram_of(cumulative: Mapping[str, float], scale: float, what: str) -> dict[str, Any]:
    """Edges in seconds and the count of each bucket, from counts of all that is at most ``le``.

    :raises Unusable: no +Inf bucket, an edge that is no number, or counts that fall
    """
    if set(cumulative) == {""}:
        raise Unusable(f"{what} has no label le; keep it: sum by (le, ...) of the _bucket series", permanent=True)
    try:
        rising = sorted((float(edge), value) for edge, value in cumulative.items())
    except ValueError:
        raise Unusable(f"{what} has the bucket edges {sorted(cumulative)}", permanent=True) from None
    if not rising or rising[-1][0] != math.inf:
        raise Unusable(f"{what} has no bucket le=+Inf; query all of the _bucket series", permanent=True)
    counts = [count_of(value, f"{what}, bucket le={edge:g}") for edge, value in rising]
    each = [b - a for a, b in zip([0, *counts], counts)]
    if min(each) < 0:
        raise Unusable(f"{what} has buckets that fall as le rises; are series of different edges summed up?")
    return {"edges": [float(f"{edge * scale:.12g}") for edge, _ in rising[:-1]], "counts": each}


def squares_bound(edges: Sequence[float], counts: Sequence[int], what: str) -> float:
    """The largest sum of squares that values in these buckets can have, so that no variance is taken for too small.

    Values are taken to be at least 0 when the lowest edge is.

    :raises Unusable: values above the highest edge, or of either sign below the lowest, bound nothing
    """
    if not edges or counts[-1] or (edges[0] < 0 and counts[0]):
        raise Unusable(f"{what} has values outside all finite buckets, so that their variance has no bound")
    lower = [min(0.0, edges[0]), *edges[:-1]]
    return sum(count * max(a * a, b * b) for a, b, count in zip(lower, edges, counts[:-1]))
