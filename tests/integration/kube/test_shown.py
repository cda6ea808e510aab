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
from support.kube_training import Task, operator, train

from airflow_mlops.links import GrafanaLink, RayDashboardLink
from airflow_mlops.operators.ray import RayTrainOperator
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


@pytest.fixture
def shown(monkeypatch) -> Shown:
    found = Shown()
    monkeypatch.setattr(RayTrainOperator, "_log_line", found)
    # Lines are gathered for seconds, and this training has none to give.
    monkeypatch.setattr(triggers, "LogRelay", functools.partial(triggers.LogRelay, every=0.1))
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


def test_a_worker_goes_on_where_a_triggerer_has_ended(simulator, shown, tmp_path):
    with pytest.raises(TaskDeferred) as deferred:
        operator(tmp_path, logs="live", deferrable=True).execute({"ti": Task()})
    trigger = triggers.RayJobResourceTrigger(**deferred.value.trigger.serialize()[1])
    trigger._on_line = shown

    async def follow() -> None:
        waits = asyncio.ensure_future(anext(trigger.run()))
        while len(shown) < 10:
            await asyncio.sleep(0.01)
        waits.cancel()
        await asyncio.wait({waits})

    asyncio.run(follow())
    seen = len(shown)
    assert 10 <= seen < len(LINES)
    assert operator(tmp_path, logs="live").execute({"ti": Task(2)})["attempts"] == 1
    assert shown == LINES and simulator.started and len(simulator.started) == 1


def test_without_a_submitter_there_is_no_log_to_wait_for(simulator, kube_api, shown, tmp_path):
    began = time.monotonic()
    http = {"submission_mode": "HTTPMode"}
    assert operator(tmp_path, logs="live", cluster=http).execute({"ti": Task()})["attempts"] == 1
    assert shown == [] and time.monotonic() - began < triggers.DRAIN / 2


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
