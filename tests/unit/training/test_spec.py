from __future__ import annotations

import json
import re

import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.spec import (
    TrainingSpec,
    load_callable,
    run_key_of,
    submission_id_of,
    whole,
    worker_count,
)


def make(**changes) -> TrainingSpec:
    values = {"train_fn": "pkg.mod:loop", "trainer": "xgboost", "storage_path": "/runs", "run_key": "r1"} | changes
    return TrainingSpec(**values)


def test_round_trip_through_json():
    spec = make(config={"a": [1, 2]}, num_workers=3, resources_per_worker={"CPU": 2}, attempt=4)
    assert TrainingSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_workers": 0}, "num_workers is 0; expected a whole number of at least 1"),
        ({"num_workers": 1.5}, "num_workers is 1.5"),
        ({"num_workers": True}, "num_workers is True"),
        ({"num_workers": (3, 2)}, "num_workers is (3, 2); expected (min, max) with min <= max"),
        ({"num_workers": (0, 2)}, "num_workers is 0"),
        ({"num_workers": (1, 2, 3)}, "num_workers is (1, 2, 3); expected a whole number or (min, max)"),
        ({"entrypoint": "python train.py"}, "both entrypoint and train_fn and trainer are given"),
        ({"entrypoint": "x", "train_fn": None, "trainer": None, "exporter": "a:b"}, "both entrypoint and exporter"),
        ({"entrypoint": " ", "train_fn": None, "trainer": None}, "entrypoint is ' '; expected a shell command"),
        ({"train_fn": None}, "nothing to train"),
        ({"preemptible": True, "max_failures": 0}, "max_failures is 0 and the workers are preemptible"),
        ({"trainer": "sklearn"}, "trainer is 'sklearn'; expected one of xgboost, lightgbm, torch"),
        ({"train_fn": "pkg.mod.loop"}, '"package.module:function"'),
        ({"train_fn": ""}, "nothing to train"),
        ({"exporter": "nope"}, "exporter is 'nope'"),
        ({"storage_path": ""}, "storage_path is missing"),
        ({"run_key": "../other"}, "names a directory"),
        ({"run_key": "a/b"}, "names a directory"),
        ({"attempt": 0}, "attempt is 0"),
        ({"max_failures": -2}, "max_failures is -2"),
        ({"checkpoints_to_keep": 0}, "checkpoints_to_keep is 0"),
        ({"resources_per_worker": {"CPU": -1}}, "resources_per_worker['CPU'] is -1"),
        ({"resources_per_worker": {"CPU": float("nan")}}, "expected a number >= 0"),
        ({"config": {"x": {1, 2}}}, "config cannot be written as JSON"),
        ({"config": {"x": float("nan")}}, "config cannot be written as JSON"),
    ],
)
def test_errors_name_the_parameter_and_the_fix(changes, words):
    with pytest.raises(InvalidInputError, match=re.escape(words)):
        make(**changes).validate()


def test_spec_of_another_version_is_refused():
    with pytest.raises(InvalidInputError, match="another version of airflow-mlops"):
        TrainingSpec.from_json(make().to_json() | {"later": 1})
    with pytest.raises(InvalidInputError, match="incomplete"):
        TrainingSpec.from_json({"train_fn": "a:b"})


@pytest.mark.parametrize(
    ("value", "expected"),
    [("4", 4), (" (2, 4) ", (2, 4)), ("[2,4]", (2, 4)), ("2,4", (2, 4)), ([2, 4], (2, 4)), (["2", 4], (2, 4))],
)
def test_templated_number_of_workers(value, expected):
    assert worker_count(value) == expected


@pytest.mark.parametrize("value", ["(3,2)", "(2,)", "2-4", "(a, b)", "0,1", [], {"min": 1}, (1.0, 2), "[1, 2, 3]"])
def test_number_of_workers_that_is_none(value):
    with pytest.raises(InvalidInputError, match="num_workers is"):
        worker_count(value)


def test_elastic_workers_travel_as_json():
    spec = make(num_workers=(2, 4))
    again = TrainingSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec and (again.min_workers, again.max_workers) == (2, 4)
    assert (make(num_workers=3).min_workers, make(num_workers=3).max_workers) == (3, 3)


def test_fingerprint_of_a_command_is_of_its_text():
    def of(text: str) -> str:
        return make(train_fn=None, trainer=None, entrypoint=text).fingerprint

    assert of("python a.py") == of("python a.py") != of("python b.py")


@pytest.mark.parametrize("value", ["two", "", "1.5", "{{ params.n }}", None, "0"])
def test_templated_number_that_is_none(value):
    with pytest.raises(InvalidInputError, match=r"num_workers is .*whole number of at least 1"):
        whole("num_workers", value, at_least=1)


def test_templated_number():
    assert whole("num_workers", " 4 ", at_least=1) == 4


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("no_such_module_at_all:loop", "cannot be imported where the driver runs"),
        ("json:no_such_function", "has no function 'no_such_function'"),
        ("json:__name__", "has no function"),
        ("pickle:/no/such/file.pkl", "cannot be loaded"),
    ],
)
def test_callables_that_cannot_be_loaded(reference, words):
    with pytest.raises(InvalidInputError, match=words):
        load_callable(reference)


def test_run_key_is_of_the_logical_run():
    key = run_key_of("dag", "train", "run 2013-04-01T00:00", 3)
    assert key == run_key_of("dag", "train", "run 2013-04-01T00:00", 3)
    others = {
        run_key_of("dag2", "train", "run", 3),
        run_key_of("dag", "train", "run2", 3),
        run_key_of("dag", "train", "run"),
    }
    assert len(others | {key}) == 4
    make(run_key=run_key_of("d", "group.Süß task!" * 20, "r")).validate()


@pytest.mark.parametrize("run_key", ["r1", "2013-04", "A" * 128, "train-0123456789ab"])
def test_submission_id_is_a_kubernetes_name(run_key):
    name = submission_id_of(make(run_key=run_key, attempt=999))
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 47 and name.endswith("-a999")


def test_submission_id_tells_runs_and_attempts_apart():
    specs = [make(), make(attempt=2), make(run_key="r2"), make(storage_path="/other")]
    assert len({submission_id_of(spec) for spec in specs}) == 4


def test_fingerprint_is_of_what_decides_the_model():
    base = make(config={"a": 1, "b": 2})
    assert base.fingerprint == make(config={"b": 2, "a": 1}, attempt=7, num_workers=5).fingerprint
    assert base.fingerprint != make(config={"a": 1, "b": 3}).fingerprint
    pickled = make(train_fn="pickle:/x", name="loop@1")
    assert pickled.fingerprint == make(train_fn="pickle:/y", name="loop@1").fingerprint
    assert pickled.fingerprint != make(train_fn="pickle:/x", name="loop@2").fingerprint
