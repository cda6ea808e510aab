from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from airflow_mlops.examples.flights import experiment, features, train
from airflow_mlops.exceptions import DataError


@pytest.fixture
def files(tmp_path):
    """Three files with row groups of seven, 50 rows in all, numbered."""
    numbers = np.arange(50)
    for part, rows in enumerate(np.split(numbers, [20, 31])):
        pq.write_table(pa.table({"n": rows, "x": rows / 2}), tmp_path / f"{part}.parquet", row_group_size=7)
    return str(tmp_path)


@pytest.mark.parametrize("workers", [1, 2, 3, 50])
def test_shards_partition_the_rows_in_order(files, workers):
    parts = [train.read_shard(files, ["n"], rank, workers) for rank in range(workers)]
    assert [n for part in parts for n in part["n"].to_pylist()] == list(range(50))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts[0].column_names == ["n"]


def test_a_shard_from_a_uri(files):
    assert train.read_shard(f"file://{files}/0.parquet", ["n"], 1, 2)["n"].to_pylist() == list(range(10, 20))


def test_what_a_training_set_lacks_is_named(files):
    with pytest.raises(DataError, match=r"lacks the columns \['y'\]"):
        train.read_shard(files, ["n", "y"], 0, 1)
    with pytest.raises(DataError, match=r"50 rows, none for worker 0 of 51"):
        train.read_shard(files, ["n"], 0, 51)
    with pytest.raises(DataError, match="2 rows have no 'late'"):
        train.target(pa.table({"late": [1, None, 0, None]}), "late")


def test_matrix_takes_null_as_missing():
    made = train.matrix(pa.table({"a": [1, None], "b": [0.5, 2.0]}), ["b", "a"])
    np.testing.assert_equal(made, np.array([[0.5, 1], [2, np.nan]], dtype="float32"))


def test_recency_halves_with_each_half_life():
    start = dt.datetime(2013, 1, 1, tzinfo=dt.timezone.utc)
    times = pa.chunked_array([[start, start + dt.timedelta(days=30), start + dt.timedelta(days=60)]])
    np.testing.assert_allclose(train.recency(times, 30), [0.25, 0.5, 1])


def test_the_plain_script_learns_from_the_past_month(built):
    january, february = (experiment.join(built, [month]) for month in ("2013-01", "2013-02"))
    model = experiment.fit(january, rounds=40)
    from sklearn.metrics import roc_auc_score

    probability = experiment.predict(model, february)
    assert roc_auc_score(february["late"], probability) > 0.65
    assert model.feature_names == features.feature_names()
    assert (probability == experiment.predict(experiment.fit(january, rounds=40), february)).all()


@pytest.mark.parametrize(("first", "last"), [(3, 5), (6, 5), (5, 13)])
def test_replay_refuses_months_it_cannot_score(tmp_path, first, last):
    with pytest.raises(DataError, match="4 <= first <= last <= 12"):
        experiment.replay(str(tmp_path), first, last)
