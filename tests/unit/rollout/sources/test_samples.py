"""From series to counters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from airflow_mlops.rollout.sources.prometheus_api import whole
from airflow_mlops.rollout.sources.samples import Unusable, count_of, histogram_of, squares_bound


def test_cumulative_buckets_become_counts_in_seconds():
    found = histogram_of({"5": 3.0, "+Inf": 9.0, "250": 9.0, "25": 7.0}, 1e-3, "latency")
    assert found == {"edges": [0.005, 0.025, 0.25], "counts": [3, 4, 2, 0]}


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ({"1": 3.0}, "no bucket le=\\+Inf"),
        ({}, "no bucket le=\\+Inf"),
        ({"": 3.0}, "has no label le"),
        ({"1": 3.0, "+Inf": 2.0}, "buckets that fall"),
        ({"1": math.nan, "+Inf": 2.0}, "bucket le=1 is nan"),
        ({"1": 1.5, "+Inf": 2.0}, "no count"),
        ({"one": 1.0, "+Inf": 2.0}, "bucket edges"),
    ],
)
def test_buckets_that_cannot_be_used(buckets, message):
    with pytest.raises(Unusable, match=message):
        histogram_of(buckets, 1.0, "latency")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 0.5, 1e6 + 0.25])
def test_what_is_no_count(value):
    with pytest.raises(Unusable, match="errors"):
        count_of(value, "errors")
    assert whole(value) is None


def test_large_counts_are_exact():
    assert count_of(2.0**52 + 1, "requests") == 2**52 + 1


def test_squares_of_a_histogram_are_never_too_small():
    rng = np.random.default_rng(0)
    for values in (rng.gamma(2, 0.05, 1000), rng.normal(0.3, 0.1, 1000), rng.uniform(-0.9, 0.9, 1000)):
        edges = [-0.5, -0.1, 0.0, 0.1, 0.5, 2.0] if values.min() < -0.5 else [0.0, 0.1, 0.5, 2.0]
        values = values[(values > -0.5) & (values >= 0 if edges[0] == 0 else True)]
        counts = [int(count) for count in np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1)]
        exact = float((values**2).sum())
        assert exact <= squares_bound(edges, counts, "x") < 40 * exact


def test_values_without_a_bound_have_no_squares():
    for edges, counts in (([1.0, 2.0], [1, 1, 1]), ([-1.0, 2.0], [1, 1, 0]), ([], [3])):
        with pytest.raises(Unusable, match="no bound"):
            squares_bound(edges, counts, "x")
