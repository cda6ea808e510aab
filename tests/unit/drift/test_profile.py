"""One pass over any data: what each type becomes, exactness, merging, and what a profile refuses to read."""

from __future__ import annotations

import datetime as dt
import decimal
import itertools
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from airflow_mlops.drift import Profile
from airflow_mlops.drift.categories import CAPACITY, Categories
from airflow_mlops.drift.histogram import Histogram, from_keys, to_keys
from airflow_mlops.exceptions import DataError, InvalidInputError


@pytest.fixture
def rng():
    return np.random.default_rng(20130401)


@pytest.mark.parametrize(
    ("values", "kind", "count", "missing"),
    [
        (pd.Series([1, None, 3], dtype="Int64"), "numeric", 2, 1),
        (pd.Series([1.5, None, 3], dtype="Float64"), "numeric", 2, 1),
        (pd.Series([1, 2, 255], dtype="uint8"), "numeric", 3, 0),
        (pd.Series([1, 2**63 + 1, 2], dtype="uint64"), "numeric", 3, 0),
        (pd.Series([1.5, None, 3], dtype="double[pyarrow]"), "numeric", 2, 1),
        (pd.Series([1.5, np.nan, np.inf]), "numeric", 1, 1),
        (pd.Series([1, 2, 3], dtype="float32"), "numeric", 3, 0),
        (pa.array([1.5, None, 3], pa.float16()), "numeric", 2, 1),
        (pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("2.25")]), "numeric", 2, 1),
        (pa.array([dt.time(1), None, dt.time(2)]), "numeric", 2, 1),
        (pa.array([dt.timedelta(1), None, dt.timedelta(2)]), "numeric", 2, 1),
        (pd.Series([True, None, False], dtype="boolean"), "categorical", 2, 1),
        (pd.Series([True, False, False]), "categorical", 3, 0),
        (pd.Series(["a", None, "b"]), "categorical", 2, 1),
        (pd.Series(["a", None, "b"], dtype="string[pyarrow]"), "categorical", 2, 1),
        (pd.Series(["a", None, "b"], dtype="category"), "categorical", 2, 1),
        (pa.array(["a", None, "b"], pa.large_string()), "categorical", 2, 1),
        (pa.array(["a", None, "b"], pa.string_view()), "categorical", 2, 1),
        (pa.array([1, None, 2]).dictionary_encode(), "numeric", 2, 1),
        (pd.to_datetime(pd.Series(["2013-01-01", None, "2013-02-01"], dtype=object), utc=True), "time", 2, 1),
        (pa.array([dt.date(2013, 1, 1), None, dt.date(2013, 2, 1)]), "time", 2, 1),
        (pa.nulls(3), "empty", 0, 3),
    ],
)
def test_every_type_is_profiled(values, kind, count, missing):
    source = pa.table({"x": values}) if isinstance(values, pa.Array) else pd.DataFrame({"x": values})
    column = Profile.of(source).columns["x"]
    assert (column.kind, column.count, column.missing) == (kind, count, missing)
    again = Profile.from_json(json.loads(json.dumps(Profile.of(source).to_json(), allow_nan=False)))
    assert again.columns["x"].count == count


@pytest.mark.parametrize("values", [pa.array([[1], [2]]), pa.array([{"a": 1}, {"a": 2}]), pa.array([b"x", b"y"])])
def test_nested_and_binary_columns_are_refused_by_name(values):
    with pytest.raises(DataError, match="column deep has type"):
        Profile.of(pa.table({"deep": values}))


def test_moments_are_right_where_naive_sums_cancel(rng):
    values = 1e9 + rng.normal(size=10_000)
    column = Profile.of(pd.DataFrame({"x": values})).columns["x"]
    assert column.mean == pytest.approx(values.mean(), rel=1e-15)
    assert column.std == pytest.approx(values.std(), rel=1e-9)
    assert (column.minimum, column.maximum) == (values.min(), values.max())


def test_huge_values_do_not_overflow():
    column = Profile.of(pd.DataFrame({"x": [1e300, -1e300, 1e308]})).columns["x"]
    assert column.std == pytest.approx(np.std(np.array([1, -1, 1e8]) / 1e8) * 1e308)


def test_infinities_are_counted_apart(rng):
    column = Profile.of(pd.DataFrame({"x": np.r_[rng.normal(size=10), np.inf, -np.inf, np.nan]})).columns["x"]
    assert (column.count, column.infinite, column.missing) == (10, 2, 1)
    assert np.isfinite([column.mean, column.std, column.minimum, column.maximum]).all()


