"""One pass over any data: what each type becomes, exactness, merging, and what a profile refuses to read."""

from __future__ import annotations

import datetime as dt
import decimal
import hashlib
import itertools
import json
from fractions import Fraction

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from airflow_mlops.drift import Profile
from airflow_mlops.drift.categories import CAPACITY, Categories
from airflow_mlops.drift.histogram import Histogram, from_keys, to_keys
from airflow_mlops.drift.sources import open_source
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


@pytest.mark.parametrize(
    "values",
    [
        np.array([1e308, -1e308, 1e300, 5e-324, 1e-310, 1.0]),
        np.full(9, 1.7976931348623157e308),
        np.array([5e-324, 5e-324, -1e-320]),
        np.ldexp(np.linspace(-1, 1, 999), np.arange(-1060, 938, 2)),
        np.r_[1e9 + np.linspace(0, 1, 500), np.zeros(3)],
        np.full(40_000, 0.1),
        np.arange(-70_000.0, 70_000.0, 13.0),
    ],
)
def test_sums_are_exact(values):
    column = Profile.of(pa.table({"x": values})).columns["x"]
    assert column.total == sum((Fraction(value) for value in values.tolist()), Fraction(0))
    assert column.squares == sum((Fraction(value) ** 2 for value in values.tolist()), Fraction(0))


