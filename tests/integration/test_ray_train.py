"""RayTrainOperator with real Ray: a child process with a Ray of its own, and jobs of a cluster."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred

from airflow_mlops import storage
from airflow_mlops.exceptions import TrainingError
from airflow_mlops.operators.ray import RayTrainOperator
from airflow_mlops.training.fence import read_owner
from airflow_mlops.training.runs import committed_checkpoint
from airflow_mlops.training.spec import TrainingSpec

pytestmark = pytest.mark.ray

FEATURES = ["a", "b", "c"]

# A loop that says where it is, one checkpoint per step; rank 0 dies or waits where the config says.
LOOP = """
import json, os, pathlib, signal, tempfile, time

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
                file.write(f"{step}\\n")
        if step == config.get("fail_at"):
            raise ValueError("the label column is all zero")
        time.sleep(config.get("pause", 0.0))
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "state.json").write_text(json.dumps({"step": step, "total": total}))
            saved = ray.train.Checkpoint.from_directory(folder) if context.get_world_rank() == 0 else None
            ray.train.report({"step": step, "total": total}, checkpoint=saved)
"""


class Task:
    """What the operator uses of a task instance."""

    dag_id, task_id, run_id, map_index = "dag", "train", "run-1", -1

    def xcom_push(self, key: str, value: object) -> None:
        pass


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    random = np.random.default_rng(7)
    frame = pd.DataFrame(random.normal(size=(4000, 3)), columns=FEATURES)
    frame["y"] = (frame["a"] + random.normal(size=4000) > 0).astype(int)
    folder = tmp_path_factory.mktemp("data")
    frame[:2500].to_parquet(folder / "1.parquet")
    frame[2500:].to_parquet(folder / "2.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def loop_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("loops")
    (folder / "stepping_loop.py").write_text(LOOP)
    return str(folder)


@pytest.fixture
def jobs(ray_cluster, monkeypatch):
    connection = {"conn_type": "ray", "host": ray_cluster.dashboard_url, "password": ray_cluster.token}
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(connection))


def stepping(tmp_path, loop_dir: str, **changes) -> RayTrainOperator:
    """An operator for the stepping loop; ``config`` is merged."""
    config = {"steps": 6, "trace": str(tmp_path / "trace")} | changes.pop("config", {})
    values = {
        "task_id": "train",
        "mode": "local",
        "trainer": "data_parallel",
        "train_fn": "stepping_loop:loop",
        "storage_path": str(tmp_path / "runs"),
        "run_key": "r1",
        "num_cpus": 2,
        "env_vars": {"PYTHONPATH": os.pathsep.join([loop_dir, str(Path.cwd())])},
        "poll_interval": 0.3,
        "stop_timeout": 8.0,
    }
    return RayTrainOperator(**values | changes, config=config)


def spec_in(tmp_path) -> TrainingSpec:
    return TrainingSpec("a:b", "torch", str(tmp_path / "runs"), "r1")


def trace(tmp_path) -> list[int]:
    path = tmp_path / "trace"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def wait_for(condition, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.05)


def expected(steps: int) -> int:
    total = 0
    for step in range(steps):
        total = total * 3 % 1_000_003 + step
    return total


def left_behind(directory: str) -> list[str]:
    """Command lines of processes that name ``directory`` in their environment or arguments."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(directory in part for part in process.cmdline()):
                found.append(" ".join(process.cmdline())[:200])
        except psutil.Error:
            continue
    return found