def test_keys_keep_the_order_of_floats():
    values = np.array([-np.finfo(float).max, -1.5, -1e-300, -0.0, 0.0, 5e-324, 1.5, np.finfo(float).max])
    keys = to_keys(values)
    assert (np.diff(keys) >= 0).all() and keys[3] == keys[4]
    np.testing.assert_array_equal(from_keys(keys), values + 0.0)


@pytest.mark.parametrize("name", ["normal", "lognormal", "uniform far from zero", "integers", "cauchy"])
def test_quantiles_are_close_to_the_data(rng, name):
    draw = {
        "normal": lambda: rng.normal(size=50_000),
        "lognormal": lambda: rng.lognormal(0, 3, 50_000),
        "uniform far from zero": lambda: 1e6 + rng.uniform(size=50_000),
        "integers": lambda: rng.integers(0, 1440, 50_000).astype(float),
        "cauchy": lambda: rng.standard_cauchy(50_000),
    }[name]
    values = draw()
    column = Profile.of(pd.DataFrame({"x": values})).columns["x"]
    ranks = np.linspace(0.01, 0.99, 99)
    estimated = column.histogram.quantiles(ranks, column.minimum, column.maximum)
    reached = np.searchsorted(np.sort(values), estimated) / len(values)
    assert np.abs(reached - ranks).max() < 0.01


def test_few_distinct_values_are_held_exactly(rng):
    values = rng.integers(-5, 20, 10_000).astype(float)
    histogram = Histogram()
    histogram.add(values)
    distinct, counts = np.unique(values, return_counts=True)
    np.testing.assert_array_equal(from_keys(histogram.keys << histogram.shift), distinct)
    np.testing.assert_array_equal(histogram.counts, counts)


def _parts(rng):
    frames = []
    for part in range(4):
        size = 3_000 + 100 * part
        frames.append(
            pd.DataFrame(
                {
                    "normal": rng.normal(part, 1 + part, size),
                    "tailed": rng.standard_cauchy(size),
                    "few": rng.integers(0, 5, size),
                    "many": [f"id-{i}" for i in rng.integers(0, 3_000, size)],
                    "word": rng.choice(["a", "b", "c"], size),
                    "when": pd.Timestamp("2013-01-01", tz="UTC") + pd.to_timedelta(rng.integers(0, 1000, size), "h"),
                }
            )
        )
    frames[2]["few"] = np.nan
    return frames


def test_merging_in_any_order_gives_the_same_bits(rng):
    profiles = [Profile.of(frame) for frame in _parts(rng)]
    digests = set()
    for order in itertools.permutations(profiles):
        digests.add(order[0].merge(order[1]).merge(order[2]).merge(order[3]).digest)
        digests.add(order[0].merge(order[1]).merge(order[2].merge(order[3])).digest)
    assert len(digests) == 1


def test_the_merged_profile_is_that_of_the_whole(rng):
    frames = _parts(rng)
    merged = Profile.of(frames[0])
    for frame in frames[1:]:
        merged = merged.merge(Profile.of(frame))
    whole = Profile.of(pd.concat(frames))
    assert merged.rows == whole.rows
    for name, column in whole.columns.items():
        other = merged.columns[name]
        np.testing.assert_array_equal(column.histogram.keys, other.histogram.keys)
        np.testing.assert_array_equal(column.histogram.counts, other.histogram.counts)
        assert column.categories.to_json() == other.categories.to_json()
        assert (column.count, column.missing, column.minimum) == (other.count, other.missing, other.minimum)
        if column.kind == "numeric":
            assert other.mean == pytest.approx(column.mean, rel=1e-12)


def test_merging_leaves_its_inputs_alone(rng):
    first, second = (Profile.of(frame) for frame in _parts(rng)[:2])
    before = first.digest, second.digest
    first.merge(second)
    assert (first.digest, second.digest) == before


def test_profiles_that_do_not_belong_together_do_not_merge():
    with pytest.raises(DataError, match="only in one of them: a, b"):
        Profile.of(pd.DataFrame({"a": [1]})).merge(Profile.of(pd.DataFrame({"b": [1]})))
    with pytest.raises(DataError, match=r"a is numeric \(int64\) in one part of the data and categorical"):
        Profile.of(pd.DataFrame({"a": [1]})).merge(Profile.of(pd.DataFrame({"a": ["x"]})))


def test_the_same_data_give_the_same_bits_from_table_file_and_folder(rng, tmp_path):
    frame = pd.concat(_parts(rng)[:2], ignore_index=True)
    (tmp_path / "sets").mkdir()
    frame.to_parquet(tmp_path / "sets" / "all.parquet", index=False, row_group_size=1_000)
    (tmp_path / "sets" / "notes.txt").write_text("not data")
    sources = [str(tmp_path / "sets" / "all.parquet"), str(tmp_path / "sets"), f"{tmp_path}/sets/*.parquet"]
    sources.append(f"file://{tmp_path}/sets")
    sources.append([str(tmp_path / "sets" / "all.parquet")])
    assert len({Profile.of(source).digest for source in [*sources, *sources]}) == 1
    assert Profile.of(sources[0]).columns["many"].to_json() == Profile.of(frame).columns["many"].to_json()


