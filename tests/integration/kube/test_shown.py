"""What a task shows of a RayJob: the driver's log, each line once, whoever follows it next, and links."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from airflow.sdk.exceptions import TaskDeferred
from support.kube_sim import RayJobSimulator, Stop
from support.kube_training import Task, operator, train, until

from airflow_mlops.hooks.kuberay import RayJobHook
from airflow_mlops.links import GrafanaLink, RayDashboardLink
from airflow_mlops.operators.ray import RayTrainOperator
from airflow_mlops.training.manifest import run_selector
from airflow_mlops.training.spec import TrainingSpec, submission_id_of
from airflow_mlops.triggers import _training
from airflow_mlops.triggers import kuberay as triggers

LINES = [f"line {number}" for number in range(60)]


class Shown(list[str]):
    """What a task has shown of its driver's log.

    :ivar while_running: how much of it was there when the driver had written its last line
    """

    while_running = 0

    def __call__(self, line: str) -> None:
        if line.startswith("line"):
            self.append(line)


#: What a submitter says when it loses the driver: far from what the driver says, and more than it has said meanwhile.
LAST_WORDS = [f"Traceback, part {number}" for number in range(40)]


@pytest.fixture
def shown(monkeypatch) -> Shown:
    found = Shown()
    monkeypatch.setattr(RayTrainOperator, "_log_line", found)
    # Lines are gathered for seconds, and this training has none to give.
    monkeypatch.setattr(_training, "LogRelay", functools.partial(_training.LogRelay, every=0.1))
    return found


@pytest.fixture
def simulator(kube_api, kubeconfig, monkeypatch, shown) -> Iterator[RayJobSimulator]:
    def talks(rayjob: dict[str, Any], stop: Stop) -> int:
        for line in LINES:
            stop.log(line)
            if stop.wait(0.02):
                return 143
        shown.while_running = len(shown)
        return train(rayjob, stop)

    extra = {"kube_config_path": str(kubeconfig), "namespace": "default"}
    monkeypatch.setenv("AIRFLOW_CONN_KUBERAY", json.dumps({"conn_type": "kuberay", "extra": extra}))
    monkeypatch.setattr("airflow_mlops.hooks.kuberay._LOOK", 0.02)
    monkeypatch.setattr("airflow_mlops.operators._kuberay.MARGIN", 1e6)
    with RayJobSimulator(kube_api, scale=0.005, script=talks) as found:
        yield found


def test_a_worker_that_waits_shows_the_log_as_it_is_written(simulator, shown, tmp_path):
    outcome = operator(tmp_path, logs="live").execute({"ti": Task()})
    assert outcome["attempts"] == 1 and shown == LINES
    assert shown.while_running > len(LINES) / 2


def test_lost_connections_lose_no_line(simulator, kube_api, shown, tmp_path):
    over = threading.Event()

    def cut() -> None:
        while not over.wait(0.15):
            kube_api.drop_watches()

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        assert operator(tmp_path, logs="live").execute({"ti": Task()})["attempts"] == 1
    finally:
        over.set()
        cutter.join()
    assert shown == LINES


@pytest.mark.parametrize("words", [[], LAST_WORDS], ids=["at once", "with last words"])
def test_a_submitter_that_is_replaced_loses_and_doubles_no_line(simulator, shown, tmp_path, words):
    def replace() -> None:
        until(lambda: len(shown) > 10)
        simulator.replace_submitter(simulator.started[0], *words)

    replacing = threading.Thread(target=replace)
    replacing.start()
    assert operator(tmp_path, logs="live").execute({"ti": Task()})["attempts"] == 1
    replacing.join()
    assert shown == LINES


def triggered(task: RayTrainOperator, shown: Shown, lines: int) -> None:
    """Defer the task, and end its trigger when it has shown so many lines."""
    with pytest.raises(TaskDeferred) as deferred:
        task.execute({"ti": Task()})
    trigger = triggers.RayJobResourceTrigger(**deferred.value.trigger.serialize()[1])
    trigger._on_line = shown

    async def follow() -> None:
        waits = asyncio.ensure_future(anext(trigger.run()))
        while len(shown) < lines:
            await asyncio.sleep(0.01)
        waits.cancel()
        await asyncio.wait({waits})

    asyncio.run(follow())


def test_a_submitter_is_replaced_while_nobody_looks(simulator, kube_api, shown, tmp_path):
    triggered(operator(tmp_path, logs="live", deferrable=True), shown, 10)
    simulator.replace_submitter(simulator.started[0], *LAST_WORDS)
    until(lambda: len([pod for pod in kube_api.list("Pod") if "job-name" in pod["metadata"]["labels"]]) == 2)
    assert operator(tmp_path, logs="live").execute({"ti": Task(2)})["attempts"] == 1
    assert shown == LINES


def test_a_worker_goes_on_where_a_triggerer_has_ended(simulator, shown, tmp_path):
    triggered(operator(tmp_path, logs="live", deferrable=True), shown, 10)
    seen = len(shown)
    assert 10 <= seen < len(LINES)
    assert operator(tmp_path, logs="live").execute({"ti": Task(2)})["attempts"] == 1
    assert shown == LINES and simulator.started and len(simulator.started) == 1


def test_without_a_submitter_there_is_no_log_to_wait_for(simulator, kube_api, shown, tmp_path):
    began = time.monotonic()
    http = {"submission_mode": "HTTPMode"}
    assert operator(tmp_path, logs="live", cluster=http).execute({"ti": Task()})["attempts"] == 1
    assert shown == [] and time.monotonic() - began < _training.DRAIN / 2


HEAD = {"rayStartParams": {}, "template": {"spec": {"containers": [{"name": "ray-head", "image": "i"}]}}}
SPEC = TrainingSpec("pkg.mod:loop", "torch", "/runs", "r1")


@pytest.fixture
def hook(kube_api, kubeconfig, monkeypatch) -> RayJobHook:
    extra = {"kube_config_path": str(kubeconfig), "namespace": "default"}
    monkeypatch.setenv("AIRFLOW_CONN_KUBERAY", json.dumps({"conn_type": "kuberay", "extra": extra}))
    return RayJobHook("kuberay", look=0.02, patience=0.2)


def submitted(kube_api, mode: str) -> None:
    spec = {"entrypoint": "true", "submissionMode": mode, "rayClusterSpec": {"headGroupSpec": HEAD}}
    meta = {"name": submission_id_of(SPEC)}
    kube_api.create({"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": meta, "spec": spec})


async def told(hook: RayJobHook, over: asyncio.Event) -> list[str]:
    return [line async for _, line in hook.driver_log(SPEC, None, over)]


async def test_who_will_never_have_a_submitter_is_not_asked_for_one_again(kube_api, hook):
    submitted(kube_api, "HTTPMode")
    assert await asyncio.wait_for(told(hook, asyncio.Event()), 5) == []
    assert kube_api.count(path_contains="/pods") == 1


async def test_a_submitter_is_waited_for_in_growing_steps(kube_api, hook):
    submitted(kube_api, "K8sJobMode")
    over = asyncio.Event()
    asyncio.get_running_loop().call_later(2.0, over.set)
    assert await asyncio.wait_for(told(hook, over), 5) == []
    assert 3 <= kube_api.count(path_contains="/pods") <= 12
    assert kube_api.count(path_contains="/rayjobs") == 1


async def test_a_log_that_nobody_can_tell_for_a_while_is_asked_for_again(kube_api, hook):
    submitted(kube_api, "K8sJobMode")
    away = kube_api.fault(status=503, times=10_000)
    telling = asyncio.create_task(told(hook, asyncio.Event()))
    await asyncio.sleep(1.0)
    assert not telling.done()
    kube_api.faults.remove(away)
    # Silence is not the absence of a submitter, not even at the end.
    telling.cancel()
    over = asyncio.Event()
    over.set()
    away = kube_api.fault(status=503, times=10_000)
    telling = asyncio.create_task(told(hook, over))
    await asyncio.sleep(0.8)
    container = {"name": "ray-job-submitter", "image": "i"}
    labels = dict(part.split("=") for part in run_selector(SPEC, SPEC.attempt).split(","))
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "s", "labels": labels}}
    kube_api.create({**pod, "spec": {"containers": [container]}, "status": {"phase": "Succeeded"}})
    kube_api.add_pod_log("s", ["Running entrypoint for job x: true", "one"])
    kube_api.faults.remove(away)
    assert (await asyncio.wait_for(telling, 5))[1:] == ["one"]


def test_the_addresses_of_an_ephemeral_cluster_are_configured(simulator, shown, tmp_path, monkeypatch):
    links = (RayDashboardLink(), GrafanaLink())

    def linked(task: Task) -> list[str]:
        with monkeypatch.context() as patched:
            patched.setattr("airflow_mlops.links.XCom.get_value", lambda *, ti_key, key: task.pushed.get(key))
            return [link.get_link(None, ti_key=None) for link in links]

    task = Task()
    operator(tmp_path, run_key="without").execute({"ti": task})
    assert linked(task) == ["", ""]
    monkeypatch.setenv("AIRFLOW__MLOPS__RAY_DASHBOARD_URL", "https://ray.example.com/{namespace}/{submission_id}")
    monkeypatch.setenv("AIRFLOW__MLOPS__GRAFANA_URL", "https://grafana.example.com/d/ray?job={submission_id}")
    operator(tmp_path, run_key="with").execute({"ti": task})
    name = simulator.started[1]
    assert linked(task) == [
        f"https://ray.example.com/default/{name}/#/jobs/{name}",
        f"https://grafana.example.com/d/ray?job={name}",
    ]