@pytest.mark.parametrize("distinct", [0, 1, 900, 1_500, 30_000, 400_000])
@pytest.mark.parametrize("kind", ["whole", "float", "time"])
def test_distinct_values_are_counted(rng, distinct, kind):
    values = np.tile(np.arange(distinct), 2)
    values = {
        "whole": lambda: pa.array(values * 1_000, pa.int64()),
        "float": lambda: pa.array(values / 7),
        "time": lambda: pa.array(values * 1_000_000, pa.timestamp("us", "UTC")),
    }[kind]()
    profile = Profile.of(pa.table({"x": pa.concat_arrays([values, pa.nulls(3, values.type)])}))
    exact = kind != "time" and distinct <= 1024
    assert profile.columns["x"].distinct == (distinct if exact else pytest.approx(distinct, rel=0.1))
    again = Profile.from_json(json.loads(json.dumps(profile.to_json())))
    assert again.columns["x"].distinct == profile.columns["x"].distinct
    assert again.merge(profile).columns["x"].distinct == profile.columns["x"].distinct


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, size: rng.normal(size=size),
        lambda rng, size: -rng.lognormal(0, 1, size),
        lambda rng, size: np.where(rng.random(size) < 0.4, 0.0, rng.lognormal(0, 1, size)),
        lambda rng, size: rng.uniform(4, 5, size) * rng.choice([-1, 1], size),
        lambda rng, size: np.r_[np.full(size // 2, 1e-9), 10.0 ** rng.uniform(0, 9, size - size // 2)],
        lambda rng, size: rng.standard_cauchy(size),
        lambda rng, size: np.r_[rng.uniform(1, 2, size // 2), rng.uniform(1e3, 1e6, size - size // 2)],
        lambda rng, size: np.r_[-0.0, 0.0, rng.choice([0.5, 1.5, -2.5], size - 2)],
    ],
)
def test_the_fast_histogram_is_the_plain_one(rng, draw):
    values = draw(rng, 120_000)
    plain = Histogram()
    plain.add(values)
    fast = Profile.of(pa.table({"x": values})).columns["x"].histogram
    assert fast.shift == plain.shift
    np.testing.assert_array_equal(fast.keys, plain.keys)
    np.testing.assert_array_equal(fast.counts, plain.counts)


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


def test_the_merged_profile_is_that_of_the_whole_to_the_last_bit(rng):
    frames = _parts(rng)
    frames[2]["few"] = frames[2]["few"].astype("Int64")
    merged = Profile.of(frames[0])
    for frame in frames[1:]:
        merged = merged.merge(Profile.of(frame))
    whole = pd.concat(frames)
    for column in merged.columns.values():
        column.type = ""
    for frame in (whole, whole.sample(frac=1.0, random_state=7), whole.iloc[::-1]):
        profile = Profile.of(frame)
        for column in profile.columns.values():
            column.type = ""
        assert profile.digest == merged.digest


@pytest.mark.parametrize("rows", [1, 31, 32_769])
def test_rows_in_batches_of_any_size_and_order_give_the_same_bits(rng, rows):
    size = 70_000
    values = np.r_[rng.normal(size=size // 2), rng.integers(-5, 70_000, size // 4), np.zeros(size // 8)]
    values = np.r_[values, rng.standard_cauchy(size - len(values) - 4), [np.nan, np.inf, 5e-324, -1e300]]
    table = pa.table({"x": rng.permutation(values), "n": rng.integers(-(2**40), 2**60, size)})
    first = table if rows > 1_000 else table.slice(0, 2_000)
    cut = pa.Table.from_batches(first.to_batches(max_chunksize=rows))
    shuffled = first.take(pa.array(rng.permutation(len(first))))
    assert Profile.of(first).digest == Profile.of(cut).digest == Profile.of(shuffled).digest


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


def test_threads_give_the_same_bits(rng, tmp_path, monkeypatch):
    monkeypatch.setattr("airflow_mlops.drift.sources._UNIT_ROWS", 5_000)
    (tmp_path / "sets").mkdir()
    for i, frame in enumerate(_parts(rng)):
        pd.concat([frame] * 10).to_parquet(tmp_path / "sets" / f"{i}.parquet", row_group_size=1_000 * (i + 1))
    one = Profile.of(str(tmp_path / "sets"))
    assert one.rows == 10 * sum(len(frame) for frame in _parts(rng))
    assert {Profile.of(str(tmp_path / "sets"), threads=threads).digest for threads in (2, 3)} == {one.digest}


def test_the_row_groups_of_a_large_file_are_read_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("airflow_mlops.drift.sources._UNIT_ROWS", 500)
    table = pa.table({"x": np.arange(3_000) / 3, "c": [f"c{i % 9}" for i in range(3_000)]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=200)
    assert [(unit.first, unit.last, unit.rows) for unit in open_source(str(tmp_path))[:2]] == [(0, 2, 400), (2, 4, 400)]
    assert len(open_source(str(tmp_path))) == 8
    assert Profile.of(str(tmp_path), threads=2).digest == Profile.of(table).digest


def test_remote_files_datasets_readers_and_batches_give_the_same_bits(rng, tmp_path):
    import fsspec
    import pyarrow.dataset as ds

    table = pa.Table.from_pandas(_parts(rng)[0], preserve_index=False)
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=700)
    with fsspec.open("memory://sets/2013/x.parquet", "wb") as file:
        file.write((tmp_path / "x.parquet").read_bytes())
    sources = [
        "memory://sets",
        "memory://sets/*/*.parquet",
        ds.dataset(tmp_path / "x.parquet"),
        pa.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=999)),
        table.combine_chunks().to_batches()[0],
    ]
    assert {Profile.of(source).digest for source in sources} == {Profile.of(table).digest}
    assert Profile.of("memory://sets", columns=["few", "word"]).rows == len(table)


def test_csv_is_profiled_like_parquet(rng, tmp_path):
    frame = _parts(rng)[0].assign(gap=np.r_[np.nan, np.arange(2_999) / 2], flag=lambda f: f["few"] > 2)
    frame.to_csv(tmp_path / "x.csv", index=False)
    frame.to_csv(tmp_path / "y.tsv.gz", index=False, sep="\t")
    expected = Profile.of(frame)
    for source in (tmp_path / "x.csv", tmp_path / "y.tsv.gz"):
        found = Profile.of(str(source))
        for name, column in expected.columns.items():
            found.columns[name].type = column.type
        assert found.digest == expected.digest
    assert Profile.of(str(tmp_path)).rows == 2 * len(frame)
    assert list(Profile.of(str(tmp_path / "x.csv"), columns=["gap", "few"]).columns) == ["gap", "few"]


@pytest.mark.parametrize(
    ("first", "later", "kind"),
    [
        ("1", "1.5", "numeric"),
        ("1", "x", "categorical"),
        ("", "2.5", "numeric"),
        ("", "x", "categorical"),
        ("true", "maybe", "categorical"),
        ("2013-01-01", "2013-01-01 10:00:00", "time"),
        ("2013-01-01 10:00:00", "2013-01-01 10:00:00.5", "time"),
    ],
)
def test_a_csv_column_has_the_type_of_all_its_rows(tmp_path, monkeypatch, first, later, kind):
    rows = 700_000  # the first rows fill the block from which the types are guessed
    (tmp_path / "x.csv").write_text("a,b\n" + f"{first},1234\n" * rows + f"{later},1\n")
    profile = Profile.of(str(tmp_path / "x.csv"))
    column = profile.columns["a"]
    assert (column.kind, column.rows, column.missing) == (kind, rows + 1, 0 if first else rows)


def test_times_in_different_zones_are_refused(tmp_path):
    utc, naive, berlin = (pa.array([0], pa.timestamp("us", zone)) for zone in ("UTC", None, "Europe/Berlin"))
    for i, (first, second) in enumerate([(utc, naive), (utc, berlin)]):
        folder = tmp_path / str(i)
        folder.mkdir()
        pq.write_table(pa.table({"when": first}), folder / "1.parquet")
        pq.write_table(pa.table({"when": second}), folder / "2.parquet")
        with pytest.raises(DataError, match=r"column when is timestamp.*1\.parquet.*2\.parquet.*Convert it to UTC"):
            Profile.of(str(folder))
        with pytest.raises(DataError, match=r"column when is .*Convert it to UTC"):
            Profile.of(pa.table({"when": first})).merge(Profile.of(pa.table({"when": second})))
    same = pa.array([0], pa.timestamp("ms", "Etc/UTC"))
    assert Profile.of(pa.table({"when": utc})).merge(Profile.of(pa.table({"when": same}))).rows == 2
    there = dt.timezone(dt.timedelta(hours=2))
    for other in (None, there):
        mixed = pd.Series([dt.datetime(2013, 1, 1, tzinfo=dt.timezone.utc), dt.datetime(2013, 1, 1, tzinfo=other)])
        with pytest.raises(DataError, match="column when mixes times of the zones"):
            Profile.of(pd.DataFrame({"when": mixed.astype(object)}))
    lines = "2013-01-01T00:00:00Z\n" * 300_000
    (tmp_path / "x.csv").write_text(f"when\n{lines}2013-01-01T00:00:00\n")
    with pytest.raises(DataError, match=r"column when of .*x\.csv has times with and without a zone"):
        Profile.of(str(tmp_path / "x.csv"))


def test_durations_and_times_of_day_do_not_depend_on_their_unit():
    for made in (pa.duration, lambda unit: pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)):
        per = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
        tables = [pa.table({"x": pa.array([3 * n, 60 * n], made(unit))}) for unit, n in per.items()]
        assert len({Profile.of(table).columns["x"].mean for table in tables}) == 1


def test_a_column_of_another_type_in_a_later_file_is_refused(tmp_path):
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"a": ["x", "y"]}), tmp_path / "2.parquet")
    with pytest.raises(DataError, match=r"column a is numeric \(int64\) in .*1\.parquet, and categorical"):
        Profile.of(str(tmp_path))
    with pytest.raises(DataError, match=r"column\(s\) a come more than once"):
        Profile.of(pa.table([[1], [2]], names=["a", "a"]))
    with pytest.raises(DataError, match=r"column\(s\) a come more than once"):
        Profile.of(pd.DataFrame([[1, 2]], columns=["a", "a"]))