def test_xgboost_on_two_workers_predicts_as_a_whole_and_resists_a_killed_driver(tmp_path, data):
    """Rows are sharded by rank; a driver killed in mid-run costs nothing but time."""
    import mlflow.pyfunc

    op = RayTrainOperator(
        task_id="train",
        mode="local",
        train_fn="airflow_mlops.examples.xgboost_loop:train_loop_per_worker",
        trainer="xgboost",
        config={"data": data, "features": FEATURES, "label": "y", "rounds": 60, "checkpoint_every": 10},
        storage_path=str(tmp_path / "runs"),
        run_key="r1",
        num_workers="2",
        num_cpus=2,
    )
    killed = []

    def kill() -> None:
        wait_for(lambda: committed_checkpoint(spec_in(tmp_path)))
        pid = read_owner(spec_in(tmp_path)).pid
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    result = op.execute({"ti": Task()})
    killer.join(5)
    assert killed and result["attempts"] == 2
    assert "checkpoint" in result["resumed_from"] and result["checkpoint_uri"] != result["resumed_from"]
    assert result["cpu_seconds"] > 2 and result["gpu_seconds"] == 0

    model = mlflow.pyfunc.load_model(result["model_uri"])
    frame = pd.read_parquet(data)
    probability = model.predict(frame[FEATURES])
    assert probability.min() > 0 and probability.max() < 1
    high, low = probability[frame["y"] == 1].mean(), probability[frame["y"] == 0].mean()
    assert high > low + 0.2
    assert model.metadata.signature.inputs.input_names() == FEATURES
    assert result["metrics"]["train-logloss"] == pytest.approx(whole_logloss(data, 60), abs=0.01)
    assert not left_behind(str(tmp_path))

    again = op.execute({"ti": Task()})
    assert again == result


def whole_logloss(data: str, rounds: int) -> float:
    """What XGBoost reaches by itself on all rows in one process."""
    import xgboost

    frame = pd.read_parquet(data)
    matrix = xgboost.DMatrix(frame[FEATURES].astype("float32"), frame["y"], nthread=1)
    history: dict = {}
    parameters = {"objective": "binary:logistic", "eval_metric": "logloss", "tree_method": "hist", "nthread": 1}
    evals = [(matrix, "train")]
    xgboost.train(parameters, matrix, rounds, evals=evals, evals_result=history, verbose_eval=False)
    return history["train"]["logloss"][-1]


def test_run_directory_on_s3(data, jobs, s3):
    """Spec, owner, checkpoints, result and model all lie there; a killed driver is resumed from there."""
    import mlflow.pyfunc

    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    op = RayTrainOperator(
        task_id="train",
        mode="jobs",
        train_fn="airflow_mlops.examples.xgboost_loop:train_loop_per_worker",
        trainer="xgboost",
        config={"data": data, "features": FEATURES, "label": "y", "rounds": 20, "checkpoint_every": 5},
        storage_path="s3://runs/training",
        run_key="r1",
        env_vars=aws,
        poll_interval=0.3,
    )
    spec = TrainingSpec("a:b", "xgboost", "s3://runs/training", "r1")
    killed = []

    def kill() -> None:
        wait_for(lambda: committed_checkpoint(spec))
        killed.append(read_owner(spec).pid)
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    result = op.execute({"ti": Task()})
    thread.join(5)
    assert killed and result["attempts"] == 2 and result["resumed_from"].startswith("s3://runs/training/r1/checkpoint")
    assert result["model_uri"] == "s3://runs/training/r1/model" and result["cpu_seconds"] > 1
    assert result["metrics"]["train-logloss"] == pytest.approx(whole_logloss(data, 20), abs=0.01)
    model = mlflow.pyfunc.load_model(result["model_uri"])
    assert 0 < model.predict(pd.read_parquet(data)[FEATURES]).mean() < 1
    assert op.execute({"ti": Task()}) == result


