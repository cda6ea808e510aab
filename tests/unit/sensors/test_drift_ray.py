"""The window's profile from a job: against a stand-in of Ray's Jobs API that does what the job would do."""

from __future__ import annotations

import json
import logging
import shlex
import sys

import pandas as pd
import pytest
from support.ray_dashboard import RayDashboard

from airflow_mlops.drift import Profile
from airflow_mlops.drift.__main__ import main
from airflow_mlops.exceptions import DataError, ExternalSystemError, InvalidInputError
from airflow_mlops.hooks.ray import RayJobsHook
from airflow_mlops.sensors._drift_ray import ProfileJob, check_options

LOG = logging.getLogger(__name__)
SLEEP = "airflow_mlops.sensors._drift_ray.time.sleep"


def build(uri, *, columns, categorical, num_cpus):
    """What the job calls on a cluster, in this process."""
    assert num_cpus == 0.5
    return Profile.of(uri, columns=columns, categorical=categorical)


def plays(body):
    """The job's entrypoint, run at once."""
    *command, spec = shlex.split(body["entrypoint"])
    assert command == ["exec", sys.executable, "-m", "airflow_mlops.drift"], "the cluster is on this machine"
    return {"status": "SUCCEEDED" if main([spec], build) == 0 else "FAILED"}


@pytest.fixture
def cluster(monkeypatch):
    with RayDashboard() as dashboard:
        dashboard.play = plays
        monkeypatch.setenv("AIRFLOW_CONN_RAY_X", dashboard.connection())
        yield dashboard


@pytest.fixture
def ask(tmp_path, cluster):
    pd.DataFrame({"a": range(900), "b": ["x", "it's"] * 450}).to_parquet(tmp_path / "month.parquet")

    def ask(columns=("a", "b"), made=lambda job: None, **options):
        uri, output = str(tmp_path / "month.parquet"), str(tmp_path / "out.profile.json")
        job = ProfileJob(LOG, "ray_x", {"num_cpus": "0.5", "poll_interval": 0.01, **options})
        made(job)
        return job.profile(uri, columns, ["a"], output)

    return ask


def test_the_profile_is_the_one_of_one_process(ask, tmp_path, cluster):
    found = ask(runtime_env={"env_vars": {"A": "1"}})
    assert found.digest == Profile.of(str(tmp_path / "month.parquet"), categorical=["a"]).digest
    assert list(ask(columns=["b", "a"]).columns) == ["b", "a"], "in the order asked for"
    assert cluster.submitted[0]["runtime_env"] == {"env_vars": {"A": "1"}}


def test_data_that_cannot_be_profiled_are_the_datas_fault(ask):
    with pytest.raises(DataError, match=r"nowhere.*So says the job .*the same storage"):
        ask(columns=["nowhere"])


def test_a_check_that_is_done_again_is_a_job_of_its_own(ask, cluster):
    ask(), ask()
    assert [job["submission_id"][-2:] for job in cluster.submitted] == ["-0", "-1"]


def test_what_an_earlier_job_has_left_is_not_taken_for_this_ones(ask, cluster):
    ask()
    cluster.play = lambda body: {"status": "SUCCEEDED"}
    with pytest.raises(ExternalSystemError, match="left nothing that can be seen"):
        ask()


def test_another_question_is_another_job(ask, cluster):
    ask(), ask(columns=["a"])
    assert len({job["submission_id"][:-2] for job in cluster.submitted}) == 2


class OutOfTimeError(BaseException):
    """What a task that runs too long is ended with."""


def test_a_task_that_runs_out_of_time_stops_its_job(ask, cluster, monkeypatch):
    cluster.play = lambda body: {"status": "RUNNING"}

    def late(seconds):
        raise OutOfTimeError

    monkeypatch.setattr(SLEEP, late)
    with pytest.raises(OutOfTimeError):
        ask()
    assert cluster.stopped == [cluster.submitted[0]["submission_id"]]


def test_a_task_that_is_killed_stops_its_job(ask, cluster, monkeypatch):
    """Airflow only calls ``on_kill``, in the midst of whatever is done."""
    cluster.play = lambda body: {"status": "RUNNING"}
    jobs = []
    monkeypatch.setattr(SLEEP, lambda seconds: jobs[0].stop())
    with pytest.raises(ExternalSystemError, match="its task was killed"):
        ask(made=jobs.append)
    assert cluster.stopped == [cluster.submitted[0]["submission_id"]]


def test_a_task_that_is_killed_while_it_submits_leaves_no_job(ask, cluster, monkeypatch):
    cluster.play = lambda body: {"status": "RUNNING"}
    jobs, submit = [], RayJobsHook.submit

    def killed_within(self, *args, **kwargs):
        jobs[0].stop()  # the cluster does not know the job yet
        return submit(self, *args, **kwargs)

    monkeypatch.setattr(RayJobsHook, "submit", killed_within)
    with pytest.raises(ExternalSystemError, match="its task was killed"):
        ask(made=jobs.append)
    assert cluster.jobs[cluster.submitted[0]["submission_id"]]["status"] == "STOPPED"


