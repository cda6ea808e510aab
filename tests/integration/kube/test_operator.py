"""``RayTrainOperator(mode="kuberay")`` against the stand-in API server with a KubeRay that acts on it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred
from airflow.triggers.base import TaskSuccessEvent
from support.kube_api import Fault
from support.kube_sim import RayJobSimulator, Stop
from support.kube_training import STEPS, Task, fails, operator, steps, train, until

from airflow_mlops.exceptions import AttemptsExhaustedError, ExternalSystemError, TrainingError
from airflow_mlops.hooks._kubernetes_connection import KubernetesConnection
from airflow_mlops.operators.ray import RayTrainOperator
from airflow_mlops.triggers.kuberay import RayJobResourceTrigger


@pytest.fixture
def kuberay(kube_api, kubeconfig, monkeypatch):
    connection = {"conn_type": "kuberay", "extra": {"kube_config_path": str(kubeconfig), "namespace": "default"}}
    monkeypatch.setenv("AIRFLOW_CONN_KUBERAY", json.dumps(connection))
    monkeypatch.setattr("airflow_mlops.hooks.kuberay._LOOK", 0.02)
    # The cluster's own deadlines run on the simulator's fast clock.
    monkeypatch.setattr("airflow_mlops.operators._kuberay.MARGIN", 1e6)
    with RayJobSimulator(kube_api, scale=0.005, script=train) as simulator:
        yield simulator


def run(op: RayTrainOperator, task: Task) -> dict[str, Any]:
    """Execute, and where it defers let the trigger run and resume on a fresh instance, as Airflow does."""
    context: Any = {"ti": task}
    try:
        return op.execute(context)
    except TaskDeferred as deferral:
        deferred = deferral
    while True:
        path, kwargs = deferred.trigger.serialize()
        assert path == f"{RayJobResourceTrigger.__module__}.{RayJobResourceTrigger.__name__}"
        trigger = RayJobResourceTrigger(**json.loads(json.dumps(kwargs)))
        event = asyncio.run(first(trigger))
        if isinstance(event, TaskSuccessEvent):
            return event.xcoms["return_value"]
        fresh = op.prepare_for_execution()
        try:
            return getattr(fresh, deferred.method_name)(context, json.loads(json.dumps(event.payload)))
        except TaskDeferred as again:
            deferred = again


async def first(trigger: RayJobResourceTrigger) -> Any:
    async for event in trigger.run():
        return event


def left(kube_api: Any) -> list[str]:
    """What is still there, once what is on its way out has gone."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = [
            item["metadata"]["name"] for kind in ("RayJob", "RayCluster", "Pod", "Job") for item in kube_api.list(kind)
        ]
        if not found:
            return []
        time.sleep(0.05)
    return found


waits = pytest.mark.parametrize("deferrable", [False, True], ids=["blocking", "deferrable"])


@waits
def test_success(kuberay, kube_api, tmp_path, deferrable):
    task = Task()
    outcome = run(operator(tmp_path, deferrable=deferrable), task)
    assert outcome["status"] == "SUCCEEDED" and outcome["attempts"] == 1 and outcome["metrics"] == {"steps": STEPS}
    assert len(kuberay.started) == 1 and kuberay.started[0].endswith("-a1")
    assert task.pushed["ray_attempt"]["submission_id"] == kuberay.started[0]
    assert left(kube_api) == []
    assert run(operator(tmp_path, deferrable=deferrable), Task(2)) == outcome and len(kuberay.started) == 1


@waits
def test_a_lost_head_is_replaced_once_its_pods_are_gone(kuberay, kube_api, tmp_path, deferrable):
    kuberay.pods_linger(0.3)

    def kill() -> None:
        until(lambda: kuberay.running_attempts() and steps(tmp_path / "r1") > 3)
        kuberay.kill_head(kuberay.started[0])

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = run(operator(tmp_path, deferrable=deferrable), Task())
    killer.join()
    assert outcome["attempts"] == 2 and outcome["resumed_from"]
    assert set(kuberay.max_overlap.values()) == {1} and set(kuberay.max_running.values()) == {1}
    assert left(kube_api) == []


