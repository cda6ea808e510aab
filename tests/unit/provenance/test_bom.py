"""The bill of materials: valid by CycloneDX's own schema, complete by the published scoring."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from airflow_mlops import storage
from airflow_mlops.examples.flights.documentation import DOCUMENTATION
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.provenance import ModelRecord
from airflow_mlops.provenance.bom import bom_of, check
from airflow_mlops.provenance.completeness import CATEGORIES, FIELDS, completeness
from airflow_mlops.provenance.modelcard import energy_of

IMAGE = "sha256:" + "ab" * 32


@pytest.fixture
def record(told):
    """Documented as the flights model is."""
    return replace(told.record, documentation=DOCUMENTATION)


@pytest.fixture
def bom(record):
    return bom_of(record, download_url="s3://models/late/1")


def component(bom, ref):
    return next(one for one in bom["components"] if one["bom-ref"] == ref)


def test_it_fits_the_schema_and_is_cyclonedx_1_6(bom):
    check(bom)
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")


def test_the_check_can_fail(bom):
    broken = copy.deepcopy(bom)
    broken["components"][0]["modelCard"]["considerations"]["surprise"] = 1
    with pytest.raises(InvalidInputError, match=r"does not fit CycloneDX 1\.6.*surprise"):
        check(broken)


def test_the_first_component_is_the_model(bom, record):
    model = bom["components"][0]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", "late", "1")
    assert model["purl"] == "pkg:mlflow/late@1" and model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    hashes = {file["name"]: file["hashes"][0]["content"] for file in model["components"]}
    assert hashes == {file["path"]: file["sha256"] for file in record.artifacts}
    facts = {one["name"]: one["value"] for one in model["properties"]}
    assert facts["mlops:git_revision"] == record.code["revision"] and facts["mlops:canary"] == "PROMOTE"
    assert facts["mlops:gate"] == "true"


def test_data_libraries_and_image_are_what_the_model_depends_on(record):
    bom = bom_of(replace(record, environment={**record.environment, "image": "h/t:1", "image_digest": IMAGE}))
    assert component(bom, "training_set")["hashes"] == [
        {"alg": "SHA-256", "content": record.get("data.training_set.sha256")}
    ]
    md5 = record.get("data.snapshot.md5")
    assert component(bom, "snapshot")["version"] == md5
    assert component(bom, "snapshot")["hashes"] == [{"alg": "MD5", "content": md5.removesuffix(".dir")}]
    assert component(bom, "image")["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    libraries = {one["purl"] for one in bom["components"] if one["type"] == "library"}
    pins = record.get("environment.lock.packages")
    assert len(libraries) == len(pins) > 100
    needs = next(one for one in bom["dependencies"] if one["ref"] == "model")["dependsOn"]
    assert {"training_set", "snapshot", "image", "python", *libraries} == set(needs)
    datasets = bom["components"][0]["modelCard"]["modelParameters"]["datasets"]
    assert [one["ref"] for one in datasets] == ["training_set", "snapshot"]


def test_the_card_holds_what_was_measured(bom):
    measured = bom["components"][0]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {"type": "auc", "value": "0.77"} in measured
    assert {"type": "gain_in_log_loss", "value": "0.01", "slice": "origin=JFK"} in measured
    assert {"type": "train_log_loss", "value": "0.41", "slice": "training"} in measured


def test_the_same_record_is_the_same_document_and_another_is_another(record, bom):
    assert bom_of(record, download_url="s3://models/late/1") == bom
    assert bom_of(replace(record, metrics={"auc": 0.1}))["serialNumber"] != bom["serialNumber"]


def test_a_record_that_knows_nothing_makes_a_valid_document(tmp_path):
    bom = bom_of(ModelRecord("m", "1"))
    check(bom)
    found = completeness(bom)
    assert found.score < 50 and {"datasets", "energyConsumption", "primaryPurpose"} <= set(found.missing)


def test_the_flights_model_is_complete_to_95(bom):
    found = completeness(bom)
    # Nothing else is missing than the address of a repository, which a checkout without a remote does not know.
    assert set(found.missing) <= {"vcs"} and found.score >= 95
    assert found.categories | {"external_references": 0} == CATEGORIES | {"external_references": 0}


def test_a_remote_is_where_the_code_is(record):
    bom = bom_of(replace(record, code={**record.code, "repository": "https://git.example.com/ml.git"}))
    check(bom)
    assert "vcs" not in completeness(bom).missing


def test_a_version_without_documentation_is_not(record):
    assert completeness(bom_of(replace(record, documentation={}))).score < 70


class TestCompleteness:
    def test_the_fields_are_the_registrys(self):
        counts = {category: sum(field.category == category for field in FIELDS) for category in CATEGORIES}
        assert counts == {
            "required_fields": 4, "metadata": 5, "component_basic": 7, "component_model_card": 17,
            "external_references": 4,
        }  # fmt: skip
        tiers = {
            tier: sum(field.tier == tier for field in FIELDS) for tier in ("critical", "important", "supplementary")
        }
        assert tiers == {"critical": 9, "important": 12, "supplementary": 16} and sum(CATEGORIES.values()) == 100

    def test_nothing_scores_nothing(self):
        assert completeness({}).score == 0.0

    @pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
    def test_each_field_counts_by_its_share_of_its_category(self, bom, field):
        complete = copy.deepcopy(bom)
        complete["components"][0]["externalReferences"].append({"type": "vcs", "url": "https://host/repo"})
        assert completeness(complete).score == 100
        for place in field.places:
            remove(complete, place)
        found = completeness(complete)
        fields = sum(other.category == field.category for other in FIELDS)
        gone = [name for name in found.missing]
        assert field.name in gone
        if gone == [field.name]:
            most = CATEGORIES[field.category]
            assert found.score == round(100 - most + round(most * (fields - 1) / fields, 1), 1)

    @pytest.mark.parametrize(("missing", "penalty"), [(1, 1.0), (2, 0.9), (3, 0.9), (4, 0.8)])
    def test_missing_critical_fields_cost_more_than_their_points(self, bom, missing, penalty):
        for name in ["bomFormat", "specVersion", "serialNumber", "version"][:missing]:
            del bom[name]
        assert completeness(bom).penalty == penalty

    def test_five_missing_important_fields_do_too(self, bom):
        card = bom["components"][0]["modelCard"]
        del card["considerations"]["ethicalConsiderations"], card["considerations"]["technicalLimitations"]
        del card["considerations"]["useCases"], card["modelParameters"]["datasets"]
        assert completeness(bom).penalty == 1.0
        del card["modelParameters"]["modelArchitecture"]
        assert completeness(bom).penalty == 0.95

    @pytest.mark.parametrize("value", ["unknown", "NOASSERTION", " ", None])
    def test_a_word_that_says_nothing_is_no_answer(self, bom, value):
        bom["components"][0]["description"] = value
        assert "description" in completeness(bom).missing


def remove(bom, place):
    """Take what is at a place out of a document."""
    *path, last = [part for part in place if not (part == "value" or part == "url")] or place
    at = bom
    for part in path:
        at = at[part]
    if isinstance(last, dict):
        at[:] = [entry for entry in at if not last.items() <= entry.items()]
    elif isinstance(at, dict):
        at.pop(last, None)


class TestEnergy:
    @pytest.mark.parametrize(
        ("hours", "watts", "energy"),
        [
            ((2.0, 0.0), {"cpu_watts": 10}, 0.02),
            ((2.0, 1.0), {"cpu_watts": 10, "gpu_watts": 300}, 0.32),
            ((2.0, 1.0), {"cpu_watts": 10}, None),
            ((2.0, 0.0), {}, None),
            ((None, 0.0), {"cpu_watts": 10}, None),
            ((2.0, None), {"cpu_watts": 10, "gpu_watts": 300}, None),
        ],
    )
    def test_it_is_hours_times_assumed_watts_or_nothing(self, hours, watts, energy):
        record = ModelRecord(
            "m", "1", cost={"cpu_hours": hours[0], "gpu_hours": hours[1]}, documentation={"energy": watts}
        )
        assert energy_of(record) == (pytest.approx(energy) if energy is not None else None)


def test_what_is_stored_is_what_is_valid(told):
    stored = storage.read_json(told.papers["bom_uri"])
    check(stored)
    assert told.papers["completeness"] == completeness(stored).score
