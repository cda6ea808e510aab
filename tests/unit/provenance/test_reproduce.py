"""What it takes to train again, what has changed since, and whether it gave the same."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from airflow_mlops import environment
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.provenance import ModelRecord, compare_metrics, reproduce
from airflow_mlops.provenance.reproduce import NEEDED, configuration, surroundings_changed
from airflow_mlops.training.spec import TrainingSpec


@pytest.fixture
def record(told):
    found = told.record
    return replace(found, parameters={name: value for name, value in found.parameters.items() if name != "api_token"})


def test_the_configuration_is_what_was_trained(record, told):
    world, found = told.world, configuration(record)
    assert found["snapshot"] == {"md5": world.snapshot["md5"], "remote": world.snapshot["remote"]}
    assert found["training_set"]["window"] == world.training_set["window"]
    assert found["training_set"]["feature_service"] == "late_v1"
    assert found["seeds"] == {"params.seed": 7} and found["metrics"]["train_log_loss"] == 0.41
    # A loop started from it is the same loop.
    training = {name: value for name, value in found["training"].items() if value is not None}
    spec = TrainingSpec(storage_path="/x", run_key="again", **training)
    spec.validate()
    assert (spec.train_fn, spec.num_workers) == ("airflow_mlops.examples.xgboost_loop:train_loop_per_worker", 2)
    assert spec.config["params"] == {"seed": 7, "eta": 0.1}


def test_a_masked_parameter_is_not_trained_with(told):
    with pytest.raises(InvalidInputError, match=r"\['parameters.api_token'\] were taken for secrets"):
        reproduce("late", "1", told.world.hook.client)


@pytest.mark.parametrize("path", NEEDED)
def test_what_is_lacking_is_named(record, path):
    value = record.to_json()
    *way, last = path.split(".")
    at = value
    for part in way:
        at = at[part]
    at[last] = None
    with pytest.raises(InvalidInputError, match=rf"does not say \['{path}'\]"):
        configuration(ModelRecord.from_json(value))


def test_a_lost_run_directory_cannot_be_reproduced(world):
    world.register()
    shutil.rmtree(world.training["run_dir"])
    with pytest.raises(InvalidInputError, match=r"does not say .*'parameters'.*'training.train_fn'"):
        reproduce("late", "1", world.hook.client)


def test_what_has_changed_around_it_is_told(record):
    now = environment.describe()
    assert surroundings_changed(record, now) == []
    pins = [pin for pin in now["lock"]["packages"] if not pin.startswith("xgboost==")]
    other = {**now, "python": "3.99.0", "lock": environment.lock((*pins, "zzz==1"))}
    version = dict(pin.split("==", 1) for pin in now["lock"]["packages"])["xgboost"]
    assert surroundings_changed(record, other) == [
        f"python was {now['python']} and is 3.99.0",
        f"xgboost was {version} and is absent",
        "zzz was absent and is 1",
    ]


@pytest.mark.parametrize(
    ("found", "tolerance", "differs"),
    [
        ({"loss": 0.5, "auc": 0.8}, 0.0, set()),
        ({"loss": 0.5, "auc": 0.8, "more": 1}, 0.0, set()),
        ({"loss": 0.5000001, "auc": 0.8}, 0.0, {"loss"}),
        ({"loss": 0.5000001, "auc": 0.8}, 1e-6, set()),
        ({"loss": 0.5}, 1.0, {"auc"}),
        ({"loss": float("nan"), "auc": None}, 1.0, {"loss", "auc"}),
    ],
)
def test_metrics_are_the_same_or_named(found, tolerance, differs):
    expected = {"loss": 0.5, "auc": 0.8, "time_total_s": 9.0, "done": True, "note": "x"}
    assert set(compare_metrics(expected, found, tolerance)) == differs


@pytest.mark.parametrize("expected", [{}, {"time_total_s": 3.0}, {"note": "x"}])
def test_nothing_to_compare_is_no_success(expected):
    with pytest.raises(InvalidInputError, match="holds no metric to compare with"):
        compare_metrics(expected, {})