@waits
def test_an_application_error_is_left_to_airflow_with_its_log(kuberay, kube_api, tmp_path, deferrable):
    kuberay.script = fails
    with pytest.raises(TrainingError, match=r"(?s)failed in the training code.*bad label.*End of the driver's log"):
        run(operator(tmp_path, deferrable=deferrable), Task())
    assert len(kuberay.started) == 1 and left(kube_api) == []
    kuberay.script = train
    assert run(operator(tmp_path, deferrable=deferrable), Task(2))["attempts"] == 2


@waits
def test_a_rayjob_that_somebody_deletes_is_stopped_for_good(kuberay, kube_api, tmp_path, deferrable):
    def delete() -> None:
        # One that was gone before anybody saw it is lost, not stopped: a watch follows a list.
        until(lambda: kuberay.started and kube_api.count(path_contains="/rayjobs", watch=True))
        kube_api.delete("RayJob", "default", kuberay.started[0])

    killer = threading.Thread(target=delete)
    killer.start()
    with pytest.raises(AirflowFailException, match="was stopped"):
        run(operator(tmp_path, deferrable=deferrable), Task())
    killer.join()
    assert left(kube_api) == []


@waits
def test_what_cannot_start_is_named(kuberay, kube_api, tmp_path, deferrable):
    kuberay.image_pull_error()
    with pytest.raises(ExternalSystemError, match=r"did not start within startup_timeout=1 s.*cannot be pulled"):
        run(operator(tmp_path, deferrable=deferrable, startup_timeout=1), Task())
    assert left(kube_api) == []


@waits
def test_restarts_are_limited(kuberay, kube_api, tmp_path, deferrable):
    def kill() -> None:
        for attempt in (1, 2):
            until(lambda attempt=attempt: len(kuberay.started) == attempt and kuberay.running_attempts())
            kuberay.kill_head(kuberay.started[-1])

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(AirflowFailException, match="all 1 restarts are used up"):
        run(operator(tmp_path, deferrable=deferrable, max_restarts=1), Task())
    killer.join()
    assert AttemptsExhaustedError.retryable is False and left(kube_api) == []


def test_a_later_try_takes_the_attempt_over(kuberay, kube_api, tmp_path):
    with pytest.raises(TaskDeferred) as first_try:
        operator(tmp_path, deferrable=True).execute({"ti": Task(1)})
    with pytest.raises(TaskDeferred) as second_try:
        operator(tmp_path, deferrable=True).execute({"ti": Task(2)})
    # The first try's trigger is told of the clearing only now: it must leave the attempt alone.
    asyncio.run(first_try.value.trigger.on_kill())
    event = asyncio.run(first(second_try.value.trigger))
    assert event.xcoms["return_value"]["attempts"] == 1 and len(kuberay.started) == 1
    assert left(kube_api) == []


def test_a_cleared_task_ends_its_attempt_and_the_next_try_goes_on(kuberay, kube_api, tmp_path):
    with pytest.raises(TaskDeferred) as cleared:
        operator(tmp_path, deferrable=True).execute({"ti": Task(1)})
    until(lambda: kuberay.running_attempts() and steps(tmp_path / "r1") > 2)
    asyncio.run(cleared.value.trigger.on_kill())
    outcome = run(operator(tmp_path, deferrable=True), Task(2))
    assert outcome["attempts"] == 2 and outcome["resumed_from"]
    assert set(kuberay.max_overlap.values()) == {1}


def test_a_fresh_training_is_trained_once_by_the_tries_of_a_task(kuberay, tmp_path):
    def outcome(try_number: int, max_tries: int) -> int:
        task = Task(try_number)
        task.max_tries = max_tries
        return run(operator(tmp_path, fresh=True), task)["attempts"]

    assert [outcome(1, 2), outcome(2, 2), outcome(3, 4)] == [1, 1, 2]
    assert len(kuberay.started) == 2


def test_a_budget_ends_it_and_a_higher_one_goes_on(kuberay, kube_api, tmp_path):
    def slow(rayjob: dict[str, Any], stop: Stop) -> int:
        while not stop.is_set():
            stop.wait(0.01)
        return 143

    kuberay.script = slow
    gpu = {"cluster": {"gpu": {"kind": "full"}}, "use_gpu": True}
    with pytest.raises(AirflowFailException, match=r"budget of .* GPU-hours is used up.* GPU-seconds, which cost 0\.0"):
        run(
            operator(tmp_path, deferrable=True, budget={"max_gpu_hours": 0.5 / 3600, "price_per_gpu_hour": 2.0}, **gpu),
            Task(),
        )
    assert left(kube_api) == []
    kuberay.script = train
    higher = {"max_gpu_hours": 1, "price_per_gpu_hour": 2.0}
    outcome = run(operator(tmp_path, deferrable=True, budget=higher, **gpu), Task(2))
    assert outcome["attempts"] == 2 and "cost" in outcome


