"""Attempts as jobs of a Ray cluster, waited for on a worker."""

from __future__ import annotations

import threading
import time

import pytest
from support.ray_dashboard import RayDashboard

from airflow_mlops.exceptions import ExternalSystemError
from airflow_mlops.hooks import ray as hooks
from airflow_mlops.hooks.ray import AccessRefusedError, RayJobsHook
from airflow_mlops.operators._ray import JobsRunner
from airflow_mlops.training.limits import Breach, Limits, Times
from airflow_mlops.training.spec import TrainingSpec, submission_id_of
from airflow_mlops.triggers._training import LimitWatch


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(hooks, "LOG_PAUSE", 0.01)
    monkeypatch.setattr(hooks, "SUBMIT_PAUSES", (0.01,))


@pytest.fixture
def dashboard(monkeypatch):
    with RayDashboard() as server:
        monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", server.connection())
        yield server


@pytest.fixture
def spec(tmp_path) -> TrainingSpec:
    return TrainingSpec("pkg.mod:loop", "torch", str(tmp_path), "r1")


def runner(shown: list[str] | None = None, **changes) -> JobsRunner:
    values = {
        "python": None,
        "runtime_env": {"env_vars": {"A": "b"}},
        "poll_interval": 0.03,
        "unreachable_timeout": 0.3,
        "stop_timeout": 0.4,
        "metadata": {"team": "risk"},
        "on_line": (shown if shown is not None else []).append,
    }
    return JobsRunner(RayJobsHook(), **{**values, **changes})


def started(dashboard: RayDashboard, spec: TrainingSpec, attempts: JobsRunner) -> str:
    assert attempts.start(spec, "spec.json")
    return submission_id_of(spec)


def test_driver_may_leave_the_head_and_has_time_to_stop(dashboard, spec):
    started(dashboard, spec, runner(resources={"entrypoint_num_cpus": 2, "entrypoint_memory": 1024}, stop_timeout=90.5))
    (body,) = dashboard.submitted
    assert (body["entrypoint_num_cpus"], body["entrypoint_memory"]) == (2, 1024)
    assert body["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "91" and body["metadata"]["team"] == "risk"


def test_second_start_adopts_and_one_that_is_over_says_so(dashboard, spec):
    name = started(dashboard, spec, runner())
    assert runner().start(spec, "spec.json") is True
    dashboard.finish(name, "FAILED")
    assert runner().start(spec, "spec.json") is False
    assert len(dashboard.submitted) == 1


def test_job_that_ends_while_its_submission_is_unclear_was_started(dashboard, spec):
    dashboard.play = lambda body: {"status": "FAILED"}
    dashboard.failures = [500]
    assert runner().start(spec, "spec.json") is True


def watch(spec: TrainingSpec, **limits) -> LimitWatch:
    return LimitWatch(spec, Limits(**limits), Times(run_began=time.time(), attempt_began=time.time()))


def test_broken_limit_is_returned_once_the_job_has_ended(dashboard, spec):
    attempts = runner(stop_timeout=5.0)
    name = started(dashboard, spec, attempts)

    def checkpoint_first(_: str) -> dict:
        threading.Timer(0.3, dashboard.finish, [name, "STOPPED"]).start()
        return {"status": "RUNNING"}

    dashboard.on_stop = checkpoint_first
    held = watch(spec, stall_timeout=0.3)
    broken = attempts.wait_within(spec, held)
    assert isinstance(broken, Breach) and (broken.kind, broken.restart) == ("stall", True)
    assert dashboard.jobs[name]["status"] == "STOPPED" and held.times.running_since is not None


def test_limits_that_hold_change_nothing(dashboard, spec):
    attempts = runner()
    name = started(dashboard, spec, attempts)
    threading.Timer(0.2, dashboard.finish, [name]).start()
    assert attempts.wait_within(spec, watch(spec, attempt_timeout=60)).status == "SUCCEEDED"


def test_stop_survives_a_dashboard_that_is_away_for_a_moment(dashboard, spec):
    attempts = runner(stop_timeout=5.0)
    name = started(dashboard, spec, attempts)
    dashboard.down = True
    threading.Timer(0.2, setattr, [dashboard, "down", False]).start()
    attempts.stop(spec)
    assert dashboard.jobs[name]["status"] == "STOPPED"


def test_stop_that_does_nothing_is_an_error(dashboard, spec, monkeypatch):
    attempts = runner(stop_timeout=-14.7)
    started(dashboard, spec, attempts)
    dashboard.on_stop = None
    with pytest.raises(ExternalSystemError, match="has not been seen to end: still runs"):
        attempts.stop(spec)


def test_refused_token_is_an_error_at_once_and_silence_later(dashboard, spec):
    attempts = runner()
    started(dashboard, spec, attempts)
    threading.Timer(0.2, setattr, [dashboard, "token", "rotated"]).start()
    assert attempts.wait_within(spec, watch(spec)).status == "UNREACHABLE"
    with pytest.raises(AccessRefusedError):
        attempts.wait_within(spec, watch(spec))


def test_live_log_is_whole_and_the_next_worker_goes_on(dashboard, spec):
    shown: list[str] = []
    attempts = runner(shown, logs="live", poll_interval=0.02)
    name = started(dashboard, spec, attempts)
    lines = [f"step {number}" for number in range(60)]
    dashboard.cuts = [7, 100, 333]

    def write() -> None:
        for line in lines:
            dashboard.write(name, line + "\n")
            time.sleep(0.005)
        dashboard.write(name, "the end")
        dashboard.finish(name)

    threading.Thread(target=write, daemon=True).start()
    assert attempts.wait_within(spec, watch(spec)).status == "SUCCEEDED"
    assert shown == [*lines, "the end"]
    again: list[str] = []
    runner(again, logs="live").wait_within(spec, watch(spec))
    assert again == []


def test_live_log_does_not_hold_up_who_ends_the_task(dashboard, spec):
    attempts = runner(logs="live")
    started(dashboard, spec, attempts)

    class Killed(BaseException):
        pass

    def kill(held: LimitWatch) -> None:
        raise Killed

    held = watch(spec)
    held.check = kill  # the wait is left by an exception, as by Airflow's timeout
    began = time.monotonic()
    with pytest.raises(Killed):
        attempts.wait_within(spec, held)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("logs", "count"), [("off", 0), ("tail", 200)])
def test_end_of_the_log_is_shown_as_asked(dashboard, spec, logs, count):
    shown: list[str] = []
    attempts = runner(shown, logs=logs)
    name = started(dashboard, spec, attempts)
    dashboard.write(name, "".join(f"{number}\n" for number in range(300)))
    dashboard.finish(name)
    attempts.wait_within(spec, watch(spec))
    assert shown == [str(number) for number in range(300 - count, 300)]
