"""A training as the operators leave it: real bytes in a DVC remote, a run directory, a version in a real MLflow."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.hooks.dvc import DvcHook
from airflow_mlops.hooks.mlflow import MlflowHook
from airflow_mlops.operators.mlflow import MlflowRegisterOperator
from airflow_mlops.operators.provenance import ModelRecordOperator
from airflow_mlops.provenance.record import read
from airflow_mlops.training.result import TrainingResult, Usage, outcome, write_environment, write_result
from airflow_mlops.training.runs import begin_attempt
from airflow_mlops.training.spec import TrainingSpec

FEATURES = ["a", "b", "c"]
CLUSTER = {
    "name": "train-7",
    "ray_version": "2.60.0",
    "nodes": 2,
    "resources": {"CPU": 8.0, "GPU": 1.0},
    "accelerators": ["H100"],
}
DOCUMENTATION = {
    "description": "Whether a flight is late.",
    "purpose": "binary classification",
    "architecture": "XGBoost",
    "supplier": "ACME",
    "license": "Apache-2.0",
    "limitations": ["flights of 2013 only | and <none> other"],
    "energy": {"cpu_watts": 10.0, "gpu_watts": 300.0},
}


@pytest.fixture(scope="session")
def _store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlflow-template")
    MlflowHook(tracking_uri=f"sqlite:///{folder}/mlflow.db").ensure_store()
    return folder / "mlflow.db"


@pytest.fixture
def hook(_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowHook:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(_store, tmp_path / "mlflow.db")
    return MlflowHook(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import mlflow
    import xgboost
    from mlflow.models import infer_signature

    frame = pd.DataFrame(np.random.default_rng(1).normal(size=(200, 3)), columns=FEATURES)
    parameters = {"objective": "binary:logistic", "nthread": 1, "seed": 0}
    model = xgboost.train(parameters, xgboost.DMatrix(frame, label=frame["a"] > 0), 3)
    folder = tmp_path_factory.mktemp("model") / "model"
    signature = infer_signature(frame, model.predict(xgboost.DMatrix(frame)))
    mlflow.xgboost.save_model(model, str(folder), signature=signature, pip_requirements=["xgboost"], model_format="ubj")
    return folder


class World:
    """What has happened, and hands that go on."""

    def __init__(self, root: Path, hook: MlflowHook, model_dir: Path) -> None:
        self.root, self.hook = root, hook
        self.raw = root / "raw"
        (self.raw / "flights").mkdir(parents=True)
        for month in ("2013-01", "2013-02"):
            (self.raw / "flights" / f"{month}.csv").write_text(f"rows of {month}")
        self.snapshot = DvcHook(remote_url=str(root / "remote")).snapshot(str(self.raw)).to_json()
        self.training_set = self._training_set()
        config = {
            "train_uri": self.training_set["uri"],
            "features": FEATURES,
            "params": {"seed": 7, "eta": 0.1},
            "max_tokens": 5,
            "api_token": "open-sesame",
        }
        spec = TrainingSpec(
            train_fn="airflow_mlops.examples.xgboost_loop:train_loop_per_worker",
            trainer="xgboost",
            storage_path=str(root / "runs"),
            run_key="june",
            config=config,
            num_workers=2,
        )
        begin_attempt(spec)
        write_environment(spec, CLUSTER)
        shutil.copytree(model_dir, Path(spec.run_dir) / "model")
        result = TrainingResult(
            "SUCCEEDED",
            1,
            spec.fingerprint,
            metrics={"train_log_loss": 0.41, "time_total_s": 3.0},
            model_uri=f"{spec.run_dir}/model",
            usage=Usage(60.0, 120.0, 36.0),
        )
        write_result(spec, result)
        self.training = outcome(spec, result, price_per_gpu_hour=2.0)
        self.gate = {
            "passed": True,
            "first_model": False,
            "reasons": ["log_loss: better"],
            "checks": [{"name": "auc", "value": "0.77", "limit": "at least 0.6", "passed": True}],
            "rows": 900,
            "metrics": {"challenger": {"auc": 0.77, "log_loss": 0.4}, "champion": {"auc": 0.7, "log_loss": 0.5}},
            "slices": [{"column": "origin", "value": "JFK", "rows": 300, "gain": 0.01, "p_adjusted": 0.9}],
            "champion_version": "1",
        }
        self.canary = {
            "verdict": "PROMOTE",
            "version": "1",
            "requests": {"stable": 500, "canary": 520},
            "reasons": ["no guardrail shows harm"],
            "approvals": {"1": {"approved": True, "by": "ada", "time": 1.0}},
        }
        self.promotion = {"name": "late", "version": "1", "previous": None, "alias": "champion"}

    def _training_set(self) -> dict[str, Any]:
        frame = pd.DataFrame(np.random.default_rng(2).normal(size=(300, 3)), columns=FEATURES)
        frame["event_timestamp"] = pd.date_range("2013-01-01", periods=300, freq="h", tz="UTC")
        uri = self.root / "set.parquet"
        frame.to_parquet(uri)
        found = {
            "uri": str(uri),
            "manifest_uri": f"{uri}.manifest.json",
            "rows": 300,
            "features": FEATURES,
            "label": "late",
            "window": {"start": "2013-01-01T00:00:00+00:00", "end": "2013-02-01T00:00:00+00:00"},
            "sha256": hashlib.sha256(uri.read_bytes()).hexdigest(),
        }
        view = {"view": "weather", "source": "/f/w", "source_rows": 9, "matched": 300, "leaks": 0, "late_rows": 0}
        Path(found["manifest_uri"]).write_text(json.dumps({**found, "views": [view], "missing_share": {"a": 0.0}}))
        return found

    def context(self, task_id: str, **run: Any) -> dict[str, Any]:
        ti = SimpleNamespace(dag_id="training", run_id="run-1", task_id=task_id, map_index=-1)
        started = dt.datetime(2026, 1, 1, 6, tzinfo=dt.timezone.utc)
        dag_run = SimpleNamespace(**{"run_type": "manual", "triggering_user_name": "ada", "start_date": started, **run})
        return {"ti": ti, "dag_run": dag_run, "outlet_events": defaultdict(SimpleNamespace)}

    def register(self, **changes: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model_name": "late",
            "training": self.training,
            "training_set": self.training_set,
            "snapshot": self.snapshot,
            "tracking_uri": self.hook.tracking_uri,
        }
        operator = MlflowRegisterOperator(task_id="register", **{**arguments, **changes})
        return operator.execute(self.context("register"))

    def record(self, registration: Any, *, run: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        """Runs a fresh operator with everything there is."""
        arguments: dict[str, Any] = {
            "registration": registration,
            "snapshot": self.snapshot,
            "training_set": self.training_set,
            "training": self.training,
            "gate": self.gate,
            "canary": self.canary,
            "promotion": self.promotion,
            "documentation": DOCUMENTATION,
            "feature_service": "late_v1",
            "code_path": str(Path(__file__).parent),
            "tracking_uri": self.hook.tracking_uri,
        }
        operator = ModelRecordOperator(task_id="papers", **{**arguments, **changes})
        return operator.execute(self.context("papers", **(run or {})))


@pytest.fixture
def world(tmp_path: Path, hook: MlflowHook, model_dir: Path) -> World:
    return World(tmp_path, hook, model_dir)


@pytest.fixture
def recorded(world: World) -> Any:
    """The world, its version registered and its papers written; ``papers`` is the task's result."""
    return _recorded(world)


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory, _store: Path, model_dir: Path) -> Any:
    """The same, once for all tests that only look; ``record`` is what was written."""
    root = tmp_path_factory.mktemp("told")
    shutil.copy(_store, root / "mlflow.db")
    found = _recorded(World(root, MlflowHook(tracking_uri=f"sqlite:///{root}/mlflow.db"), model_dir))
    found.record = read(found.papers["record_uri"])
    return found


def _recorded(world: World) -> SimpleNamespace:
    registration = world.register()
    return SimpleNamespace(world=world, registration=registration, papers=world.record(registration))
