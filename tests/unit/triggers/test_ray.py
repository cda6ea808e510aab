"""RayJobTrigger against a stand-in for Ray's dashboard: limits, the end in the triggerer, the driver's log."""

from __future__ import annotations

import asyncio
import json
import random
import time

import pytest
from airflow.triggers.base import TaskSuccessEvent
from support.ray_dashboard import RayDashboard

from airflow_mlops.hooks import ray as hooks
from airflow_mlops.training.limits import Budget, Limits, Times
from airflow_mlops.training.result import TrainingResult, outcome, read_result, write_result
from airflow_mlops.training.spec import TrainingSpec
from airflow_mlops.triggers import _training, ray
from airflow_mlops.triggers.ray import PauseTrigger, RayJobTrigger


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(hooks, "LOG_PAUSE", 0.01)
    monkeypatch.setattr(ray, "STOP_MARGIN", 0.5)
    monkeypatch.setattr(_training, "KILL_PAUSE", 0.05)


@pytest.fixture
def dashboard(monkeypatch):
    with RayDashboard() as server:
        monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", server.connection())
        server.jobs["j"] = {"status": "RUNNING"}
        yield server


@pytest.fixture
def spec(tmp_path) -> TrainingSpec:
    return TrainingSpec("pkg.mod:loop", "torch", str(tmp_path), "r1")


class Shown(list):
    """The task's log: a trigger whose ``log`` writes here."""

    def info(self, form, *args) -> None:
        self.append(form % args)

    warning = info


def trigger(spec: TrainingSpec | None = None, shown: Shown | None = None, **changes) -> RayJobTrigger:
    """As it comes out of the database."""
    values = {
        "submission_id": "j",
        "ray_conn_id": "ray_default",
        "address": None,
        "poll_interval": 0.03,
        "unreachable_timeout": 0.3,
        "cancel_on_kill": True,
        "stop_timeout": 0.5,
        "state": {} if spec is None else {"spec": spec.to_json(), "restarts": 0, "adopted": False},
    }
    path, kwargs = RayJobTrigger(**{**values, **changes}).serialize()
    assert path == f"{RayJobTrigger.__module__}.{RayJobTrigger.__qualname__}"
    made = RayJobTrigger(**json.loads(json.dumps(kwargs)))
    if shown is not None:
        made._log = shown
    return made


async def event(waiting: RayJobTrigger):
    return await asyncio.wait_for(anext(waiting.run()), 20)


def succeeds(spec: TrainingSpec) -> None:
    write_result(spec, TrainingResult("SUCCEEDED", spec.attempt, spec.fingerprint, metrics={"auc": 0.7}))


def test_success_ends_the_task_or_calls_a_worker(dashboard, spec):
    succeeds(spec)
    dashboard.finish("j")
    end = asyncio.run(event(trigger(spec, finish_in_triggerer=True)))
    value = outcome(spec, read_result(spec))
    assert isinstance(end, TaskSuccessEvent) and end.xcoms == {**value, "return_value": value}
    called = asyncio.run(event(trigger(spec)))
    assert not isinstance(called, TaskSuccessEvent) and called.payload["seen"]["status"] == "SUCCEEDED"
    # ``dag.test()`` hands the payload of the end to the operator; a triggerer sends it nowhere.
    assert end.payload == called.payload
    assert end.model_dump() == {"task_instance_state": "success", "xcoms": end.xcoms}


def test_failure_calls_a_worker_with_what_was_seen(dashboard, spec):
    dashboard.finish("j", "FAILED", driver_exit_code=-9, message="killed")
    told = asyncio.run(event(trigger(spec, finish_in_triggerer=True))).payload
    assert told["seen"] == {"status": "FAILED", "exit_code": -9, "message": "killed"}
    assert told["state"]["spec"]["run_key"] == "r1"


def test_state_of_another_version_calls_a_worker(dashboard, spec):
    waiting = trigger(spec)
    waiting.state["spec"]["unheard_of"] = 1
    assert "another version" in asyncio.run(event(waiting)).payload["error"]


