"""The feature repository with a real Feast: apply, materialize, online and point-in-time reads."""

from __future__ import annotations

import datetime as dt
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.examples.flights import experiment, features, source

REPO = Path(__file__).parents[2] / "feature_repo"
MONTHS = ("2013-01", "2013-02")
SERVICE = "flights_delay_v1"
KEYS = [*features.ENTITY_KEYS, "event_timestamp", "sched_minute", "sched_duration"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    for month in MONTHS:
        experiment.prepare(str(root), month)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLOPS_ROOT", str(root))
        patch.chdir(REPO)
        patch.syspath_prepend("")
        from feast import FeatureStore
        from feast.repo_operations import parse_repo

        store = FeatureStore(repo_path=str(REPO))
        repo = parse_repo(REPO)
        objects = [
            repo.entities,
            repo.data_sources,
            repo.feature_views,
            repo.on_demand_feature_views,
            repo.feature_services,
        ]
        store.apply([item for kind in objects for item in kind])
        for month in MONTHS:
            window = source.month_window(month)
            store.materialize(window.start, window.end - dt.timedelta(microseconds=1))
        yield store
    sys.modules.pop("flights", None)


@pytest.fixture(scope="module")
def root(store):
    return str(Path(store.config.online_store.path).parent)


def _service_features(store) -> list[str]:
    service = store.get_feature_service(SERVICE)
    return [feature.name for projection in service.feature_view_projections for feature in projection.features]


def test_everything_lies_below_the_root(store, root):
    assert Path(root, "feast_registry.db").exists()
    assert Path(root, "feast_online.db").exists()
    assert {e.name for e in store.list_entities()} >= set(features.ENTITY_KEYS)


def test_the_service_gives_the_features_the_model_reads(store):
    assert sorted(_service_features(store)) == sorted(features.feature_names())


def test_online_values_are_the_last_known_of_the_last_month(store, root):
    rows = pd.DataFrame(
        {"carrier": ["UA", "B6"], "origin": ["EWR", "JFK"], "dest": ["ORD", "BOS"], "tailnum": ["N14228", "UNKNOWN"]}
    ).assign(sched_minute=600, weekday=4, distance=719, sched_duration=150)
    online = store.get_online_features(
        features=store.get_feature_service(SERVICE), entity_rows=rows.to_dict("records")
    ).to_df()
    last = {
        view: source.read_parquet(f"{root}/features/{view}/2013-02.parquet", "").to_pandas()
        for view in features.DELAY_VIEWS
    }
    for view, keys in features.DELAY_VIEWS.items():
        for i, row in rows.iterrows():
            newest = last[view][(last[view][list(keys)] == row[list(keys)]).all(axis=1)].iloc[-1]
            for name in features.delay_features(view):
                np.testing.assert_allclose(float(online.loc[i, name]), newest[name])
    np.testing.assert_allclose(online["dep_sin"].astype(float), features.calendar(rows)["dep_sin"])
    assert online.loc[0, "seats"] > 0
    assert online.loc[1, ["seats", "plane_age"]].isna().all()


def test_historical_features_equal_an_independent_join(store, root):
    entities = source.read_parquet(f"{root}/entities/flights/2013-02.parquet", "").to_pandas()
    sample = entities.drop_duplicates(KEYS).sample(40, random_state=0)
    joined = store.get_historical_features(entity_df=sample, features=store.get_feature_service(SERVICE)).to_df()
    both = joined.merge(experiment.join(root, ["2013-02"]).drop_duplicates(KEYS), on=KEYS, suffixes=("", "_plain"))
    assert len(both) == 40
    names = features.feature_names()
    plain = both[[f"{name}_plain" for name in names]].set_axis(names, axis=1)
    pd.testing.assert_frame_equal(both[names].astype(float), plain, check_exact=False, rtol=1e-12)
    assert both[names].notna().mean().mean() > 0.9
