"""Exporters on real boosters: what MLflow loads from the exported model predicts as the booster does."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.export import export_lightgbm, export_model, export_xgboost
from airflow_mlops.training.spec import TrainingSpec


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    random = np.random.default_rng(3)
    frame = pd.DataFrame(random.normal(size=(600, 3)), columns=["a", "b", "c"])
    frame["two"] = (frame["a"] > 0).astype(int)
    frame["three"] = np.digitize(frame["b"], [-0.5, 0.5])
    return frame


def check(model_dir, frame, expected, columns: int) -> None:
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(str(model_dir))
    predicted = np.asarray(model.predict(frame[["a", "b", "c"]]))
    assert predicted.shape == ((len(frame),) if columns == 1 else (len(frame), columns))
    assert predicted == pytest.approx(expected, abs=1e-6)
    assert model.metadata.signature.inputs.input_names() == ["a", "b", "c"]
    assert model.metadata.signature.outputs.inputs[0].shape == ((-1,) if columns == 1 else (-1, columns))
    assert (model_dir / "requirements.txt").read_text().count("==") == 4


@pytest.mark.parametrize(("label", "objective", "columns"), [("two", "binary", 1), ("three", "multiclass", 3)])
def test_lightgbm(frame, tmp_path, label, objective, columns):
    lightgbm = pytest.importorskip("lightgbm")
    parameters = {"objective": objective, "num_threads": 1, "verbosity": -1}
    if columns > 1:
        parameters["num_class"] = columns
    booster = lightgbm.train(parameters, lightgbm.Dataset(frame[["a", "b", "c"]], frame[label]), 5)
    booster.save_model(tmp_path / "model.txt")
    export_lightgbm(str(tmp_path), {}, str(tmp_path / "model"))
    check(tmp_path / "model", frame, booster.predict(frame[["a", "b", "c"]]), columns)


@pytest.mark.parametrize(
    ("label", "objective", "columns"), [("two", "binary:logistic", 1), ("three", "multi:softprob", 3)]
)
def test_xgboost(frame, tmp_path, label, objective, columns):
    xgboost = pytest.importorskip("xgboost")
    data = xgboost.DMatrix(frame[["a", "b", "c"]], frame[label])
    parameters = {"objective": objective, "nthread": 1} | ({"num_class": columns} if columns > 1 else {})
    booster = xgboost.train(parameters, data, 5)
    booster.save_model(tmp_path / "model.ubj")
    export_xgboost(str(tmp_path), {}, str(tmp_path / "model"))
    check(tmp_path / "model", frame, booster.predict(data), columns)


def test_a_checkpoint_of_another_form_is_named(tmp_path):
    (tmp_path / "weights.pt").write_text("")
    for exporter, name in ((export_xgboost, "model.ubj"), (export_lightgbm, "model.txt")):
        with pytest.raises(InvalidInputError, match=f"holds no {name}.*It holds: weights.pt"):
            exporter(str(tmp_path), {}, str(tmp_path / "model"))


def test_an_exporter_that_writes_no_model_leaves_the_old_one(tmp_path, monkeypatch):
    spec = TrainingSpec("pkg.mod:loop", "torch", str(tmp_path), "r1", exporter="exporters:half_a_model")
    (tmp_path / "r1" / "model").mkdir(parents=True)
    (tmp_path / "r1" / "model" / "MLmodel").write_text("old")
    (tmp_path / "exporters.py").write_text("import os\ndef half_a_model(a, b, to):\n    os.makedirs(to)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidInputError, match="wrote no MLflow model"):
        export_model(spec, str(tmp_path))
    assert os.listdir(tmp_path / "r1") == ["model"] and (tmp_path / "r1/model/MLmodel").read_text() == "old"


def test_a_trainer_without_exporter_has_no_model(tmp_path):
    assert export_model(TrainingSpec("pkg.mod:loop", "torch", str(tmp_path), "r1"), str(tmp_path)) is None
