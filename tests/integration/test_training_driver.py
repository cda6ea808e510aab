"""The driver with real Ray: killed, stopped and refused attempts, elastic workers, a command, a search."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from airflow_mlops import storage
from airflow_mlops.training.fence import read_owner
from airflow_mlops.training.result import TrainingResult, read_result
from airflow_mlops.training.runs import committed_checkpoint
from airflow_mlops.training.spec import TrainingSpec
from airflow_mlops.training.tune import read_trials

pytestmark = pytest.mark.ray

# Each step depends on all before it; one checkpoint per step, and a line of who was there.
LOOP = """
import json, os, pathlib, tempfile, time

def loop(config):
    import ray.train
    context, first, total = ray.train.get_context(), 0, 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = json.loads(pathlib.Path(folder, "state.json").read_text())
        first, total = state["step"] + 1, state["total"]
    for step in range(first, config["steps"]):
        total = total * 3 % 1_000_003 + step
        if context.get_world_rank() == 0:
            with open(config["trace"], "a") as file:
                file.write(f"{step} {context.get_world_size()}\\n")
        time.sleep(0.0 if os.path.exists(config["gate"]) else 0.5)
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "state.json").write_text(json.dumps({"step": step, "total": total}))
            saved = ray.train.Checkpoint.from_directory(folder) if context.get_world_rank() == 0 else None
            ray.train.report({"step": step, "total": total, "world": context.get_world_size()}, checkpoint=saved)

def valley(config):
    import ray.train
    with open(config["trace"], "a") as file:
        file.write(f"{config['x']} {ray.train.get_checkpoint() is not None}\\n")
    if config["x"] > 8:
        raise ValueError("x is too large")
    loss = (config["x"] - config["at"]["low"]) ** 2 + len(config["kind"])
    for step in range(2):
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "x").write_text(str(config["x"]))
            ray.train.report({"loss": loss + 1 - step}, checkpoint=ray.train.Checkpoint.from_directory(folder))
        if step == 0:
            while not os.path.exists(config["gate"]) and sum(1 for _ in open(config["trace"])) > 3:
                time.sleep(0.1)
"""

# What a user's own script does with what the driver tells it.
SCRIPT = """
import json, os, sys
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from driver_loops import loop

config = json.loads(os.environ["MLOPS_CONFIG"])
ray.init(num_cpus=1, include_dashboard=False)
run = RunConfig(name=os.environ["MLOPS_RUN_KEY"], storage_path=os.environ["MLOPS_STORAGE_PATH"])
last = os.environ["MLOPS_ATTEMPT"] == "1"
trainer = DataParallelTrainer(loop, train_loop_config=config | {"steps": 2 if last else 4},
                              scaling_config=ScalingConfig(num_workers=1), run_config=run)
result = trainer.fit()
if last:
    sys.exit(75)
json.dump({"metrics": {"total": result.metrics["total"]}}, open(os.environ["MLOPS_RESULT"], "w"))
"""


@pytest.fixture
def code(tmp_path, monkeypatch) -> Path:
    """A folder that drivers and workers import from."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "driver_loops.py").write_text(LOOP)
    (folder / "script.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.getcwd()]))
    return folder


def spec_of(tmp_path, **changes) -> TrainingSpec:
    config = {"steps": 60, "trace": str(tmp_path / "trace"), "gate": str(tmp_path / "gate")}
    values = {"train_fn": "driver_loops:loop", "trainer": "data_parallel", "num_cpus": 2, "max_failures": 0} | changes
    spec = TrainingSpec(storage_path=str(tmp_path / "runs"), run_key="r1", config=config, **values)
    spec.validate()
    return spec


def driver(spec: TrainingSpec, **environment: str) -> subprocess.Popen:
    uri = storage.write_json(spec.file(f"spec-a{spec.attempt}.json"), spec.to_json())
    command = [sys.executable, "-m", "airflow_mlops.training", "--spec", uri]
    return subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)


def drive(spec: TrainingSpec) -> TrainingResult:
    assert driver(spec).wait(300) == 0
    result = read_result(spec)
    assert result is not None
    return result


