"""The window's profile from a job: against a stand-in of Ray's Jobs API that does what the job would do."""

from __future__ import annotations

import json
import logging
import shlex

import pandas as pd
import pytest
from support.ray_dashboard import RayDashboard

from airflow_mlops.drift import Profile
from airflow_mlops.drift.__main__ import main
from airflow_mlops.exceptions import DataError, ExternalSystemError, InvalidInputError
from airflow_mlops.sensors._drift_ray import profile_by_job

LOG = logging.getLogger(__name__)


def build(uri, *, columns, categorical, num_cpus):
    """What the job calls on a cluster, in this process."""
    assert num_cpus == 0.5
    return Profile.of(uri, columns=columns, categorical=categorical)


def plays(body):
    """The job's entrypoint, run at once."""
    *command, spec = shlex.split(body["entrypoint"])
    assert command == ["python", "-m", "airflow_mlops.drift"]
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

    def ask(columns=("a", "b"), **options):
        uri, output = str(tmp_path / "month.parquet"), str(tmp_path / "out.profile.json")
        options = {"num_cpus": "0.5", "poll_interval": 0.01, **options}
        return profile_by_job(LOG, "ray_x", uri, columns, ["a"], output, options)

    return ask


def test_the_profile_is_the_one_of_one_process(ask, tmp_path, cluster):
    found = ask(runtime_env={"env_vars": {"A": "1"}})
    assert found.digest == Profile.of(str(tmp_path / "month.parquet"), categorical=["a"]).digest
    assert cluster.submitted[0]["runtime_env"] == {"env_vars": {"A": "1"}}


def test_data_that_cannot_be_profiled_are_the_datas_fault(ask):
    with pytest.raises(DataError, match="nowhere"):
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


class KilledError(BaseException):
    """What a task is ended with."""


def test_a_task_that_is_killed_stops_its_job(ask, cluster, monkeypatch):
    cluster.play = lambda body: {"status": "RUNNING"}

    def killed(seconds):
        raise KilledError

    monkeypatch.setattr("airflow_mlops.sensors._drift_ray.time.sleep", killed)
    with pytest.raises(KilledError):
        ask()
    assert cluster.stopped == [cluster.submitted[0]["submission_id"]]


def test_a_job_that_still_runs_is_gone_on_with(ask, cluster, monkeypatch):
    """As a try after a lost worker finds it: it is not submitted a second time, and its profile is taken."""
    cluster.play = lambda body: {"status": "RUNNING"}
    cluster.on_stop = None

    def lost(seconds):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("airflow_mlops.sensors._drift_ray.time.sleep", lost)
        with pytest.raises(KilledError):
            ask()
    (body,) = cluster.submitted

    def ends(seconds):
        cluster.jobs[body["submission_id"]].update(plays(body))

    monkeypatch.setattr("airflow_mlops.sensors._drift_ray.time.sleep", ends)
    assert ask().rows == 900 and len(cluster.submitted) == 1


def test_a_job_that_fails_is_an_error_with_its_message(ask, cluster):
    cluster.play = lambda body: {"status": "FAILED", "message": "out of memory"}
    with pytest.raises(ExternalSystemError, match="FAILED: out of memory"):
        ask()


def test_a_profile_that_is_not_seen_says_what_storage_is_needed(ask, cluster):
    cluster.play = lambda body: {"status": "SUCCEEDED"}
    with pytest.raises(ExternalSystemError, match="storage that Ray's workers"):
        ask()


def test_options_that_there_are_not_are_refused(ask):
    with pytest.raises(InvalidInputError, match="unknown engine_options: cpus"):
        ask(cpus=1)


def test_the_spec_is_json(tmp_path):
    spec = {"uri": str(tmp_path / "none"), "columns": ["a"], "categorical": [], "num_cpus": 0.5}
    assert main([json.dumps({**spec, "job": "j-0", "output": str(tmp_path / "o.json")})], build) == 0
    left = json.loads((tmp_path / "o.json").read_text())
    assert left["job"] == "j-0" and "none" in left["error"]
