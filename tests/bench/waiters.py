"""The processes of :mod:`tests.bench.waiting`: an API server with RayJobs that run and end, and who waits for them.

``python -m tests.bench.waiters serve|ours|polls FOLDER COUNT``
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

NAMESPACE = "default"
INTERVAL = 10.0
#: Seconds in which a run is warmed up, all begin to wait, all wait, and all end one after the other.
WARM, SETTLE, HOLD, END = 5.0, 25.0, 60.0, 60.0
LOG_LINES = 30
FINAL = {"SUCCEEDED", "FAILED", "STOPPED"}

#: Where the benchmark listens.
_TELLS = os.dup(1)

Fired = Callable[[str], object]


def _specs(folder: Path, count: int) -> list[Any]:
    from airflow_mlops.training.spec import TrainingSpec

    def spec(number: int) -> TrainingSpec:
        return TrainingSpec("pkg.mod:loop", "torch", str(folder / "runs"), f"train-{number:04}", num_workers=4)

    return [spec(number) for number in range(count)]


# The API server


def _serve(folder: Path, count: int) -> None:
    from support.kube_api import KubeApi

    from airflow_mlops.training.result import TrainingResult, write_result
    from airflow_mlops.training.spec import submission_id_of

    specs = _specs(folder, count)
    with KubeApi(None) as api:
        for spec in specs:
            rayjob, pod = _objects(spec, folder)
            api.create(rayjob, NAMESPACE)
            api.put_status("RayJob", NAMESPACE, submission_id_of(spec), _status("Running", "RUNNING"))
            api.create(pod, NAMESPACE)
            api.add_pod_log(pod["metadata"]["name"], [f"step {number}" for number in range(LOG_LINES)])
        api.kubeconfig(folder / "kubeconfig")
        _say("ready")
        for command in sys.stdin:
            if command.strip() == "count":
                path = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"
                gets = [request.path for request in list(api.requests) if request.method == "GET"]
                shared, single = gets.count(path), sum(one.startswith(f"{path}/") for one in gets)
                _say({"shared": shared, "single": single, "all": len(api.requests)})
                continue
            ended = {}
            for spec in random.Random(7).sample(specs, count):
                began, name = time.monotonic(), submission_id_of(spec)
                write_result(spec, TrainingResult("SUCCEEDED", 1, spec.fingerprint, metrics={"loss": 0.1}))
                ended[name] = time.time()
                api.put_status("RayJob", NAMESPACE, name, _status("Complete", "SUCCEEDED"))
                time.sleep(max(0.0, END / count - (time.monotonic() - began)))
            _say(ended)


def _objects(spec: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from airflow_mlops.training.cluster import SUBMITTER, KubeCluster
    from airflow_mlops.training.manifest import Owner, render_rayjob
    from airflow_mlops.training.spec import submission_id_of

    mount = {"name": "runs", "mountPath": str(folder)}
    volume = {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}
    pods = {
        role: {"spec": {"containers": [{"name": f"ray-{role}", "volumeMounts": [mount]}], "volumes": [volume]}}
        for role in ("head", "worker")
    }
    cluster = KubeCluster(image="example.com/train:ray2.60.0", ray_version="2.60.0", pod_template_overrides=pods)
    name = submission_id_of(spec)
    owner = Owner("bench", "train", "run", int(spec.run_key[-4:]))
    rayjob = render_rayjob(spec, cluster, name=name, owner=owner, spec_uri=spec.file("spec-a1.json"))
    labels = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{name}-submitter", "labels": labels},
        "spec": {"containers": [{"name": SUBMITTER, "image": "example.com/train:ray2.60.0"}]},
        "status": {"phase": "Running"},
    }
    return rayjob, pod


def _status(deployment: str, job: str) -> dict[str, Any]:
    return {"jobDeploymentStatus": deployment, "jobStatus": job, "rayClusterName": "c", "jobId": "j"}


# Who waits


async def _ours(folder: Path, specs: list[Any]) -> Callable[[Any, Fired], Awaitable[None]]:
    from airflow.triggers.base import TaskSuccessEvent

    from airflow_mlops.operators._ray import Progress
    from airflow_mlops.training.limits import Limits, Times
    from airflow_mlops.training.spec import submission_id_of
    from airflow_mlops.triggers.kuberay import RayJobResourceTrigger

    limits = Limits(startup_timeout=1200, total_timeout=86400, stall_timeout=3600)

    async def wait(spec: Any, fired: Fired) -> None:
        now = time.time()
        given = {
            "connection": {"conn_id": "bench", "namespace": None},
            "owner": {"dag_id": "bench", "task_id": "train", "run_id": "run"},
            "poll_interval": INTERVAL,
            "unreachable_timeout": 300.0,
            "cancel_on_kill": True,
            "state": Progress(spec, Times(now, now)).to_json(),
            "limits": limits.to_json(),
            "times": Times(now, now).to_json(),
            "finish_in_triggerer": True,
        }
        # A triggerer makes each from what the metadata database has.
        async for event in RayJobResourceTrigger(**json.loads(json.dumps(given))).run():
            fired(submission_id_of(spec))
            assert isinstance(event, TaskSuccessEvent), event

    return wait


async def _polls(folder: Path, specs: list[Any]) -> Callable[[Any, Fired], Awaitable[None]]:
    from kubernetes_asyncio import client, config

    from airflow_mlops.training.spec import submission_id_of

    await config.load_kube_config(str(folder / "kubeconfig"))
    # One connection pool for all, though each trigger of the providers opens one of its own.
    api = client.CustomObjectsApi(client.ApiClient())

    async def wait(spec: Any, fired: Fired) -> None:
        name = submission_id_of(spec)
        while True:
            found = await api.get_namespaced_custom_object("ray.io", "v1", NAMESPACE, "rayjobs", name)
            if found["status"]["jobStatus"] in FINAL:
                fired(name)
                return
            await asyncio.sleep(INTERVAL)

    return wait


async def _wait(side: str, folder: Path, count: int) -> None:
    specs = _specs(folder, count)
    fired: dict[str, float] = {}
    wait = await {"ours": _ours, "polls": _polls}[side](folder, specs)

    async def one(spec: Any) -> None:
        await wait(spec, lambda name: fired.setdefault(name, time.time()))

    tasks = [asyncio.create_task(one(specs[0]))]
    await asyncio.sleep(WARM)
    small, began = _memory(), time.process_time()
    for spec in specs[1:]:
        tasks.append(asyncio.create_task(one(spec)))
        await asyncio.sleep(INTERVAL / count)
    await asyncio.sleep(SETTLE - INTERVAL)
    large, waits = _memory(), time.process_time()
    await asyncio.sleep(HOLD)
    held = time.process_time()
    _say("held")
    await asyncio.gather(*tasks)
    ended = time.process_time()
    cpu = {"begin": waits - began, "hold": held - waits, "end": ended - held}
    _say({"fired": fired, "bytes": (large - small) / (count - 1), "cpu": cpu})
    os._exit(0)


def _memory() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _say(what: Any) -> None:
    os.write(_TELLS, f"{json.dumps(what)}\n".encode())


def main() -> None:
    """Be one of the processes."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Airflow logs to it
    role, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if role == "serve":
        _serve(folder, count)
    else:
        asyncio.run(_wait(role, folder, count))


if __name__ == "__main__":
    main()