def test_lost_worker_process_is_resumed_by_the_next_try_with_the_undisturbed_result(tmp_path, loop_dir):
    """The process that ran the task dies: its driver goes with it, and the next try goes on at the last commit."""
    import subprocess
    import sys

    script = (
        "import json, sys; from airflow_mlops.operators.ray import RayTrainOperator as R\n"
        "class T: dag_id=task_id=run_id='x'; map_index=-1; xcom_push=lambda *a, **k: None\n"
        "R(**json.loads(sys.argv[1])).execute({'ti': T()})"
    )
    op = stepping(tmp_path, loop_dir, config={"pause": 0.4})
    names = ["mode", "trainer", "train_fn", "storage_path", "run_key", "num_cpus", "env_vars", "stop_timeout", "config"]
    arguments = json.dumps({"task_id": "train", **{name: getattr(op, name) for name in names}})
    worker = subprocess.Popen(
        [sys.executable, "-c", script, arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: len(trace(tmp_path)) >= 3)
        owner = read_owner(spec_in(tmp_path))
    finally:
        worker.kill()
        worker.wait()
    result = stepping(tmp_path, loop_dir, config={"pause": 0.4}).execute({"ti": Task()})
    assert not psutil.pid_exists(owner.pid)
    assert result["attempts"] == 2 and result["resumed_from"]
    assert result["metrics"]["step"] == 5 and result["metrics"]["total"] == expected(6)
    steps = trace(tmp_path)
    assert steps[0] == 0 and steps[-1] == 5 and len(steps) < 12, f"it began anew: {steps}"
    assert not left_behind(str(tmp_path))


def test_killed_task_leaves_nothing_running(tmp_path, loop_dir):
    op = stepping(tmp_path, loop_dir, config={"steps": 500, "pause": 0.2})

    def kill() -> None:
        wait_for(lambda: len(trace(tmp_path)) > 1)
        op.on_kill()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(AirflowFailException, match="killed"):
        op.execute({"ti": Task()})
    assert not left_behind(str(tmp_path))
    result = storage.read_json(str(tmp_path / "runs/r1/_mlops/result.json"))
    assert result["exit_class"] == "stopped"


def test_job_killed_in_mid_run_is_restarted_and_a_second_driver_is_refused(tmp_path, loop_dir, jobs):
    import subprocess
    import sys

    op = stepping(tmp_path, loop_dir, mode="jobs", config={"pause": 0.5})
    seen = {}

    def disturb() -> None:
        wait_for(lambda: len(trace(tmp_path)) >= 3)
        owner = read_owner(spec_in(tmp_path))
        second = TrainingSpec.from_json(
            storage.read_json(str(tmp_path / "runs/r1/_mlops/spec-a1.json")) | {"attempt": 2, "patience": 0.5}
        )
        uri = storage.write_json(str(tmp_path / "second.json"), second.to_json())
        seen["second"] = subprocess.run([sys.executable, "-m", "airflow_mlops.training", "--spec", uri]).returncode
        seen["same"] = read_owner(spec_in(tmp_path)).token == owner.token
        os.kill(owner.pid, signal.SIGKILL)

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    result = op.execute({"ti": Task()})
    thread.join(5)
    assert seen == {"second": 75, "same": True}
    assert result["attempts"] == 2 and result["resumed_from"]
    assert result["metrics"]["total"] == expected(6) and result["cpu_seconds"] > 1


def test_cleared_task_goes_on_in_its_next_try_although_the_old_trigger_stops_the_job(tmp_path, loop_dir, jobs):
    import asyncio

    def fresh() -> RayTrainOperator:
        return stepping(tmp_path, loop_dir, mode="jobs", config={"steps": 30, "pause": 0.2}, deferrable=True)

    with pytest.raises(TaskDeferred) as first:
        fresh().execute({"ti": Task()})
    wait_for(lambda: committed_checkpoint(spec_in(tmp_path)))
    with pytest.raises(TaskDeferred) as second:
        fresh().execute({"ti": Task()})
    trigger = second.value.trigger
    assert trigger.submission_id == first.value.trigger.submission_id, "the next try follows the job that runs"

    async def clear_and_wait():
        await first.value.trigger.on_kill()
        return await asyncio.wait_for(anext(trigger.run()), 120)

    event = asyncio.run(clear_and_wait())
    assert event.payload["seen"]["status"] == "STOPPED"
    resumed = fresh()
    resumed.deferrable = False
    result = resumed.execute_complete({"ti": Task()}, event.payload)
    assert result["attempts"] == 2 and result["resumed_from"]
    assert result["metrics"]["total"] == expected(30)


def test_application_error_ends_with_the_log(tmp_path, loop_dir, jobs):
    op = stepping(tmp_path, loop_dir, mode="jobs", config={"fail_at": 2}, max_failures=0)
    with pytest.raises(TrainingError, match=r"(?s)the label column is all zero.*End of the driver's log"):
        op.execute({"ti": Task()})
    assert len(trace(tmp_path)) == 3


def test_torch(tmp_path, jobs):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    result = RayTrainOperator(
        task_id="train",
        mode="jobs",
        train_fn="airflow_mlops.examples.torch_loop:train_loop_per_worker",
        trainer="torch",
        config={"epochs": 2},
        storage_path=str(tmp_path),
        run_key="r1",
        num_workers=2,
        poll_interval=0.3,
    ).execute({"ti": Task()})
    assert result["metrics"]["epoch"] == 1 and 0 < result["metrics"]["loss"] < 1
    assert result["model_uri"] is None and result["checkpoint_uri"]
