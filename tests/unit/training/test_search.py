"""What a search looks for, and how an interrupted one goes on; trials themselves are in tests/integration."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest

from airflow_mlops import storage
from airflow_mlops.exceptions import InvalidInputError, TrainingError
from airflow_mlops.training.raytrain import Clusterless
from airflow_mlops.training.search import Search
from airflow_mlops.training.spec import TrainingSpec
from airflow_mlops.training.tune import (
    Names,
    Trial,
    best_of,
    concurrency,
    distributions,
    read_trials,
    require_optuna,
    search_records,
    searcher,
    trial_spec,
)

SPACE = {
    "params.eta": {"type": "float", "low": 0.01, "high": 1.0, "log": True},
    "params.max_depth": {"type": "int", "low": 2, "high": 8, "step": 2},
    "booster": ["gbtree", "dart"],
}
CONFIG = {"space": SPACE, "metric": "loss", "trainer": "xgboost", "num_samples": 4, "seed": 1}


def spec_of(storage_path="/runs", **config) -> TrainingSpec:
    return TrainingSpec("pkg.mod:loop", "tune", str(storage_path), "r1", config=CONFIG | config)


def trial(number: int, value: float | None, status: str = "FINISHED", eta: float = 0.1) -> Trial:
    params = {"params.eta": eta, "params.max_depth": 4, "booster": "dart"}
    uri = f"/runs/r1/trials/t{number:05d}/checkpoint_1" if value is not None else None
    return Trial(f"t{number:05d}", params, status, value, {"loss": value}, uri, None if value else "broken")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": {}}, "config['space'] is missing"),
        ({"metric": None}, "config['metric'] is missing"),
        ({"trainer": "tune"}, "config['trainer'] is 'tune'; expected one of xgboost"),
        ({"mode": "lowest"}, "config['mode'] is 'lowest'; expected 'min' or 'max'"),
        ({"num_samples": 0}, "config['num_samples'] is 0"),
        ({"max_concurrent": 1.5}, "config['max_concurrent'] is 1.5"),
        ({"rounds": 5}, "does not know config['rounds']"),
        ({"config": [1]}, "must be dicts"),
        ({"space": {"a": []}}, "config['space']['a'] is []; expected a list of at least one"),
        ({"space": {"a": [{"b": 1}]}}, "expected a list of at least one number, text or null"),
        ({"space": {"a": {"type": "normal"}}}, "expected a list of choices, or"),
        ({"space": {"a": {"type": "float", "low": 0}}}, "config['space']['a']['high'] is None"),
        ({"space": {"a": {"type": "int", "low": 0, "high": 1.5}}}, "['high'] is 1.5; expected a number of type int"),
        ({"space": {"a": {"type": "float", "low": 2, "high": 1}}}, "low 2 is above high 1"),
        ({"space": {"a": {"type": "float", "low": 0, "high": 1, "log": True}}}, "needs low > 0 and no step"),
        ({"space": {"a": {"type": "int", "low": 1, "high": 4, "step": 0}}}, "['step'] is 0"),
        ({"space": {"a": {"type": "int", "low": 1, "high": 4, "lo": 0}}}, "unknown entry 'lo'"),
        ({"space": {"a/b": [1]}}, 'a name cannot hold "/"'),
        ({"space": {"a.b": [1]}, "config": {"a": 3}}, "config['config'] has no dict at 'a'"),
    ],
)
def test_a_bad_search_is_refused_before_anything_runs(changes, words):
    with pytest.raises(InvalidInputError, match=re.escape(words)):
        spec_of(**changes).validate()


def test_the_search_travels_with_the_spec():
    spec = spec_of()
    assert TrainingSpec.from_json(spec.to_json()) == spec
    assert spec.fingerprint != spec_of(num_samples=5).fingerprint


def test_a_trial_is_a_run_of_its_own_with_its_parameters_in_place():
    what = Search.of(CONFIG | {"config": {"rounds": 5, "params": {"eta": 9, "seed": 3}}})
    inner = trial_spec(spec_of(), what, "t00007", {"params.eta": 0.5, "booster": "dart"})
    assert inner.run_dir == "/runs/r1/trials/t00007" and inner.trainer == "xgboost"
    assert inner.config == {"rounds": 5, "params": {"eta": 0.5, "seed": 3}, "booster": "dart"}
    assert what.config["params"]["eta"] == 9, "the shared config is not touched"
    inner.validate()


def test_best_trial():
    trials = [trial(1, 0.5), trial(2, 0.2), trial(3, 0.2), trial(4, 0.9), trial(5, None, "FAILED")]
    best = best_of(spec_of(), Search.of(CONFIG), trials)
    assert best.checkpoint_uri.endswith("t00002/checkpoint_1") and (best.finished, best.failed) == (4, 1)
    best = best_of(spec_of(), Search.of(CONFIG | {"mode": "max"}), trials)
    assert best.checkpoint_uri.endswith("t00004/checkpoint_1") and best.metrics == {"loss": 0.9}


def test_a_search_without_a_finished_trial_fails():
    what = Search.of(CONFIG)
    with pytest.raises(TrainingError, match=r"(?s)all 2 trials have failed.*t00002 .*broken"):
        best_of(spec_of(), what, [trial(1, None, "FAILED"), trial(2, None, "FAILED")])
    with pytest.raises(Clusterless):
        best_of(spec_of(), what, [trial(1, None, "FAILED"), trial(2, None, "RUNNING")])


def test_records_are_read_back(tmp_path):
    spec = spec_of(tmp_path)
    assert search_records(spec) is None and read_trials(spec) == []
    for entry in (trial(2, None, "RUNNING"), trial(1, 0.5)):
        storage.write_json(spec.file("trials", f"{entry.name}.json"), vars(entry))
    assert read_trials(spec) == [trial(1, 0.5), trial(2, None, "RUNNING")]
    assert search_records(spec) == str(tmp_path / "r1/_mlops/trials")


def test_an_unfinished_trial_keeps_its_name_and_no_two_have_one():
    names = Names([trial(1, 0.5), trial(3, None, "RUNNING", eta=0.3), trial(4, None, "RUNNING", eta=0.3)])

    def ask(identity: str, eta: float) -> str:
        return names(
            SimpleNamespace(trial_id=identity, config={"params.eta": eta, "params.max_depth": 4, "booster": "dart"})
        )

    assert [ask("a", 0.3), ask("b", 0.7), ask("c", 0.3), ask("d", 0.3)] == ["t00003", "t00005", "t00004", "t00006"]
    assert ask("a", 0.3) == "t00003"
    assert copy.deepcopy(names) is names, "Ray Tune copies it for every trial"


@pytest.mark.parametrize(
    ("have", "resources", "workers", "expected"),
    [
        ({"CPU": 8.0}, None, 2, 4),
        ({"CPU": 8.0}, {"CPU": 3}, 2, 1),
        ({"CPU": 1.0}, None, 2, 1),
        ({"CPU": 64.0, "GPU": 4.0}, {"GPU": 1}, 1, 4),
    ],
)
def test_as_many_trials_as_fit(have, resources, workers, expected):
    spec = TrainingSpec("a:b", "tune", "/r", "r1", resources_per_worker=resources, num_workers=workers)
    assert concurrency(spec, have) == expected


def test_library_that_is_not_installed(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InvalidInputError, match=r"airflow-mlops\[tune\]"):
        require_optuna()


class TestOptuna:
    @pytest.fixture(autouse=True)
    def _optuna(self):
        pytest.importorskip("optuna", reason="searching needs: pip install 'airflow-mlops[tune]'")

    def test_the_space_in_its_terms(self):
        made = distributions(SPACE)
        assert (made["params.eta"].low, made["params.eta"].high, made["params.eta"].log) == (0.01, 1.0, True)
        assert (made["params.max_depth"].low, made["params.max_depth"].step) == (2, 2)
        assert made["booster"].choices == ("gbtree", "dart")

    def test_it_learns_from_ended_trials_and_proposes_the_unfinished_first(self):
        known = [trial(1, 0.5), trial(2, None, "FAILED"), trial(3, None, "RUNNING", eta=0.3)]
        optuna = searcher(Search.of(CONFIG), known)
        assert optuna.suggest("x") == dict(known[2].params)
        fresh = optuna.suggest("y")
        assert set(fresh) == set(SPACE) and fresh["params.max_depth"] in (2, 4, 6, 8) and fresh != known[2].params
        optuna.on_trial_complete("x", {"loss": 0.1})
        study = optuna._ot_study
        states = sorted(entry.state.name for entry in study.trials)
        assert states == ["COMPLETE", "COMPLETE", "FAIL", "RUNNING"]
        assert study.best_value == 0.1

    def test_a_resumed_search_does_not_draw_the_same_again(self):
        first, again = searcher(Search.of(CONFIG), []), searcher(Search.of(CONFIG), [])
        drawn = first.suggest("x")
        assert drawn == again.suggest("x"), "the seed decides"
        later = searcher(Search.of(CONFIG), [Trial("t00001", drawn, "FINISHED", 0.5, {}, "/c")])
        assert later.suggest("y") != drawn
