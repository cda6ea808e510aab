"""A record as an event of the OpenLineage specification."""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import replace

import pytest

from airflow_mlops import storage
from airflow_mlops.provenance import ModelRecord
from airflow_mlops.provenance.openlineage import event_of


@pytest.fixture
def event(told):
    return storage.read_json(told.papers["record_uri"].replace("record.json", "openlineage.json"))


def facets(event):
    yield from event["run"]["facets"].values()
    yield from event["job"]["facets"].values()
    for dataset in [*event["inputs"], *event["outputs"]]:
        yield from dataset["facets"].values()
        yield from dataset.get("inputFacets", {}).values()


def test_it_has_what_the_specification_requires(event):
    uuid.UUID(event["run"]["runId"])
    assert dt.datetime.fromisoformat(event["eventTime"]).tzinfo
    assert event["eventType"] == "COMPLETE" and event["producer"] and event["schemaURL"].endswith("RunEvent")
    assert event["job"] == {"namespace": "airflow", "name": "training.train", "facets": event["job"]["facets"]}
    found = list(facets(event))
    assert len(found) >= 5
    for facet in found:
        assert facet["_producer"].startswith("https://") and "#" in facet["_schemaURL"]


def test_it_leads_from_the_data_to_the_version(event, told):
    world = told.world
    raw, rows = event["inputs"]
    assert (raw["namespace"], raw["name"]) == ("file", world.snapshot["uri"])
    assert raw["facets"]["version"]["datasetVersion"] == world.snapshot["md5"]
    assert rows["facets"]["version"]["datasetVersion"] == world.training_set["sha256"]
    assert [field["name"] for field in rows["facets"]["schema"]["fields"]] == ["a", "b", "c"]
    assert rows["inputFacets"]["dataQualityMetrics"]["rowCount"] == 300
    (version,) = event["outputs"]
    assert (version["name"], version["facets"]["version"]["datasetVersion"]) == ("models:/late", "1")
    told = event["run"]["facets"]["mlops_model"]
    assert told["gate_passed"] is True and told["metrics"]["train_log_loss"] == 0.41


def test_the_same_record_is_the_same_event(event, told):
    assert event_of(told.record) == event


def test_a_checkout_with_a_remote_is_the_job_s_source(told):
    code = {**told.record.code, "repository": "https://git.example.com/ml.git", "revision": "c0ffee"}
    place = event_of(replace(told.record, code=code))["job"]["facets"]["sourceCodeLocation"]
    assert (place["type"], place["repoUrl"], place["version"]) == ("git", "https://git.example.com/ml.git", "c0ffee")
    assert place["_schemaURL"].endswith("SourceCodeLocationJobFacet")


def test_a_record_that_knows_nothing_names_no_data():
    event = event_of(ModelRecord("m", "1"))
    assert event["inputs"] == [] and "data.views" in event["run"]["facets"]["mlops_model"]["unknown"]
