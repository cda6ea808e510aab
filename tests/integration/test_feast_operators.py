"""The Feast operators on a real repository: two-key entities, TTL, created times, aliases, an on-demand view."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from airflow.sdk.exceptions import AirflowFailException

from airflow_mlops.hooks.feast import FeastHook
from airflow_mlops.operators.feast import FeastApplyOperator, FeastMaterializeOperator, FeastTrainingSetOperator

CONFIG = """
project: tiny
provider: local
registry: {registry_type: sql, path: "sqlite:///${TINY_ROOT}/registry.db"}
online_store: {type: sqlite, path: "${TINY_ROOT}/online.db"}
offline_store: {type: file}
entity_key_serialization_version: 3
"""
VIEWS = """
import os
from datetime import timedelta
import pandas as pd
from feast import Entity, FeatureService, FeatureView, Field, FileSource, RequestSource
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64
from feast.value_type import ValueType

ROOT = os.environ["TINY_ROOT"]
city = Entity(name="city", join_keys=["city"], value_type=ValueType.STRING)
line = Entity(name="line", join_keys=["line"], value_type=ValueType.INT64)
weather = FeatureView(name="weather", entities=[city], ttl=timedelta(hours=6),
    schema=[Field(name="temp", dtype=Float64)],
    source=FileSource(name="w", path=f"{ROOT}/weather", timestamp_field="seen", created_timestamp_column="written",
                      field_mapping={"t2m": "temp"}))
delays = FeatureView(name="delays", entities=[city, line], ttl=timedelta(0),
    schema=[Field(name="delay", dtype=Float64)],
    source=FileSource(name="d", path=f"{ROOT}/delays", timestamp_field="event_timestamp"))
request = RequestSource(name="r", schema=[Field(name="hour", dtype=Int64)])

@on_demand_feature_view(name="mixed", sources=[weather, request],
    schema=[Field(name="heat", dtype=Float64)], mode="pandas")
def mixed(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"heat": inputs["temp"] * inputs["hour"]})

