"""What OpenLineage is told about a training."""

from __future__ import annotations

import json

import pytest

from airflow_mlops.operators._lineage import FACET, dataset, inputs_of, lineage_of, outputs_of

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
