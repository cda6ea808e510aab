"""What a route reports about its two arms, and whether it can be believed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOMENTS = ("latency", "prediction", "log_loss", "brier")
LATENCY_EDGES = tuple(round(0.001 * 1.25**i, 6) for i in range(44))
"""Upper edges of the latency histogram in seconds, 1 ms to 14.7 s; one more bucket holds what is slower."""

Counters = Mapping[str, Any]
"""Cumulative numbers of one replica, all optional but ``counts.requests``::

    {"counts": {"requests": 120, "errors": 1, "timeouts": 0},
     "histograms": {"latency": {"edges": [0.01, 0.1], "counts": [100, 15, 5]}},
     "moments": {"log_loss": [90, 40.5, 30.1]}}

Histograms: upper edges, rising (of ``latency`` in seconds), and the count of each bucket, one more than edges, not
cumulative over buckets. Moments: number of values, sum, sum of squares.
"""


@dataclass(frozen=True)
class Observation:
    """One reading of a route, its numbers cumulative.

    :param time: the route's clock, seconds; equal to the last reading's means stale
    :param boot: changes when all counters start anew
    :param epoch: changes when weights or versions change
    :param weight: share of traffic really sent to the canary, percent
    :param stable: replica name to its :data:`Counters`, of the stable arm; a target that does not know its replicas
        uses the one name ``""``
    :param canary: the same of the canary
    :param routed: requests routed to (stable, canary) in this epoch; ``None``: the arms' own requests are taken
    :param shadow: whether the canary gets copies of stable's requests
    :param problem: why nothing could be read; the other fields are then ignored
    """

    time: float
    boot: str = ""
    epoch: str = ""
    weight: float = 0.0
    stable: Mapping[str, Counters] | None = None
    canary: Mapping[str, Counters] | None = None
    routed: tuple[int, int] | None = None
    shadow: bool = False
    problem: str | None = None


def arm_problem(arm: Mapping[str, Counters] | None) -> str | None:
    """What is wrong with one arm's counters, or ``None``."""
    if not arm:
        return "has no counters"
    for replica, counters in arm.items():
        problem = counters_problem(counters)
        if problem:
            return f"{problem} (replica {replica})" if replica else problem
    return None


def counters_problem(counters: Counters | None) -> str | None:
    """What is wrong with one replica's counters, or ``None``."""
    if not counters:
        return "has no counters"
    try:
        counts = list(counters["counts"].values())
        requests = counters["counts"]["requests"]
        if counters["counts"].get("errors", 0) > requests:
            return "reports impossible counts"
        numbers: list[float] = []
        for histogram in (counters.get("histograms") or {}).values():
            edges, buckets = histogram["edges"], histogram["counts"]
            if len(buckets) != len(edges) + 1 or any(b <= a for a, b in itertools.pairwise(edges)):
                return "has counters of another shape"
            counts += buckets
            numbers += edges
        for moments in (counters.get("moments") or {}).values():
            if len(moments) != 3:
                return "has counters of another shape"
            counts.append(moments[0])
            numbers += moments[1:]
        if not all(map(math.isfinite, counts)) or not all(map(math.isfinite, numbers)):
            return "reports numbers that are not finite"
        if min(counts) < 0:
            return "reports impossible counts"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"has unreadable counters ({type(error).__name__}: {error})"
    return None