def test_hidden_files_are_left_out_and_two_formats_are_not_guessed(tmp_path):
    for name in ("a.parquet", ".b.parquet", "_log/c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"a": [1, 2]}), tmp_path / name)
    assert Profile.of(str(tmp_path)).rows == 2
    (tmp_path / "d.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match="has Parquet and CSV files"):
        Profile.of(str(tmp_path))
    assert Profile.of(f"{tmp_path}/*.csv").rows == 1


@pytest.mark.parametrize(("start", "stop"), [(4, 300), (20_000, 20_100)], ids=["header", "values"])
def test_a_page_that_is_damaged_names_its_file(rng, tmp_path, start, stop):
    for name in ("1", "2"):
        table = pa.table({"a": rng.normal(size=5_000)})
        pq.write_table(table, tmp_path / f"{name}.parquet", use_dictionary=False, write_page_checksum=True)
    content = bytearray((tmp_path / "2.parquet").read_bytes())
    content[start:stop] = bytes(stop - start)
    (tmp_path / "2.parquet").write_bytes(content)
    for threads in (1, 2):
        with pytest.raises(DataError, match=r"cannot read .*2\.parquet"):
            Profile.of(str(tmp_path), threads=threads)


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


def test_a_profile_of_version_1_loads_and_merges(rng):
    def first_version(value):
        columns = {
            name: {key: part for key, part in column.items() if key not in ("distinct", "sketch")}
            for name, column in value["columns"].items()
        }
        body = {"rows": value["rows"], "columns": columns}
        content = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return {"profile_version": 1, "digest": hashlib.sha256(content.encode()).hexdigest(), **body}

    now = Profile.of(_parts(rng)[0])
    old = Profile.from_json(first_version(now.to_json()))
    assert old.digest == first_version(now.to_json())["digest"]
    assert [old.columns[name].distinct for name in ("normal", "when", "few")] == [None, None, 5]
    assert Profile.from_json(old.to_json()).digest == old.digest
    for merged in (old.merge(now), now.merge(old)):
        assert (merged.rows, merged.columns["normal"].distinct) == (2 * now.rows, None)
        assert merged.columns["few"].distinct == 5 and merged.columns["word"].distinct == 3


def test_an_oversized_histogram_is_refused_before_it_is_unpacked():
    import base64
    import zlib

    bomb = base64.b64encode(zlib.compress(bytes(100_000_000), 9)).decode()
    with pytest.raises(ValueError, match="size"):
        Histogram.from_json({"shift": 0, "bins": bomb})
