"""What many tests share: a real MLflow on SQLite, real XGBoost models, a real Ray head."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FEATURES = ["a", "b", "c"]


def flights_like(rows: int, seed: int) -> Any:
    """Ten days of rows whose label follows column a, and a little column b."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.normal(size=(rows, 3)), columns=FEATURES)
    frame["origin"] = rng.choice(["EWR", "JFK", "LGA"], rows)
    frame["event_timestamp"] = pd.Timestamp("2013-04-01", tz="UTC") + pd.to_timedelta(
        rng.integers(0, 10 * 24 * 60, rows), unit="min"
    )
    logit = 1.5 * frame["a"] + 0.7 * frame["b"] - 1
    frame["late"] = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype("int8")
    return frame


def save_booster(frame: Any, features: list[str], trees: int, folder: Path) -> str:
    import mlflow
    import xgboost
    from mlflow.models import infer_signature

    data = xgboost.DMatrix(frame[features], label=frame["late"])
    parameters = {"objective": "binary:logistic", "nthread": 1, "max_depth": 3, "eta": 0.3, "seed": 0}
    model = xgboost.train(parameters, data, trees)
    signature = infer_signature(frame[features], model.predict(data))
    mlflow.xgboost.save_model(model, str(folder), signature=signature, pip_requirements=["xgboost"], model_format="ubj")
    return str(folder)


@pytest.fixture(scope="session")
def mlflow_models(tmp_path_factory) -> SimpleNamespace:
    """``good`` knows all features, ``poor`` one that says little; ``data`` is a hold-out neither has seen."""
    folder = tmp_path_factory.mktemp("models")
    train = flights_like(4000, seed=1)
    train.to_parquet(folder / "train.parquet", index=False)
    flights_like(3000, seed=2).to_parquet(folder / "data.parquet", index=False)
    return SimpleNamespace(
        good=save_booster(train, FEATURES, 30, folder / "good"),
        poor=save_booster(train, ["b"], 5, folder / "poor"),
        train=str(folder / "train.parquet"),
        data=str(folder / "data.parquet"),
        features=FEATURES,
    )


@pytest.fixture(scope="session")
def _mlflow_template(tmp_path_factory) -> Path:
    from airflow_mlops.hooks.mlflow import MlflowHook

    folder = tmp_path_factory.mktemp("mlflow-template")
    MlflowHook(tracking_uri=f"sqlite:///{folder}/mlflow.db").ensure_store()
    return folder / "mlflow.db"


@pytest.fixture
def mlflow_uri(_mlflow_template, tmp_path, monkeypatch) -> str:
    """A fresh MLflow store; migrated once, because that takes seconds."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(_mlflow_template, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def mlflow_hook(mlflow_uri) -> Any:
    from airflow_mlops.hooks.mlflow import MlflowHook

    return MlflowHook(tracking_uri=mlflow_uri)


# An application of somebody else on the same Serve.
OTHER_APPLICATION = """
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0})
def hello(request):
    return "hello"

app = hello.bind()
"""


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory) -> Any:
    """A Ray head with token authentication for all tests that need a cluster: its start takes many seconds."""
    from airflow_mlops.embedded.processes import free_port
    from airflow_mlops.embedded.ray_head import RayHead, remove_files

    root, token = tmp_path_factory.mktemp("ray"), "token-of-the-test-cluster"
    (root / "other_app.py").write_text(OTHER_APPLICATION)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.getcwd()])}
    head = RayHead(root, env=env, token=token, num_cpus=4)
    head.start()
    try:
        head.wait_healthy(240)
        serve_url = f"http://127.0.0.1:{free_port()}"
        yield SimpleNamespace(dashboard_url=head.dashboard_url, serve_url=serve_url, token=token, pid=head.service.pid)
    finally:
        head.stop()
        remove_files(root)


class TaskInstance:
    """The part of a task instance that operators use."""

    dag_id, map_index = "training", -1

    def __init__(self, task_id: str, run_id: str) -> None:
        self.task_id, self.run_id = task_id, run_id
        self.pushed: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value


@pytest.fixture
def task_context() -> Any:
    """``task_context(task_id, run_id)``: a context as Airflow gives it to ``execute``, with a month's interval."""
    import datetime as dt
    from collections import defaultdict

    def make(task_id: str = "task", run_id: str = "run-1") -> dict[str, Any]:
        return {
            "ti": TaskInstance(task_id, run_id),
            "data_interval_start": dt.datetime(2013, 4, 1, tzinfo=dt.timezone.utc),
            "data_interval_end": dt.datetime(2013, 5, 1, tzinfo=dt.timezone.utc),
            "outlet_events": defaultdict(SimpleNamespace),
        }

    return make