def trace(tmp_path) -> list[list[str]]:
    path = tmp_path / "trace"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def kill(process: subprocess.Popen, tmp_path) -> None:
    """SIGKILL; its workers, which notice soon, are waited for."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    seen = -1
    while seen != len(trace(tmp_path)):
        seen = len(trace(tmp_path))
        time.sleep(3.0)


def wait_for(condition, process: subprocess.Popen | None = None, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        assert process is None or process.poll() is None, "the driver ended before"
        time.sleep(0.05)


def step_of(checkpoint: str | None) -> int:
    assert checkpoint is not None
    return json.loads(Path(checkpoint, "state.json").read_text())["step"]


def expected(steps: int) -> int:
    total = 0
    for step in range(steps):
        total = total * 3 % 1_000_003 + step
    return total


def test_killed_refused_stopped_and_finished(tmp_path, code):
    """SIGKILL, then SIGTERM: each next attempt goes on at the last committed step, to the undisturbed end."""
    spec = spec_of(tmp_path)
    first = driver(spec)
    wait_for(lambda: committed_checkpoint(spec), first)
    second = replace(spec, attempt=2)
    assert driver(replace(second, patience=0.5)).wait(120) == 75, "two attempts on one directory"
    kill(first, tmp_path)
    kept = step_of(committed_checkpoint(spec))
    told = len(trace(tmp_path))

    stopped = driver(second)
    wait_for(lambda: len(trace(tmp_path)) >= told + 2, stopped)
    assert int(trace(tmp_path)[told][0]) == kept + 1
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 143
    result = read_result(second)
    assert result.exit_class == "stopped" and result.resumed_from and not read_owner(second).alive(time.time())
    kept = step_of(committed_checkpoint(spec))
    told = len(trace(tmp_path))

    (tmp_path / "gate").touch()
    result = drive(replace(spec, attempt=3))
    assert int(trace(tmp_path)[told][0]) == kept + 1
    assert result.metrics["total"] == expected(60) and result.attempt == 3
    alone = sum(result.seconds.values())
    assert result.usage.wall_seconds > alone + 5, "time is summed over the attempts"


def test_elastic_workers_go_on_in_a_smaller_ray(tmp_path, code):
    spec = spec_of(tmp_path, num_workers=(1, 2))
    first = driver(spec)
    wait_for(lambda: len(trace(tmp_path)) > 1, first)
    wait_for(lambda: committed_checkpoint(spec), first)
    kill(first, tmp_path)
    (tmp_path / "gate").touch()
    assert {world for _, world in trace(tmp_path)} == {"2"}
    told = len(trace(tmp_path))
    result = drive(replace(spec, attempt=2, num_cpus=1))
    assert {world for _, world in trace(tmp_path)[told:]} == {"1"}
    assert result.metrics["total"] == expected(60) and result.metrics["world"] == 1
    assert storage.read_json(spec.file("world-a1.json")) == 2 and storage.read_json(spec.file("world-a2.json")) == 1


def test_a_command_with_ray_train_resumes_by_the_names_it_is_told(tmp_path, code):
    entrypoint = f"{sys.executable} {code}/script.py"
    spec = spec_of(tmp_path, train_fn=None, trainer=None, entrypoint=entrypoint)
    assert driver(spec).wait(300) == 70
    assert read_result(spec).exit_class == "infra"
    result = drive(replace(spec, attempt=2))
    assert [int(step) for step, _ in trace(tmp_path)] == [0, 1, 2, 3]
    assert result.metrics == {"total": expected(4)} and result.resumed_from
    assert step_of(result.checkpoint_uri) == 3


def test_an_interrupted_search_goes_on_and_returns_the_best_trial(tmp_path, code):
    pytest.importorskip("optuna", reason="searching needs: pip install 'airflow-mlops[tune]'")
    config = {
        "space": {"x": {"type": "float", "low": 0.0, "high": 10.0}, "kind": ["a", "bb"]},
        "config": {"trace": str(tmp_path / "trace"), "gate": str(tmp_path / "gate"), "at": {"low": 3}},
        "metric": "loss",
        "trainer": "data_parallel",
        "num_samples": 6,
        "seed": 5,
    }
    spec = TrainingSpec(
        "driver_loops:valley", "tune", str(tmp_path / "runs"), "r1", config=config, num_cpus=2, max_failures=0
    )
    spec.validate()
    first = driver(spec)
    # The gate holds later trials between their two checkpoints.
    wait_for(lambda: sum(1 for entry in read_trials(spec) if entry.status == "RUNNING") == 2
             and sum(1 for entry in read_trials(spec) if entry.status != "RUNNING") >= 2
             and all(list(Path(spec.run_dir, "trials", entry.name).glob("checkpoint_manager_snapshot.json"))
                     for entry in read_trials(spec) if entry.status == "RUNNING"), first)  # fmt: skip
    kill(first, tmp_path)
    before = {entry.name: entry for entry in read_trials(spec)}
    told = len(trace(tmp_path))
    (tmp_path / "gate").touch()

    result = drive(replace(spec, attempt=2))
    trials = {entry.name: entry for entry in read_trials(spec)}
    assert len(trials) == 6 and all(entry.status != "RUNNING" for entry in trials.values())
    unfinished = {str(entry.params["x"]) for entry in before.values() if entry.status == "RUNNING"}
    again = trace(tmp_path)[told:]
    assert {x for x, resumed in again if resumed == "True"} == unfinished, "they go on from their checkpoints"
    assert all(trials[name] == entry for name, entry in before.items() if entry.status != "RUNNING")

    finished = [entry for entry in trials.values() if entry.status == "FINISHED"]
    failed = [entry for entry in trials.values() if entry.status == "FAILED"]
    assert failed and all(entry.params["x"] > 8 and "x is too large" in entry.error for entry in failed)
    best = min(finished, key=lambda entry: entry.value)
    assert best.value == pytest.approx((best.params["x"] - 3) ** 2 + len(best.params["kind"]))
    assert result.params == best.params and result.metrics["loss"] == best.value
    assert (result.metrics["trials"], result.metrics["failed_trials"]) == (len(finished), len(failed))
    assert Path(result.checkpoint_uri, "x").read_text() == str(best.params["x"])
    assert result.resumed_from == spec.file("trials")


def test_a_search_as_a_job_returns_the_best_model(tmp_path, ray_cluster, monkeypatch):
    pytest.importorskip("optuna", reason="searching needs: pip install 'airflow-mlops[tune]'")
    import mlflow.pyfunc
    import numpy as np
    import pandas as pd

    from airflow_mlops.operators.ray import RayTrainOperator

    random = np.random.default_rng(5)
    frame = pd.DataFrame(random.normal(size=(3000, 2)), columns=["a", "b"])
    frame["y"] = (frame["a"] * frame["b"] > 0).astype(int)
    frame[:2000].to_parquet(tmp_path / "train.parquet")
    frame[2000:].to_parquet(tmp_path / "validation.parquet")
    connection = {"conn_type": "ray", "host": ray_cluster.dashboard_url, "password": ray_cluster.token}
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(connection))

    class Task:
        dag_id, task_id, run_id, map_index, try_number = "dag", "search", "run-1", -1, 1

        def xcom_push(self, key: str, value: object) -> None:
            pass

    shared = {"data": str(tmp_path / "train.parquet"), "validation": str(tmp_path / "validation.parquet")}
    result = RayTrainOperator(
        task_id="search",
        mode="jobs",
        train_fn="airflow_mlops.examples.xgboost_loop:train_loop_per_worker",
        trainer="tune",
        config={
            "space": {"params.max_depth": [1, 6]},
            "config": {**shared, "features": ["a", "b"], "label": "y", "rounds": 10, "checkpoint_every": 5},
            "metric": "validation-logloss",
            "trainer": "xgboost",
            "num_samples": 4,
            "max_concurrent": 2,
            "seed": 1,
        },
        storage_path=str(tmp_path / "runs"),
        run_key="r1",
        poll_interval=0.3,
    ).execute({"ti": Task()})
    assert result["metrics"]["trials"] == 4 and result["metrics"]["failed_trials"] == 0
    assert result["params"] == {"params.max_depth": 6}, "depth 1 cannot tell the sign of a product"
    assert result["metrics"]["validation-logloss"] < 0.5 and result["cpu_seconds"] > 1
    predicted = mlflow.pyfunc.load_model(result["model_uri"]).predict(frame[["a", "b"]])
    assert ((predicted > 0.5) == frame["y"]).mean() > 0.9