def lost_worker(ask, cluster, monkeypatch):
    """A task whose worker is gone without a word; the body of the job that it has left."""
    cluster.play = lambda body: {"status": "RUNNING"}

    def lost(seconds):
        raise OutOfTimeError

    with monkeypatch.context() as patch:
        patch.setattr(SLEEP, lost)
        patch.setattr(ProfileJob, "stop", lambda self: None)
        with pytest.raises(OutOfTimeError):
            ask()
    (body,) = cluster.submitted
    return body


def test_a_job_that_still_runs_is_gone_on_with(ask, cluster, monkeypatch):
    """It is not submitted a second time, and its profile is taken."""
    body = lost_worker(ask, cluster, monkeypatch)
    monkeypatch.setattr(SLEEP, lambda seconds: cluster.jobs[body["submission_id"]].update(plays(body)))
    assert ask().rows == 900 and len(cluster.submitted) == 1


def test_a_job_that_another_task_stops_is_begun_again(ask, cluster, monkeypatch):
    """A cleared task's next try may find the job before the one that was killed has stopped it."""
    body = lost_worker(ask, cluster, monkeypatch)
    cluster.play = plays
    monkeypatch.setattr(SLEEP, lambda seconds: cluster.finish(body["submission_id"], "STOPPED"))
    assert ask().rows == 900
    assert [job["submission_id"][-2:] for job in cluster.submitted] == ["-0", "-1"]


def test_a_job_of_ones_own_that_somebody_stops_is_an_error(ask, cluster):
    cluster.play = lambda body: {"status": "STOPPED", "message": "Job was intentionally stopped."}
    with pytest.raises(ExternalSystemError, match="has STOPPED: Job was intentionally stopped"):
        ask()
    assert len(cluster.submitted) == 1


def test_a_dashboard_may_be_away_for_a_while(ask, cluster, monkeypatch):
    body = lost_worker(ask, cluster, monkeypatch)

    def sleep(seconds):
        cluster.down = not cluster.down
        if not cluster.down:
            cluster.jobs[body["submission_id"]].update(plays(body))

    monkeypatch.setattr(SLEEP, sleep)
    assert ask().rows == 900
    monkeypatch.setattr("airflow_mlops.sensors._drift_ray.UNREACHABLE_TIMEOUT", 0.0)
    cluster.play = lambda body: {"status": "RUNNING"}
    monkeypatch.setattr(SLEEP, lambda seconds: setattr(cluster, "down", True))
    with pytest.raises(ExternalSystemError, match=r"No answer for 0 s: Ray at .* answered HTTP 503"):
        ask()


def test_a_job_that_fails_is_an_error_with_its_message(ask, cluster):
    cluster.play = lambda body: {"status": "FAILED", "message": "out of memory"}
    with pytest.raises(ExternalSystemError, match="FAILED: out of memory"):
        ask()
    # Of a driver that failed, Ray's message is a part of its log.
    message = "Job entrypoint command failed with exit code 1, last available logs (truncated to 20,000 chars):\n bar"

    def play(body):
        cluster.log[body["submission_id"]] = (
            "".join(f"line {i}\n" for i in range(99)) + "\x1b[36mMemoryError\x1b[39m: x"
        )
        return {"status": "FAILED", "message": message, "driver_exit_code": 1}

    cluster.play = play
    with pytest.raises(ExternalSystemError) as raised:
        ask()
    said = str(raised.value).splitlines()
    assert said[0].endswith("has FAILED: its driver ended with exit code 1. The end of its log:")
    assert (len(said), said[1], said[-1]) == (31, "line 70", "MemoryError: x")


def test_a_profile_that_is_not_seen_says_what_storage_is_needed(ask, cluster):
    cluster.play = lambda body: {"status": "SUCCEEDED"}
    with pytest.raises(ExternalSystemError, match="storage that Ray's workers"):
        ask()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus": 1}, "unknown engine_options: cpus; for ray there are num_cpus"),
        ({"num_cpus": "two"}, "num_cpus is 'two'; expected a number above 0"),
        ({"poll_interval": 0}, "poll_interval is 0; expected a number above 0"),
    ],
)
def test_options_that_there_are_not_are_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        check_options(options)


def test_another_python_can_be_named(ask, cluster):
    cluster.play = lambda body: {"status": "STOPPED"}
    with pytest.raises(ExternalSystemError):
        ask(python="/opt/ray/bin/python")
    assert cluster.submitted[0]["entrypoint"].startswith("exec /opt/ray/bin/python -m airflow_mlops.drift ")


def test_local_paths_do_not_depend_on_the_folder_of_the_job(cluster, tmp_path, monkeypatch):
    pd.DataFrame({"a": range(900)}).to_parquet(tmp_path / "month.parquet")
    monkeypatch.chdir(tmp_path)

    def elsewhere(body):
        with monkeypatch.context() as patch:
            patch.chdir("/")
            return plays(body)

    cluster.play = elsewhere
    job = ProfileJob(LOG, "ray_x", {"num_cpus": 0.5})
    assert job.profile("month.parquet", ["a"], [], "reports/x.profile.json").rows == 900


def test_the_spec_is_json(tmp_path):
    spec = {"uri": str(tmp_path / "none"), "columns": ["a"], "categorical": [], "num_cpus": 0.5}
    assert main([json.dumps({**spec, "job": "j-0", "output": str(tmp_path / "o.json")})], build) == 0
    left = json.loads((tmp_path / "o.json").read_text())
    assert left["job"] == "j-0" and "none" in left["error"]