def test_live_lines_come_once_over_a_restart_of_the_triggerer(kuberay, kube_api, tmp_path):
    def talks(rayjob: dict[str, Any], stop: Stop) -> int:
        for line in range(60):
            stop.log(f"line {line}")
            stop.wait(0.02)
        return train(rayjob, stop)

    kuberay.script = talks
    with pytest.raises(TaskDeferred) as deferred:
        operator(tmp_path, deferrable=True, logs="live").execute({"ti": Task(1)})
    lines: list[str] = []

    async def follow(seconds: float | None) -> Any:
        trigger = RayJobResourceTrigger(**deferred.value.trigger.serialize()[1])
        trigger._on_line = lines.append
        return await asyncio.wait_for(first(trigger), seconds)

    until(lambda: kuberay.running_attempts())
    with pytest.raises(TimeoutError):
        asyncio.run(follow(0.6))
    assert isinstance(asyncio.run(follow(30)), TaskSuccessEvent)
    assert [line for line in lines if line.startswith("line")] == [f"line {number}" for number in range(60)]


@waits
def test_what_is_refused_at_once_is_not_tried_again(kuberay, kube_api, tmp_path, deferrable):
    kuberay.stop()

    def refuse() -> None:
        for rayjob in kube_api.list("RayJob"):
            if "status" not in rayjob and not rayjob["metadata"].get("deletionTimestamp"):
                refused = {
                    "jobDeploymentStatus": "ValidationFailed",
                    "reason": "ValidationFailed",
                    "message": "bad name",
                }
                kube_api.put_status("RayJob", "default", rayjob["metadata"]["name"], refused)

    kube_api.store.listeners.append(refuse)
    try:
        with pytest.raises(AirflowFailException, match=r"attempt 1 is not accepted.*bad name"):
            run(operator(tmp_path, deferrable=deferrable), Task())
    finally:
        kube_api.store.listeners.remove(refuse)
    assert len([found for found in kube_api.requests if found[0] == "POST"]) == 1


@waits
def test_an_outage_at_the_end_of_an_attempt_is_waited_out(kuberay, kube_api, tmp_path, deferrable, monkeypatch):
    """A lost head shows in the watch, and why it was lost is asked for."""
    monkeypatch.setitem(KubernetesConnection.__init__.__kwdefaults__, "patience", 0.2)
    down = threading.Event()

    def kill() -> None:
        until(lambda: kuberay.started and steps(tmp_path / "r1") > 3)
        kube_api.faults.append(Fault(lambda method, path: method == "GET" and path.endswith("-a1"), 503, times=8))
        kuberay.kill_head(kuberay.started[0])
        down.set()

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = run(operator(tmp_path, deferrable=deferrable), Task())
    killer.join()
    assert down.is_set() and outcome["attempts"] == 2 and outcome["resumed_from"]


@waits
def test_a_limit_is_kept_though_nobody_may_say_why(kuberay, kube_api, tmp_path, deferrable):
    kuberay.image_pull_error()
    kube_api.forbid("list", "events")
    with pytest.raises(ExternalSystemError, match=r"did not start within startup_timeout=1 s.*events"):
        run(operator(tmp_path, deferrable=deferrable, startup_timeout=1), Task())
    assert left(kube_api) == []


@waits
def test_a_limit_shows_the_log_that_goes_with_its_pod(kuberay, kube_api, tmp_path, deferrable):
    def hangs(rayjob: dict[str, Any], stop: Stop) -> int:
        stop.log("waiting for a lock")
        stop.wait(60)
        return 143

    kuberay.script = hangs
    with pytest.raises(AirflowFailException, match=r"(?s)took longer than attempt_timeout=1 s.*waiting for a lock"):
        run(operator(tmp_path, deferrable=deferrable, attempt_timeout=1), Task())
    assert left(kube_api) == []


