"""Categories of every type and number, counted the fast ways, against counting each of them by its name."""

from __future__ import annotations

import decimal
from collections import Counter
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from airflow_mlops.drift import Profile
from airflow_mlops.drift import names as counting
from airflow_mlops.drift.categories import BUCKETS, CAPACITY, SAMPLE, Categories

ROWS = 70_000


def plainly(values: list) -> tuple[dict, int]:
    """What a profile holds of ``values``, and how many are missing, by the definition of both."""
    given = [value for value in values if value is not None and value == value]
    whole = (int(v) if isinstance(v, float) and v.is_integer() else v for v in given)
    names = Counter(map(str, whole))
    if len(names) <= CAPACITY:
        return {"names": dict(sorted(names.items()))}, len(values) - len(given)
    hashes = Counter()
    for name, count in names.items():
        hashes[int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")] += count
    buckets = Counter()
    for value, count in hashes.items():
        buckets[value % BUCKETS] += count
    sample = {f"{value:016x}": hashes[value] for value in sorted(hashes)[:SAMPLE]}
    return {"buckets": [buckets[i] for i in range(BUCKETS)], "sample": sample}, len(values) - len(given)


def drawn(distinct: int) -> np.ndarray:
    return np.random.default_rng(distinct).integers(0, distinct, ROWS)


NULLS = np.random.default_rng(3).random(ROWS) < 0.05
MAKE = {
    "text": lambda v: pa.array([f"ü{x}" for x in v], mask=NULLS),
    "large": lambda v: pa.array([f"ü{x}" for x in v], pa.large_string()),
    "view": lambda v: pa.array([f"ü{x}" for x in v], pa.string_view(), mask=NULLS),
    "dictionary": lambda v: pa.array([f"ü{x}" for x in v], mask=NULLS).dictionary_encode(),
    "repeating dictionary": lambda v: pa.DictionaryArray.from_arrays(
        pa.array(v % 9_000, mask=NULLS), pa.array([None if i == 7 else f"ü{i % (len(v) // 70)}" for i in range(9_000)])
    ),
    "sorted": lambda v: pa.array([f"ü{x}" for x in np.sort(v)]),
    "integers": lambda v: pa.array(v - len(v) // 2, mask=NULLS),
    "unsigned": lambda v: pa.array(v.astype(np.uint64) + np.uint64(2**63)),
    "dictionary of integers": lambda v: pa.array(v).dictionary_encode(),
    "whole floats": lambda v: pa.array(np.r_[-0.0, 0.0, np.nan, v[3:].astype(float)]),
    "short floats": lambda v: pa.array(v.astype(np.float32), mask=NULLS),
    "floats": lambda v: pa.array(np.r_[-0.0, 0.0, np.nan, np.inf, -np.inf, 1e300, 1e16, v[7:] / 2]),
    "decimals": lambda v: pa.array([decimal.Decimal(int(x)) / 4 for x in v[:9_000]]),
    "booleans": lambda v: pa.array(v % 2 == 0, mask=NULLS),
}


@pytest.mark.parametrize("distinct", [3, CAPACITY, CAPACITY + 1, 40_000, 10**9])
@pytest.mark.parametrize("kind", MAKE)
def test_categories_of_every_type_are_those_of_plain_counting(kind, distinct, tmp_path):
    values = MAKE[kind](drawn(distinct))
    expected, missing = plainly(values.to_pylist())
    table = pa.table({"c": values})
    sources = [table, pa.Table.from_batches(table.to_batches(max_chunksize=17_000))]
    if "dictionary" not in kind and kind not in ("view", "decimals"):
        for rows in (30_000, ROWS):
            sources.append(str(tmp_path / f"{rows}.parquet"))
            pq.write_table(table, sources[-1], row_group_size=rows)
    for source in sources:
        column = Profile.of(source, categorical=["c"]).columns["c"]
        assert (column.categories.to_json(), column.missing) == (expected, missing)


@pytest.mark.parametrize(
    ("values", "hashed", "counted"),
    [
        ([f"order-{i}" for i in range(ROWS)], ROWS, 0),
        ([f"order-{i % 9_000}" for i in range(ROWS)], 9_000, 1),
        ([f"order-{i // 3}" for i in range(ROWS)], ROWS // 3 + 1, 1),
        ([f"order-{i}" for i in drawn(20_000)], len(set(drawn(20_000))), 1),
        ([f"order-{i}" for i in drawn(900_000)], ROWS, 0),
        ([f"order-{i % 900}" for i in range(ROWS)], 0, 1),
    ],
)
def test_names_are_hashed_once_and_counted_only_where_many_are_equal(monkeypatch, values, hashed, counted):
    seen = Counter()
    add_many, value_counts = Categories.add_many, counting.pc.value_counts

    def hashing(self, names, counts=None):
        seen["hashed"] += len(names)
        add_many(self, names, counts)

    def count(array):
        seen["counted"] += 1
        return value_counts(array)

    monkeypatch.setattr(Categories, "add_many", hashing)
    monkeypatch.setattr(counting.pc, "value_counts", count)
    categories = Categories()
    assert counting.add_names(categories, pa.array(values)) == 0
    assert (seen["hashed"], seen["counted"]) == (hashed, counted) and categories.total == ROWS


def test_text_that_repeats_is_read_by_its_places_in_the_files_dictionary(tmp_path, monkeypatch):
    from airflow_mlops.drift import sources

    few, many = [f"c{i % 99}" for i in range(ROWS)], [f"order-{i}" for i in range(ROWS)]
    pq.write_table(pa.table({"few": few, "many": many, "x": range(ROWS)}), tmp_path / "x.parquet")
    asked, parquet = [], sources._parquet
    monkeypatch.setattr(sources, "_parquet", lambda uri, names=(): asked.append(list(names)) or parquet(uri, names))
    assert Profile.of(str(tmp_path)).rows == ROWS
    assert asked[-1] == ["few"]
