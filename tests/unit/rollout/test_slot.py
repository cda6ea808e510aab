"""What a slot of the route loads, without a Ray around it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.model_files.digest import model_digest


@pytest.fixture
def slot(monkeypatch):
    from airflow_mlops.rollout.targets.ray_serve import Slot

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    return Slot.func_or_class()


def test_a_pickled_model_is_refused_and_says_so(slot, tmp_path):
    import mlflow.sklearn
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression().fit(np.array([[0.0], [1.0]]), [0, 1])
    path = str(tmp_path / "pickled")
    mlflow.sklearn.save_model(model, path, serialization_format="pickle", pip_requirements=["scikit-learn"])
    slot.reconfigure({"version": "1", "uri": path})
    said = slot.describe()
    assert not said["ready"]
    assert "pickle" in said["error"].lower()


def test_a_model_in_a_format_of_its_own_is_loaded(slot, tmp_path):
    import mlflow.xgboost
    import xgboost

    data = xgboost.DMatrix(np.array([[0.0], [1.0]]), [0, 1], feature_names=["x"])
    booster = xgboost.train({"objective": "binary:logistic"}, data, num_boost_round=1)
    path = str(tmp_path / "boosted")
    mlflow.xgboost.save_model(booster, path, pip_requirements=["xgboost"])
    slot.reconfigure({"version": "2", "uri": path})
    digest = model_digest(path)
    assert slot.describe() == {
        "version": "2",
        "uri": path,
        "digest": digest,
        "revision": 0,
        "ready": True,
        "error": None,
    }
    (chance,), replica = slot.predict([{"x": 0.5}])
    assert 0 < chance < 1 and replica == ""


def test_only_the_files_that_were_registered_are_served(slot, tmp_path):
    import mlflow.xgboost
    import xgboost

    data = xgboost.DMatrix(np.array([[0.0], [1.0]]), [0, 1], feature_names=["x"])
    booster = xgboost.train({"objective": "binary:logistic"}, data, num_boost_round=1)
    path = str(tmp_path / "boosted")
    mlflow.xgboost.save_model(booster, path, pip_requirements=["xgboost"])
    digest = model_digest(path)
    slot.reconfigure({"version": "2", "uri": path, "digest": digest})
    assert slot.describe()["ready"]
    (tmp_path / "boosted" / "added.txt").write_text("x")
    slot.reconfigure({"version": "3", "uri": path, "digest": digest})
    said = slot.describe()
    assert not said["ready"] and said["digest"] == model_digest(path) != digest
    assert f"but {digest} was recorded when it was registered" in said["error"]
    with pytest.raises(RuntimeError, match="no model is loaded"):
        slot.predict([{"x": 0.5}])
    (tmp_path / "boosted" / "added.txt").unlink()
    slot.reconfigure({"version": "3", "uri": path, "digest": digest})
    assert slot.describe()["ready"]


def test_a_slot_of_an_older_package_is_refused_only_where_signatures_are_asked_for(caplog):
    from airflow_mlops.rollout.targets.client import RayServeClient, Route

    client = RayServeClient("http://ray:8265", "http://ray:8000")
    held = {"version": "2", "uri": "/models/2", "revision": 1, "ready": True, "error": None}
    wanted = {"version": "2", "revision": 1, "digest": "sha256:1"}
    old, new = {"slots": {"a": held}}, {"slots": {"a": {**held, "digest": "sha256:0"}}}
    assert Route(client, "late")._loaded(old, "a", wanted)
    assert "runs an older airflow-mlops" in caplog.text
    for report, route in ((old, Route(client, "late", require_digest=True)), (new, Route(client, "late"))):
        with pytest.raises(InvalidInputError, match="was recorded when it was registered"):
            route._loaded(report, "a", wanted)


def test_a_model_whose_probabilities_cannot_be_had_is_not_asked_for_its_labels():
    class Broken:
        metadata = SimpleNamespace(get_input_schema=lambda: None)

        def get_raw_model(self):
            raise RuntimeError("the booster is damaged")

        def predict(self, frame):
            return [1] * len(frame)

    from airflow_mlops.rollout.targets.ray_serve import _scorer

    with pytest.raises(RuntimeError, match="the booster is damaged"):
        _scorer(Broken())