def test_a_limit_is_kept_by_the_next_triggerer_though_the_rayjob_has_gone(kuberay, kube_api, tmp_path):
    """The first one had deleted it, and was lost before it could say so."""
    op = operator(tmp_path, deferrable=True, attempt_timeout=0.5)
    with pytest.raises(TaskDeferred) as deferred:
        op.execute({"ti": Task()})
    kube_api.delete("RayJob", "default", kube_api.list("RayJob")[0]["metadata"]["name"])
    assert left(kube_api) == []
    time.sleep(0.6)
    event = asyncio.run(first(deferred.value.trigger))
    assert event.payload["breach"]["kind"] == "attempt"


@waits
@pytest.mark.parametrize("forbidden", [False, True], ids=["absent", "forbidden"])
def test_a_scheduler_that_does_not_act_ends_the_attempt(
    kuberay, kube_api, tmp_path, deferrable, forbidden, monkeypatch
):
    if forbidden:
        kube_api.forbid("list", "workloads")
    monkeypatch.setattr("airflow_mlops.triggers.kuberay.PREFLIGHT", 0.2)
    cluster = {"gang": {"scheduler": "kueue", "queue": "team"}}
    with pytest.raises(AirflowFailException, match="workloads" if forbidden else "Kueue has made no Workload"):
        run(operator(tmp_path, deferrable=deferrable, cluster=cluster), Task())
    assert left(kube_api) == []


@waits
def test_a_scheduler_that_does_not_act_is_noticed_though_the_pods_start_at_once(
    kuberay, kube_api, tmp_path, deferrable
):
    def hangs(rayjob: dict[str, Any], stop: Stop) -> int:
        stop.wait(60)
        return 143

    kuberay.script = hangs
    cluster = {"gang": {"scheduler": "volcano", "queue": "team"}}
    with pytest.raises(AirflowFailException, match="volcano does not act on the RayJob"):
        run(operator(tmp_path, deferrable=deferrable, cluster=cluster, keep_on_failure=True), Task())
    assert left(kube_api) == []


def test_a_scheduler_is_not_blamed_while_there_are_no_pods(kuberay, kube_api, tmp_path, monkeypatch):
    """KubeRay itself may be on its way up."""
    monkeypatch.setattr("airflow_mlops.triggers.kuberay.PREFLIGHT", 0.1)
    monkeypatch.setattr("airflow_mlops.triggers.kuberay.QUEUE_LOOK", 0.1)
    kuberay.stop()
    cluster = {"gang": {"scheduler": "yunikorn", "queue": "root.team"}}
    with pytest.raises(ExternalSystemError, match=r"did not start within startup_timeout=1 s"):
        run(operator(tmp_path, startup_timeout=1, cluster=cluster), Task())


def test_another_task_with_the_same_run_key_neither_takes_nor_ends_an_attempt(kuberay, kube_api, tmp_path):
    with pytest.raises(TaskDeferred) as waits_for_it:
        operator(tmp_path, deferrable=True).execute({"ti": Task(1)})
    until(lambda: kuberay.running_attempts())
    other = Task(5)
    other.run_id = "run-2"
    with pytest.raises(AirflowFailException, match=r"followed by another task, dag/train/run-1/-1"):
        operator(tmp_path, deferrable=True).execute({"ti": other})
    assert len(kuberay.started) == 1
    assert asyncio.run(first(waits_for_it.value.trigger)).xcoms["return_value"]["attempts"] == 1


@waits
def test_what_cannot_be_followed_is_ended(kuberay, kube_api, tmp_path, deferrable):
    kube_api.forbid("watch", "rayjobs")
    with pytest.raises(AirflowFailException, match="watch"):
        run(operator(tmp_path, deferrable=deferrable), Task())
    assert left(kube_api) == []


def test_a_misspelt_function_is_found_before_anything_is_created(kuberay, kube_api, tmp_path):
    train_fn = "airflow_mlops.examples.torch_loop:train_lop_per_worker"
    with pytest.raises(AirflowFailException, match=r"torch_loop\.py has no 'train_lop_per_worker'"):
        run(operator(tmp_path, train_fn=train_fn), Task())
    assert not [found for found in kube_api.requests if found[0] == "POST"]


def test_what_has_failed_can_be_kept_to_be_looked_at(kuberay, kube_api, tmp_path):
    kuberay.script = fails
    with pytest.raises(TrainingError):
        run(operator(tmp_path, keep_on_failure=True, cluster={"ttl_after_finished": 10_000}), Task())
    (rayjob,) = kube_api.list("RayJob")
    assert "deletionTimestamp" not in rayjob["metadata"] and kube_api.list("Pod")
