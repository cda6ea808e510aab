"""Trainings for the stand-in's simulator, and the task that runs them: what tests of kuberay mode share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.kube_sim import Stop

from airflow_mlops import storage
from airflow_mlops.operators.ray import RayTrainOperator
from airflow_mlops.training.fence import Fence
from airflow_mlops.training.result import TrainingResult, Usage, write_result
from airflow_mlops.training.spec import TrainingSpec

STEPS = 20


class Task:
    """What the operator uses of a task instance."""

    dag_id, task_id, run_id, map_index = "dag", "train", "run-1", -1

    def __init__(self, try_number: int = 1) -> None:
        self.try_number = try_number
        self.pushed: dict[str, Any] = {}

    def xcom_push(self, key: str, value: object) -> None:
        self.pushed[key] = value


def spec_of(rayjob: dict[str, Any]) -> TrainingSpec:
    return TrainingSpec.from_json(storage.read_json(rayjob["spec"]["entrypoint"].split("--spec ")[1].strip("'")))


def train(rayjob: dict[str, Any], stop: Stop, pause: float = 0.005) -> int:
    """A training of some steps that commits each, in the run directory as the driver would keep it."""
    spec = spec_of(rayjob)
    steps = Path(storage.local_path(spec.run_dir)) / "step"
    with Fence(spec, Usage, on_lost=lambda: None, patience=5.0):
        begin = int(steps.read_text()) if steps.exists() else 0
        stop.log(f"begins at {begin}")
        for step in range(begin, STEPS):
            if stop.is_set():
                return 143
            steps.write_text(str(step + 1))
            stop.wait(pause)
        resumed = f"{spec.run_dir}/{begin}" if begin else None
        result = TrainingResult("SUCCEEDED", spec.attempt, spec.fingerprint, metrics={"steps": STEPS}, model_uri="m")
        write_result(spec, TrainingResult(**{**vars(result), "resumed_from": resumed}))
    return 0


def fails(rayjob: dict[str, Any], stop: Stop) -> int:
    spec = spec_of(rayjob)
    stop.log("ValueError: bad label")
    error = "ValueError: bad label"
    write_result(spec, TrainingResult("FAILED", spec.attempt, spec.fingerprint, exit_class="app", error=error))
    return 1


def steps(run_dir: Path) -> int:
    """How many steps are committed."""
    file = run_dir / "step"
    return int(file.read_text() or 0) if file.exists() else 0


def operator(storage_path: Path, **changes: Any) -> RayTrainOperator:
    mount = {"name": "runs", "mountPath": str(storage_path)}
    volume = {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}
    pods = {
        role: {"spec": {"containers": [{"name": f"ray-{role}", "volumeMounts": [mount]}], "volumes": [volume]}}
        for role in ("head", "worker")
    }
    cluster = {"image": "example.com/train:ray2.60.0", "ray_version": "2.60.0", "pod_template_overrides": pods}
    values = {
        "task_id": "train",
        "mode": "kuberay",
        "train_fn": "pkg.mod:loop",
        "trainer": "torch",
        "storage_path": str(storage_path),
        "run_key": "r1",
        "k8s_conn_id": "kuberay",
        "cluster": {**cluster, **changes.pop("cluster", {})},
        "poll_interval": 0.1,
        "unreachable_timeout": 5.0,
        "fence_timeout": 1.0,
    }
    return RayTrainOperator(**{**values, **changes})


def until(probe: Callable[[], Any], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not probe():
        assert time.monotonic() < deadline
        time.sleep(0.005)