def test_a_column_that_only_later_files_have_is_not_lost(tmp_path):
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"a": [1.5, 2.0], "b": ["x", "y"]}), tmp_path / "2.parquet")
    profile = Profile.of(str(tmp_path))
    assert (profile.columns["b"].missing, profile.columns["b"].count, profile.columns["a"].count) == (2, 2, 4)


def test_a_corrupt_file_among_many_is_named(tmp_path):
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "1.parquet")
    (tmp_path / "2.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match=r"2\.parquet"):
        Profile.of(str(tmp_path))


def test_empty_data_and_absent_columns_are_errors(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        Profile.of(pd.DataFrame({"a": pd.Series([], dtype=float)}))
    with pytest.raises(DataError, match="no Parquet or CSV file"):
        Profile.of(str(tmp_path / "absent.parquet"))
    with pytest.raises(DataError, match="b asked for but not in the data, which has a"):
        Profile.of(pa.table({"a": [1]}), columns=["a", "b"])
    with pytest.raises(DataError, match="mixes types"):
        Profile.of(pd.DataFrame({"a": [1, "x", 2.0]}))


def test_columns_label_and_categorical_are_honoured():
    frame = pd.DataFrame({"hour": [1, 2, 2], "late": [0, 1, 0], "x": [0.1, 0.2, 0.3]})
    assert list(Profile.of(frame, label="late").columns) == ["hour", "x"]
    profile = Profile.of(frame, columns=["x", "hour"], categorical=["hour"])
    assert profile.columns["hour"].categories.names == {"1": 1, "2": 2}
    with_gap = Profile.of(frame.assign(hour=[1.0, 2.0, np.nan]), columns=["hour"], categorical=["hour"])
    assert with_gap.columns["hour"].categories.names == {"1": 1, "2": 1}


def test_many_categories_are_summarised_in_bounded_memory(rng):
    names = [f"user-{i}" for i in range(20_000)]
    categories = Categories()
    for start in range(0, len(names), 700):
        categories.add((name, 2) for name in names[start : start + 700])
    assert categories.total == 40_000 and categories.hashed
    assert set(categories.sample.values()) == {2}
    assert categories.distinct() == pytest.approx(20_000, rel=0.25)
    assert len(json.dumps(categories.to_json())) < 6_000
    few = Categories()
    few.add((name, 1) for name in names[:CAPACITY])
    assert not few.hashed and few.distinct() == CAPACITY


def test_a_profile_is_small(rng):
    frame = pd.DataFrame({f"n{i}": rng.normal(i, 1 + i, 50_000) for i in range(40)})
    for i in range(10):
        frame[f"c{i}"] = pd.Categorical.from_codes(rng.integers(0, 30, len(frame)), [f"c{j}" for j in range(30)])
    assert len(json.dumps(Profile.of(frame).to_json())) < 100_000


def test_damaged_foreign_and_newer_profiles_are_refused(rng):
    value = json.loads(
        json.dumps(Profile.of(pd.DataFrame({"x": rng.normal(size=100), "c": ["a", "b"] * 50})).to_json())
    )
    assert Profile.from_json(value).rows == 100
    with pytest.raises(InvalidInputError, match="version 3, this airflow-mlops reads up to 2: upgrade"):
        Profile.from_json({**value, "profile_version": 3})
    for foreign in ({}, [], "x", {"profile_version": "1"}):
        with pytest.raises(InvalidInputError, match="not a drift profile"):
            Profile.from_json(foreign)
    column = value["columns"]["x"]
    for broken in (
        {**column, "bins": column["bins"][:-8]},
        {**column, "bins": "!!"},
        {**column, "rows": 99},
        {**column, "missing": 1},
        {**column, "kind": "magic"},
        {**column, "maximum": 7},
        {k: v for k, v in column.items() if k != "total"},
        None,
    ):
        with pytest.raises(InvalidInputError, match="damaged"):
            Profile.from_json({**value, "columns": {**value["columns"], "x": broken}})


def test_an_oversized_histogram_is_refused_before_it_is_unpacked():
    import base64
    import zlib

    bomb = base64.b64encode(zlib.compress(bytes(100_000_000), 9)).decode()
    with pytest.raises(ValueError, match="size"):
        Histogram.from_json({"shift": 0, "bins": bomb})