service = FeatureService(name="everything", features=[weather, delays, mixed])
"""
START = pd.Timestamp("2024-01-01", tz="UTC")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_ROOT", str(tmp_path))
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "feature_store.yaml").write_text(CONFIG)
    (folder / "views.py").write_text(VIEWS)
    rng = np.random.default_rng(5)
    hours = rng.permutation(24 * 55)[:300]
    weather = pd.DataFrame({"city": rng.choice(["a", "b"], 300), "seen": _at(hours), "t2m": rng.normal(size=300)})
    weather["written"] = weather["seen"] + pd.Timedelta(hours=1)
    corrected = weather.iloc[::7].assign(t2m=99.0, written=lambda f: f["written"] + pd.Timedelta(hours=3))
    _by_month(pd.concat([weather, corrected]), "seen", tmp_path / "weather")
    hours = rng.permutation(24 * 55)[:200]
    delays = pd.DataFrame({"city": rng.choice(["a", "b"], 200), "line": rng.integers(0, 3, 200)})
    delays = delays.assign(event_timestamp=_at(hours), delay=rng.normal(size=200))
    _by_month(delays, "event_timestamp", tmp_path / "delays")
    hours = np.sort(rng.permutation(24 * 55)[:120])
    rows = pd.DataFrame({"city": rng.choice(["a", "b", "unknown"], 120), "line": rng.integers(0, 4, 120)})
    rows = rows.assign(event_timestamp=_at(hours), hour=hours % 24, late=rng.integers(0, 2, 120))
    _by_month(rows, "event_timestamp", tmp_path / "entities")
    FeastApplyOperator(task_id="apply", repo_path=str(folder)).execute({})
    return folder


def _at(hours):
    return (START + pd.to_timedelta(hours, unit="h")).astype("datetime64[us, UTC]")


def _by_month(frame, column, folder):
    folder.mkdir()
    for month, part in frame.groupby(frame[column].dt.month):
        part.to_parquet(folder / f"2024-{month:02d}.parquet", index=False)


def training_set(repository, name="set.parquet", **changes):
    root = repository.parent
    arguments = {
        "repo_path": str(repository),
        "feature_service": "everything",
        "entity_uri": str(root / "entities"),
        "output_uri": str(root / "sets" / name),
        "label_column": "late",
        "window_start": "2024-01-01",
        "window_end": "2024-03-01",
    }
    return FeastTrainingSetOperator(task_id="set", **(arguments | changes)).execute({})


def materialize(repository, month, **changes):
    window = {"window_start": f"2024-{month:02d}-01", "window_end": f"2024-{month + 1:02d}-01"}
    return FeastMaterializeOperator(task_id="m", repo_path=str(repository), **(window | changes)).execute({})


def online(repository):
    store = FeastHook(repo_path=str(repository)).store
    keys = [{"city": city, "line": line} for city in "ab" for line in range(3)]
    return store.get_online_features(["delays:delay"], keys).to_dict()["delay"]


def newest(repository, until):
    rows = pd.concat(pd.read_parquet(path) for path in sorted((repository.parent / "delays").glob("*")))
    rows = rows[rows["event_timestamp"] < pd.Timestamp(until, tz="UTC")].sort_values("event_timestamp")
    last = rows.groupby(["city", "line"])["delay"].last()
    return [last.get((city, line)) for city in "ab" for line in range(3)]


def test_apply_registers_and_again_changes_nothing(repository):
    again = FeastApplyOperator(task_id="apply", repo_path=str(repository)).execute({})
    assert again["changes"] == []
    assert again["registered"]["feature_views"] == ["delays", "weather"]
    assert again["registered"]["on_demand_feature_views"] == ["mixed"]
    (repository / "views.py").write_text(VIEWS.replace('name="everything"', 'name="all"'))
    changed = FeastApplyOperator(task_id="apply", repo_path=str(repository)).execute({})
    assert changed["registered"]["feature_services"] == ["all"]


def test_the_set_equals_feasts_own_historical_features(repository):
    # Feast's file store picks at random among rows of one event time, so corrections are left out here.
    for path in (repository.parent / "weather").glob("*"):
        rows = pd.read_parquet(path)
        rows[rows["t2m"] != 99.0].to_parquet(path, index=False)
    result = training_set(repository)
    ours = pd.read_parquet(result["uri"])
    assert result["features"] == ["temp", "delay", "heat"]
    store = FeastHook(repo_path=str(repository)).store
    entities = pd.concat(pd.read_parquet(path) for path in sorted((repository.parent / "entities").glob("*")))
    theirs = store.get_historical_features(entities, store.get_feature_service("everything")).to_df()
    both = ours.merge(theirs, on=["city", "line", "event_timestamp", "hour", "late"], suffixes=("", "_feast"))
    assert len(both) == len(theirs) > 40
    for name in result["features"]:
        np.testing.assert_array_equal(both[name].to_numpy(float), both[f"{name}_feast"].to_numpy(float))
    assert both["temp"].notna().sum() > 20
    # Feast loses entity rows whose every candidate is out of TTL or in the future; here they stay, without values.
    assert len(ours) == result["rows"] == 120
    lost = ours.merge(theirs[["city", "line", "event_timestamp"]], how="left", indicator=True)
    lost = lost[lost["_merge"] == "left_only"]
    assert (lost["temp"].isna() | lost["delay"].isna()).all()


@pytest.mark.parametrize("known_only", [False, True])
def test_corrected_values_follow_their_created_time(repository, known_only):
    result = training_set(repository, filter_by_created_timestamp=known_only)
    weather = pd.concat(pd.read_parquet(path) for path in sorted((repository.parent / "weather").glob("*")))
    seen = []
    for row in pd.read_parquet(result["uri"]).itertuples():
        at = row.event_timestamp
        usable = weather[(weather["city"] == row.city) & weather["seen"].between(at - pd.Timedelta(hours=6), at)]
        usable = usable[usable["written"] <= at] if known_only else usable
        expected = usable.sort_values(["seen", "written"])["t2m"].iloc[-1] if len(usable) else np.nan
        np.testing.assert_equal(row.temp, expected)
        seen.append(expected)
    assert 99.0 in seen
    assert (result["late_rows"] == 0) == known_only


def test_the_same_window_is_the_same_bytes_and_the_manifest_says_what_they_are(repository):
    first, second = training_set(repository), training_set(repository, "other.parquet")
    assert first["sha256"] == second["sha256"]
    with open(first["uri"], "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest() == first["sha256"]
    with open(first["manifest_uri"]) as file:
        manifest = json.load(file)
    assert manifest["sha256"] == first["sha256"]
    assert [view["view"] for view in manifest["views"]] == ["weather", "delays"]
    january = training_set(repository, "jan.parquet", window_end="2024-02-01")
    assert 0 < january["rows"] < first["rows"]
    assert pd.read_parquet(january["uri"])["event_timestamp"].max() < pd.Timestamp("2024-02-01", tz="UTC")


def test_a_view_left_in_materialization_can_still_be_joined(repository):
    from feast.feature_view import FeatureViewState

    store = FeastHook(repo_path=str(repository)).store
    view = store.get_feature_view("weather")
    view.state = FeatureViewState.MATERIALIZING
    store.registry.apply_feature_view(view, "tiny")
    assert training_set(repository)["rows"] == 120


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entity_uri": "/nowhere"}, "nothing is at /nowhere"),
        ({"feature_service": "nope"}, "unknown feature service 'nope'.*everything"),
        ({"feature_service": None, "features": ["nope:x"]}, "unknown feature view 'nope'.*delays"),
        ({"feature_service": None, "features": ["weather:x"]}, "feature of view 'weather'.*temp"),
        ({"feature_service": None}, "either feature_service or features"),
        ({"window_start": "2030-01-01", "window_end": "2030-02-01"}, "no entity row"),
        ({"label_column": "nope"}, "lack the columns \\['nope'\\]"),
        ({"repo_path": "/nowhere"}, "no feature_store.yaml"),
    ],
)
def test_bad_input_names_the_fix(repository, changes, message):
    with pytest.raises(AirflowFailException, match=message):
        training_set(repository, **changes)


def test_bad_entity_rows_and_sources_name_the_fix(repository):
    root = repository.parent
    rows = pd.read_parquet(root / "entities" / "2024-01.parquet")
    rows.drop(columns="line").to_parquet(root / "keyless.parquet")
    with pytest.raises(AirflowFailException, match="lack the columns \\['line'\\]"):
        training_set(repository, entity_uri=str(root / "keyless.parquet"))
    rows.assign(event_timestamp=rows["event_timestamp"].dt.tz_localize(None)).to_parquet(root / "naive.parquet")
    with pytest.raises(AirflowFailException, match="without a time zone"):
        training_set(repository, entity_uri=str(root / "naive.parquet"))
    for file in (root / "delays").glob("*"):
        file.unlink()
    with pytest.raises(AirflowFailException, match=r"'delays'.*no \*.parquet file"):
        training_set(repository)


def test_an_unset_variable_is_named(repository, monkeypatch):
    monkeypatch.delenv("TINY_ROOT")
    with pytest.raises(AirflowFailException, match="TINY_ROOT"):
        training_set(repository, entity_uri="x", output_uri="y")


def test_materialize_in_order_counts_rows_and_a_rerun_changes_nothing(repository):
    first = materialize(repository, 1)
    assert first["views"]["weather"]["rows"] == 2
    assert online(repository) == newest(repository, "2024-02-01")
    materialize(repository, 2)
    assert online(repository) == newest(repository, "2024-03-01")
    materialize(repository, 2)
    assert online(repository) == newest(repository, "2024-03-01")


def test_the_end_of_the_window_is_exclusive(repository):
    stamp = pd.DataFrame({"city": ["a"], "line": [0], "event_timestamp": _at([24 * 31]), "delay": [777.0]})
    stamp.to_parquet(repository.parent / "delays" / "2024-02-01.parquet", index=False)
    materialize(repository, 1)
    assert online(repository)[0] != 777.0


def test_an_older_window_is_refused_or_leaves_newer_values_alone(repository):
    materialize(repository, 2)
    before = online(repository)
    with pytest.raises(AirflowFailException, match=r"older than what the online store holds.*allow_older"):
        materialize(repository, 1)
    assert online(repository) == before
    result = materialize(repository, 1, allow_older=True)
    assert result["views"]["weather"] == {"rows": 0, "kept_newer": 2}
    assert online(repository) == newest(repository, "2024-03-01")
