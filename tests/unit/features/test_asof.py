"""The join against a plain loop over every pair of rows."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_mlops.exceptions import DataError
from airflow_mlops.features.asof import instants, join_codes, match_asof
from airflow_mlops.features.training_set import ViewJoin, refuse_leaks

SECOND = 10**9
NEVER = np.iinfo(np.int64).min
small = st.integers(0, 8)
entity = st.tuples(st.integers(-1, 2), small)
source = st.tuples(st.integers(-1, 2), st.one_of(st.none(), small), st.one_of(st.none(), small))


def loop(entities, sources, ttl, use_created, known_only):
    found = []
    for key, at in entities:
        best = None
        for row, (other, time, created) in enumerate(sources):
            if key < 0 or other != key or time is None or time > at or (ttl and at - time > ttl):
                continue
            if use_created and known_only and (created is None or created > at):
                continue
            rank = (time, (-1 if created is None else created) if use_created else 0, row)
            best = max(best, rank) if best else rank
        found.append(best[2] if best else -1)
    return found


@settings(max_examples=400, deadline=None)
@given(st.lists(entity, max_size=12), st.lists(source, max_size=14), st.integers(0, 4), st.booleans(), st.booleans())
def test_equals_the_loop_with_ties_ttl_edges_nulls_and_created(entities, sources, ttl, use_created, known_only):
    def nanos(values):
        return np.array([NEVER if v is None else v * SECOND for v in values], dtype=np.int64)

    match = match_asof(
        np.array([key for key, _ in entities], dtype=np.int64),
        nanos([at for _, at in entities]),
        np.array([key for key, _, _ in sources], dtype=np.int64),
        nanos([time for _, time, _ in sources]),
        ttl=dt.timedelta(seconds=ttl) or None,
        created=nanos([created for _, _, created in sources]) if use_created else None,
        known_only=known_only,
    )
    assert match.position.tolist() == loop(entities, sources, ttl, use_created, known_only)
    assert match.leaks == 0
    if use_created and known_only:
        assert match.late == 0


@pytest.mark.parametrize("known_only", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_equals_the_loop_on_dense_tables(seed, known_only):
    rng = np.random.default_rng(seed)
    keys, times, created = rng.integers(0, 2, 60), rng.integers(0, 20, 60), rng.integers(0, 25, 60)
    entity_keys, at = rng.integers(0, 2, 40), rng.integers(0, 25, 40)
    match = match_asof(
        entity_keys,
        at * SECOND,
        keys,
        times * SECOND,
        ttl=dt.timedelta(seconds=6),
        created=created * SECOND,
        known_only=known_only,
    )
    sources = list(zip(keys.tolist(), times.tolist(), created.tolist()))
    entities = list(zip(entity_keys.tolist(), at.tolist()))
    assert match.position.tolist() == loop(entities, sources, 6, True, known_only)


def test_late_values_are_counted():
    at, key = np.array([5 * SECOND]), np.array([0])
    created = np.array([9 * SECOND])
    assert match_asof(key, at, key, np.array([4 * SECOND]), created=created).late == 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(0, 2)), min_size=1, max_size=10),
    st.integers(0, 10),
)
def test_codes_are_equal_where_all_keys_are(rows, cut):
    cut = min(cut, len(rows))
    left, right = rows[:cut], rows[cut:]

    def columns(part):
        return [
            pa.chunked_array([pa.array([a for a, _ in part], pa.string())]),
            pa.chunked_array([pa.array([b for _, b in part], pa.int32())]),
        ]

    one, other = join_codes(columns(left), columns(right), ["x", "y"], (len(left), len(right)))
    for i, first in enumerate(left):
        for j, second in enumerate(right):
            assert (one[i] == other[j] and one[i] >= 0) == (first == second and first[0] is not None)


def test_keys_of_types_that_cannot_be_compared_are_refused():
    with pytest.raises(DataError, match="join key 'x' is string"):
        join_codes([pa.chunked_array([["a"]])], [pa.chunked_array([[1]])], ["x"], (1, 1))


def test_naive_times_are_refused_for_entities_and_utc_for_sources():
    naive = pa.chunked_array([pa.array([1], pa.timestamp("s"))])
    with pytest.raises(DataError, match="without a time zone"):
        instants(naive, "event_timestamp", naive_is_utc=False)
    assert instants(naive, "t", naive_is_utc=True).tolist() == [SECOND]


def test_a_leak_is_refused_by_name():
    with pytest.raises(DataError, match="weather"):
        refuse_leaks([ViewJoin("weather", "s", 3, 2, 1, 0, None)])