def limited(**limits) -> dict:
    times = Times(run_began=time.time(), attempt_began=time.time(), gpus=2)
    return {"limits": Limits(**limits).to_json(), "times": times.to_json()}


@pytest.mark.parametrize(
    ("limits", "kind", "restart"),
    [
        ({"attempt_timeout": 0.4}, "attempt", False),
        ({"total_timeout": 0.4}, "total", False),
        ({"stall_timeout": 0.4}, "stall", True),
        ({"budget": Budget(max_gpu_hours=0.8 / 3600)}, "budget", False),
    ],
)
def test_broken_limit_stops_the_job_and_waits_for_its_end(dashboard, spec, limits, kind, restart):
    stopping: list[float] = []

    def checkpoint_first(name: str) -> dict:
        stopping.append(time.time())
        return {"status": "RUNNING"}

    dashboard.on_stop = checkpoint_first

    async def wait():
        async def end() -> None:
            while not stopping:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            dashboard.finish("j", "STOPPED")

        ending = asyncio.create_task(end())
        told = await event(trigger(spec, **limited(**limits)))
        await ending
        return told.payload

    began = time.time()
    told = asyncio.run(wait())
    assert told["breach"]["kind"] == kind and told["breach"]["restart"] is restart and told["breach"]["message"]
    assert told["seen"]["status"] == "STOPPED" and stopping[0] - began > 0.3 and dashboard.stopped == ["j"]
    assert Times.from_json(told["times"]).running_since is not None and told["state"]["spec"]


def test_job_that_never_starts_breaks_its_limit(dashboard, spec):
    dashboard.jobs["j"] = {"status": "PENDING"}
    told = asyncio.run(event(trigger(spec, **limited(startup_timeout=0.2)))).payload
    assert told["breach"]["kind"] == "startup" and told["seen"]["status"] == "STOPPED"


def test_job_that_does_not_stop_is_said_to_run(dashboard, spec):
    dashboard.on_stop = None
    told = asyncio.run(event(trigger(spec, **limited(attempt_timeout=0.1)))).payload
    assert told["breach"] and told["seen"]["status"] == "RUNNING"


def test_limit_is_kept_while_the_dashboard_is_away(dashboard, spec):
    async def wait():
        asyncio.get_running_loop().call_later(0.15, setattr, dashboard, "down", True)
        asyncio.get_running_loop().call_later(0.7, setattr, dashboard, "down", False)
        return await event(trigger(spec, unreachable_timeout=60.0, stop_timeout=5.0, **limited(attempt_timeout=0.4)))

    told = asyncio.run(wait()).payload
    assert told["breach"]["kind"] == "attempt" and told["seen"]["status"] == "STOPPED"


def test_token_that_is_rotated_on_the_cluster_first_is_waited_for(dashboard, spec, monkeypatch):
    async def wait():
        waiting = asyncio.create_task(event(trigger(spec, unreachable_timeout=10.0)))
        await asyncio.sleep(0.2)
        dashboard.token = "rotated"
        await asyncio.sleep(0.2)
        monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", dashboard.connection())
        await asyncio.sleep(0.2)
        dashboard.finish("j")
        return await waiting

    assert asyncio.run(wait()).payload["seen"]["status"] == "SUCCEEDED"


def test_token_that_stays_refused_ends_the_wait(dashboard, spec):
    async def wait():
        asyncio.get_running_loop().call_later(0.2, setattr, dashboard, "token", "rotated")
        return await event(trigger(spec))

    told = asyncio.run(wait()).payload
    assert told["seen"]["status"] == "UNREACHABLE" and "refuses the token" in told["seen"]["message"]
    assert "refuses the token" in asyncio.run(event(trigger(spec))).payload["error"]


TEXT = [f"step {number}: loss 0.{number:03d} – ok" for number in range(120)]


