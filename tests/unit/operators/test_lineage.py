"""What OpenLineage is told about a training, and about a check of data."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.drift import DriftPolicy, Profile, compare
from airflow_mlops.operators._lineage import (
    CHECK_FACET,
    FACET,
    assertions_of,
    dataset,
    inputs_of,
    lineage_of,
    lineage_of_check,
    metrics_of,
    outputs_of,
)

OUTCOME = {
    "status": "SUCCEEDED",
    "run_key": "r1",
    "run_dir": "s3://runs/r1",
    "attempts": 2,
    "metrics": {"auc": 0.71, "loss": None},
    "checkpoint_uri": "s3://runs/r1/checkpoint_3",
    "model_uri": "s3://runs/r1/_mlops/model",
    "wall_seconds": 60.0,
    "cpu_seconds": 100.0,
    "gpu_seconds": 0.0,
}


@pytest.mark.parametrize(
    ("uri", "named"),
    [
        ("s3://bucket/train/", ("s3://bucket", "train")),
        ("s3://bucket", ("s3://bucket", "/")),
        ("gs://bucket/a/b.parquet", ("gs://bucket", "a/b.parquet")),
        ("abfs://container@account/a", ("abfs://container@account", "a")),
        ("https://user:secret@host/a?sig=secret#x", ("https://host", "a")),
        ("file:///data/x", ("file", "/data/x")),
        ("/data/x/", ("file", "/data/x")),
        ("iris", None),
        ("data/x.parquet", None),
        ("http://[", None),
        (7, None),
        (None, None),
    ],
)
def test_a_uri_is_named_as_openlineage_names_datasets(uri, named):
    assert dataset(uri) == named


def test_what_the_loop_reads_is_found_in_its_config():
    config = {"data": ["s3://b/1", "s3://b/2", "s3://b/1"], "validation": "s3://b/3", "label": "s3://b/no", "eta": 1}
    assert [name for _, name in inputs_of(config)] == ["1", "2", "3"]
    assert inputs_of({"trainer": "xgboost", "config": {"train_uri": "/data/x"}}) == [("file", "/data/x")]
    assert inputs_of(None) == []


def test_what_the_training_wrote_is_found_in_its_result():
    assert outputs_of(OUTCOME) == [("s3://runs", "r1/_mlops/model"), ("s3://runs", "r1/checkpoint_3")]
    assert outputs_of({**OUTCOME, "model_uri": None}) == [("s3://runs", "r1/checkpoint_3")]
    assert outputs_of(None) == []


def test_openlineage_can_send_it():
    pytest.importorskip("airflow.providers.openlineage", reason="needs apache-airflow-providers-openlineage")
    from openlineage.client.serde import Serde

    lineage = lineage_of({"data": "s3://b/train"}, OUTCOME)
    assert [(entry.namespace, entry.name) for entry in lineage.inputs] == [("s3://b", "train")]
    assert [entry.name for entry in lineage.outputs] == ["r1/_mlops/model", "r1/checkpoint_3"]
    sent = json.loads(Serde.to_json(lineage.run_facets[FACET]))
    # Its serializer leaves out what is None.
    told = {"attempts": 2, "gpu_seconds": 0.0, "metrics": {"auc": 0.71}, "run_key": "r1", "run_dir": "s3://runs/r1"}
    assert {name: sent.get(name) for name in told} == told and "status" not in sent
    assert lineage_of({}, None).run_facets == {}


@pytest.fixture
def checked():
    """A profile and the comparison of it: one column drifted, one gone, one stable."""
    rng = np.random.default_rng(1)
    reference = pd.DataFrame({"x": rng.normal(size=900), "c": rng.choice(list("ab"), 900), "gone": 1.0})
    current = pd.DataFrame({"x": np.r_[rng.normal(3, 1, 890), [np.nan] * 10], "c": rng.choice(list("ab"), 900)})
    profiles = Profile.of(reference), Profile.of(current)
    return profiles[1], compare(*profiles, DriftPolicy()), current


def test_metrics_of_a_profile_are_those_of_its_data(checked):
    profile, _, frame = checked
    found = metrics_of(profile)
    assert found["c"] == {"nullCount": 0, "count": 900.0, "distinctCount": 2}
    x = found["x"]
    assert (x["nullCount"], x["count"], x["min"], x["max"]) == (10, 890.0, frame["x"].min(), frame["x"].max())
    assert x["sum"] == pytest.approx(frame["x"].sum())
    assert x["quantiles"]["0.5"] == pytest.approx(frame["x"].median(), abs=0.02)


def test_a_comparison_is_told_as_assertions(checked):
    assert set(assertions_of(checked[1])) == {
        ("quality", False, None),
        ("no_drift", False, None),
        ("quality", True, "x"),
        ("no_drift", False, "x"),
        ("quality", True, "c"),
        ("no_drift", True, "c"),
        ("quality", False, "gone"),
    }


def test_too_little_data_assert_nothing_about_drift(checked):
    report = compare(checked[0], checked[0], DriftPolicy(min_rows=10_000))
    assert {name for name, _, _ in assertions_of(report)} == {"quality"}


def test_openlineage_can_send_a_check(checked):
    pytest.importorskip("airflow.providers.openlineage", reason="needs apache-airflow-providers-openlineage")
    from openlineage.client.serde import Serde

    profile, report, _ = checked
    result = {"verdict": "drift", "retrain": False, "report_uri": "s3://r/a.drift.json", "html_uri": None}
    lineage = lineage_of_check("s3://b/month", "s3://b/train", profile, report, result)
    assert [(entry.namespace, entry.name) for entry in lineage.inputs] == [("s3://b", "month"), ("s3://b", "train")]
    assert [entry.name for entry in lineage.outputs] == ["a.drift.json"]
    current, reference = (json.loads(Serde.to_json(entry)) for entry in lineage.inputs)
    metrics = current["inputFacets"]["dataQualityMetrics"]
    assert metrics["rowCount"] == 900 and metrics["columnMetrics"]["x"]["nullCount"] == 10
    assertions = current["inputFacets"]["dataQualityAssertions"]["assertions"]
    assert ("no_drift", False, "x") in {(a["assertion"], a["success"], a.get("column")) for a in assertions}
    assert not reference.get("inputFacets")
    sent = json.loads(Serde.to_json(lineage.run_facets[CHECK_FACET]))
    assert (sent["verdict"], sent["retrain"]) == ("drift", False)
    assert lineage_of_check("s3://b/month", None, None, None, {}).run_facets == {}
