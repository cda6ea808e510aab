"""The driver's command and environment."""

from __future__ import annotations

import shlex

import pytest

from airflow_mlops.training.launch import driver_command, driver_env
from airflow_mlops.training.spec import TrainingSpec


@pytest.mark.parametrize("uri", ["s3://b/r/_mlops/spec-a1.json", "/a b/it's.json; rm -rf $HOME"])
def test_the_shell_passes_the_spec_on_as_it_is(uri):
    words = shlex.split(driver_command(uri, "/opt/my python"))
    assert words == ["exec", "/opt/my python", "-m", "airflow_mlops.training", "--spec", uri]
    assert driver_command("s").startswith("exec python -m ")


@pytest.mark.parametrize(("cpus", "threads"), [(None, "1"), ({"CPU": 0.5}, "1"), ({"CPU": 4}, "4"), ({"GPU": 1}, "1")])
def test_the_driver_has_at_least_a_second_and_a_thread(cpus, threads):
    spec = TrainingSpec("a.b:c", "torch", "s3://b/r", "r", resources_per_worker=cpus)
    assert driver_env(spec, 0.2)["RAY_JOB_STOP_WAIT_TIME_S"] == "1"
    assert driver_env(spec, 40.5)["RAY_JOB_STOP_WAIT_TIME_S"] == "41"
    assert driver_env(spec, 1)["OMP_NUM_THREADS"] == threads
