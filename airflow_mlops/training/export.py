"""From the last checkpoint to an MLflow model directory, ``{run_dir}/model``."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from airflow_mlops import storage
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.spec import TrainingSpec, load_callable


def export_model(spec: TrainingSpec, checkpoint_dir: str, into: str | None = None) -> str | None:
    """Write the run's model; returns its URI, None where the trainer has no built-in exporter and none is given.

    :param into: the run directory, where that is another one than the spec's

    The model appears at once: a reader never sees half of it (on an object store: ``MLmodel`` is uploaded last).
    """
    run_dir = into or spec.run_dir
    builtin = {"xgboost": export_xgboost, "lightgbm": export_lightgbm}.get(spec.trainer or "")
    exporter = load_callable(spec.exporter, "exporter") if spec.exporter else builtin
    if exporter is None:
        return None
    uri = storage.join(run_dir, "model")
    local = storage.is_local(uri)
    parent = storage.local_path(run_dir) if local else None
    with tempfile.TemporaryDirectory(prefix=".model-", dir=parent) as scratch:
        made = os.path.join(scratch, "model")
        exporter(checkpoint_dir, dict(spec.config), made)
        if not os.path.exists(os.path.join(made, "MLmodel")):
            raise InvalidInputError(
                f"exporter {spec.exporter!r} wrote no MLflow model (no file MLmodel in the model_dir it was given); "
                "write one with mlflow.<flavor>.save_model(path=model_dir, ...)"
            )
        if local:
            target = storage.local_path(uri)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(made, target)
        else:
            _upload(made, uri)
    return uri


def _upload(folder: str, uri: str) -> None:
    import fsspec

    fs, root = fsspec.core.url_to_fs(uri)
    names = [os.path.relpath(os.path.join(at, name), folder) for at, _, files in os.walk(folder) for name in files]
    for name in sorted(names, key=lambda name: name == "MLmodel"):
        fs.put_file(os.path.join(folder, name), f"{root}/{name}")


def export_xgboost(checkpoint_dir: str, config: Mapping[str, Any], model_dir: str) -> None:
    """The booster that ``ray.train.xgboost.RayTrainReportCallback`` saved; predicts probabilities for a
    ``binary:logistic`` or ``multi:softprob`` objective. Inputs are float64 columns named as in training.

    :raises InvalidInputError: the checkpoint holds no ``model.ubj``
    """
    import mlflow.xgboost
    import xgboost

    booster = xgboost.Booster(model_file=_model_file(checkpoint_dir, "model.ubj"))
    names, outputs = booster.feature_names, _outputs(booster.save_config())
    mlflow.xgboost.save_model(
        booster,
        model_dir,
        signature=_signature(names, booster.num_features(), outputs),
        pip_requirements=_pins("xgboost"),
    )


def export_lightgbm(checkpoint_dir: str, config: Mapping[str, Any], model_dir: str) -> None:
    """The booster that ``ray.train.lightgbm.RayTrainReportCallback`` saved; predicts probabilities for the
    objectives ``binary`` and ``multiclass``. Inputs are float64 columns named as in training.

    :raises InvalidInputError: the checkpoint holds no ``model.txt``
    """
    import lightgbm
    import mlflow.lightgbm

    booster = lightgbm.Booster(model_file=_model_file(checkpoint_dir, "model.txt"))
    signature = _signature(booster.feature_name(), booster.num_feature(), booster.num_model_per_iteration())
    mlflow.lightgbm.save_model(booster, model_dir, signature=signature, pip_requirements=_pins("lightgbm"))


def _model_file(checkpoint_dir: str, name: str) -> str:
    path = os.path.join(checkpoint_dir, name)
    if not os.path.exists(path):
        raise InvalidInputError(
            f"the last checkpoint holds no {name}; report it with RayTrainReportCallback of ray.train.xgboost or "
            f'ray.train.lightgbm under its default file name, or give exporter="package.module:function". '
            f"It holds: {', '.join(sorted(os.listdir(checkpoint_dir))) or 'nothing'}"
        )
    return path


def _outputs(booster_config: str) -> int:
    import json

    return max(1, int(json.loads(booster_config)["learner"]["learner_model_param"].get("num_class", 0) or 0))


def _signature(names: Sequence[str] | None, features: int, outputs: int) -> Any:
    # Given explicitly: inferring it would run the model on an example, in another process.
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema, TensorSpec

    double = np.dtype("float64")
    if names:
        inputs = Schema([ColSpec("double", name) for name in names])
    else:
        inputs = Schema([TensorSpec(double, (-1, features))])
    shape = (-1,) if outputs == 1 else (-1, outputs)
    return ModelSignature(inputs=inputs, outputs=Schema([TensorSpec(np.dtype("float32"), shape)]))


def _pins(library: str) -> list[str]:
    import mlflow

    # A training image may have mlflow-skinny instead: the same modules under another distribution's name.
    others = [f"{name}=={importlib.metadata.version(name)}" for name in (library, "numpy", "pandas")]
    return [f"mlflow=={mlflow.__version__}", *others]
