"""DriftSensor with ``engine="ray"`` on a real Ray: jobs that give the bits of one process, are taken over, and end."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import psutil
import pytest
from airflow.sdk.exceptions import AirflowFailException

from airflow_mlops import storage
from airflow_mlops.drift import Profile
from airflow_mlops.exceptions import ExternalSystemError
from airflow_mlops.hooks.ray import RayJobsHook
from airflow_mlops.sensors.drift import DriftSensor

pytestmark = pytest.mark.ray

COLUMNS = ["late", "x", "id", "when"]


def rows(rng, size: int, shift: float = 0.0) -> pd.DataFrame:
    frame = pd.DataFrame({"x": rng.normal(shift, 1, size), "id": [f"u{n}" for n in rng.integers(0, 9_000, size)]})
    frame["when"] = pd.Timestamp("2013-04-01", tz="UTC") + pd.to_timedelta(rng.integers(0, 999, size), "h")
    return frame.assign(late=rng.integers(0, 2, size))


@pytest.fixture
def month(tmp_path) -> str:
    """A folder with a month's data in files of several row groups."""
    rng = np.random.default_rng(5)
    (tmp_path / "month").mkdir()
    for i in range(2):
        rows(rng, 9_000 + i, 0.5).to_parquet(tmp_path / f"month/{i}.parquet", index=False, row_group_size=900)
    return str(tmp_path / "month")


@pytest.fixture
def hook(ray_cluster, monkeypatch) -> RayJobsHook:
    connection = {"conn_type": "ray", "host": ray_cluster.dashboard_url, "password": ray_cluster.token}
    monkeypatch.setenv("AIRFLOW_CONN_RAY_X", json.dumps(connection))
    return RayJobsHook("ray_x")


@pytest.fixture
def sensor(tmp_path, month, hook, mlflow_uri):
    from mlflow import MlflowClient

    reference = Profile.of(rows(np.random.default_rng(4), 9_000), columns=COLUMNS, categorical=["late"])
    storage.write_json(f"{tmp_path}/profile.json", reference.to_json())
    client = MlflowClient(tracking_uri=mlflow_uri, registry_uri=mlflow_uri)
    client.create_registered_model("late")
    tags = {"mlops.profile_uri": f"{tmp_path}/profile.json"}
    version = client.create_model_version("late", source=f"{tmp_path}/model", tags=tags)
    client.set_registered_model_alias("late", "champion", version.version)

    def make(engine: str = "ray", **options) -> DriftSensor:
        return DriftSensor(
            task_id="drift",
            current_uri=month,
            model_name="late",
            tracking_uri=mlflow_uri,
            report_dir=f"{tmp_path}/reports",
            columns=COLUMNS,
            retrain_on=["drift"],
            on_stable="proceed",
            experiment="",
            evidently=False,
            engine=engine,
            engine_options={"poll_interval": 0.3, **options} if engine == "ray" else None,
            ray_conn_id="ray_x",
        )

    return make


@pytest.fixture
def ours(hook):
    """The jobs that the test has submitted, by their names."""
    before = set(hook.list_jobs())
    return lambda: {name: job for name, job in hook.list_jobs().items() if name not in before}


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.1)


def test_a_job_gives_the_verdict_of_one_process_and_is_taken_over(sensor, ours, task_context):
    """The first task goes on as one whose worker is lost, for all that the cluster sees; the second is its next try."""
    here = sensor("profile")
    expected = here.execute(task_context())
    report = storage.read_json(expected["report_uri"])
    lost, again = sensor(), sensor()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lost.execute, task_context())
        wait_for(ours)
        found = again.execute(task_context())
        assert first.result(60) == found
    assert [(name[-2:], job.status) for name, job in ours().items()] == [("-0", "SUCCEEDED")]
    assert again._seen.profile.digest == here._seen.profile.digest
    assert list(again._seen.profile.columns) == COLUMNS
    assert found == {**expected, "engine": "ray"} and found["columns"] == ["x"]
    assert storage.read_json(found["report_uri"]) == {**report, "engine": "ray"}


def test_a_killed_task_stops_its_job_and_the_next_names_what_ray_cannot_read(
    sensor, ours, month, tmp_path, task_context
):
    killed = sensor()
    # All that Airflow's task runner does of itself.
    before = signal.signal(signal.SIGTERM, lambda *_: killed.on_kill())

    def kill() -> None:
        wait_for(lambda: [job.status for job in ours().values()] == ["RUNNING"])
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        with pytest.raises(ExternalSystemError, match="its task was killed"):
            killed.execute(task_context())
    finally:
        signal.signal(signal.SIGTERM, before)
    (name,) = ours()
    wait_for(lambda: ours()[name].status == "STOPPED", 20)
    assert not [p.cmdline() for p in psutil.process_iter() if any(name in part for part in _command(p))]
    assert not os.path.exists(tmp_path / "reports") or not os.listdir(tmp_path / "reports")

    with open(f"{month}/1.parquet", "r+b") as file:
        file.seek(4)
        file.write(bytes(2_996))
    with pytest.raises(
        AirflowFailException, match=r"(?s)^cannot read .*/1\.parquet: .*Write it again.*So says the job"
    ):
        sensor().execute(task_context())
    assert [name[-2:] for name in sorted(ours())] == ["-0", "-1"], "a job of its own, for the first was stopped"


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_job_that_fails_says_why_in_a_line_and_with_the_end_of_its_log(sensor, task_context):
    with pytest.raises(ExternalSystemError) as raised:
        sensor(python="/opt/none/bin/python").execute(task_context())
    said = str(raised.value).splitlines()
    assert said[0].endswith("has FAILED: its driver ended with exit code 127. The end of its log:")
    assert any("/opt/none/bin/python: not found" in line for line in said[1:])