def test_log_is_shown_once_over_cut_sockets_and_restarted_triggerers(dashboard, spec, monkeypatch):
    """A job writes all the while; sockets break anywhere and triggerers are shut down at any moment."""
    monkeypatch.setattr(_training.LogRelay.__init__, "__defaults__", (0.02,))
    draw, shown = random.Random(11), Shown()
    dashboard.cuts = [draw.randrange(4000) for _ in range(40)]

    async def write() -> None:
        for line in TEXT:
            dashboard.write("j", line + "\n")
            await asyncio.sleep(0.005)
        dashboard.finish("j")

    async def live() -> int:
        writing, restarts = asyncio.create_task(write()), 0
        while True:
            waiting = asyncio.create_task(event(trigger(spec, shown, logs="live")))
            done, _ = await asyncio.wait({waiting}, timeout=draw.uniform(0.02, 0.2))
            if done and writing.done():
                assert waiting.result().payload["seen"]["status"] == "SUCCEEDED"
                return restarts
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            restarts += 1
            assert restarts < 200

    restarts = asyncio.run(asyncio.wait_for(live(), 60))
    assert shown == TEXT and restarts > 2


def test_end_of_the_log_comes_before_the_event(dashboard, spec, monkeypatch):
    monkeypatch.setattr(hooks, "LOG_PAUSE", 0.5)
    shown = Shown()
    dashboard.cuts = [2]
    dashboard.write("j", "one\ntwo without an end")

    async def wait():
        asyncio.get_running_loop().call_later(0.1, dashboard.finish, "j")
        return await event(trigger(spec, shown, logs="live"))

    asyncio.run(wait())
    assert shown == ["one", "two without an end"]
    asyncio.run(event(trigger(spec, shown, logs="live")))
    assert shown == ["one", "two without an end"]


def test_tail_shows_the_last_lines_once(dashboard, spec):
    shown = Shown()
    dashboard.write("j", "".join(f"{number}\n" for number in range(500)))
    dashboard.finish("j")
    asyncio.run(event(trigger(spec, shown, logs="tail")))
    assert shown == [str(number) for number in range(300, 500)]
    shown.clear()
    asyncio.run(event(trigger(spec, shown, logs="off")))
    assert shown == []


def test_log_that_cannot_be_had_delays_no_event(dashboard, spec, monkeypatch):
    monkeypatch.setattr(_training, "DRAIN", 0.3)
    shown = Shown()

    async def wait():
        asyncio.get_running_loop().call_later(0.1, setattr, dashboard, "down", True)
        return await event(trigger(spec, shown, logs="live"))

    assert asyncio.run(wait()).payload["seen"]["status"] == "UNREACHABLE"


def test_kill_is_tried_again_and_a_restart_kills_nothing(dashboard, spec):
    async def shut_down() -> None:
        waiting = asyncio.create_task(event(trigger(spec, logs="live")))
        await asyncio.sleep(0.2)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await trigger(spec).cleanup()

    asyncio.run(asyncio.wait_for(shut_down(), 20))
    assert dashboard.stopped == []

    async def kill() -> None:
        dashboard.down = True
        asyncio.get_running_loop().call_later(0.08, setattr, dashboard, "down", False)
        await trigger(spec).on_kill()

    asyncio.run(kill())
    assert dashboard.stopped == ["j"]


@pytest.mark.parametrize(("ahead", "least"), [(0.3, 0.3), (-5.0, 0.0)])
def test_pause_lasts_until_its_time_whoever_began_it(ahead, least):
    path, kwargs = PauseTrigger(until=time.time() + ahead, state={"restarts": 2}).serialize()
    assert path == f"{PauseTrigger.__module__}.{PauseTrigger.__qualname__}"
    began = time.monotonic()
    told = asyncio.run(event(PauseTrigger(**json.loads(json.dumps(kwargs)))))
    assert told.payload == {"paused": True, "state": {"restarts": 2}}
    assert least - 0.05 <= time.monotonic() - began < least + 2
