"""A command as the training: real processes, no Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from airflow_mlops import storage
from airflow_mlops.exceptions import InvalidInputError, TrainingError
from airflow_mlops.training.command import CommandLost, read_reported, run_command
from airflow_mlops.training.result import read_result
from airflow_mlops.training.spec import TrainingSpec

REPORT = f"""{sys.executable} -c '
import json, os
config = json.loads(os.environ["MLOPS_CONFIG"])
value = {{"metrics": {{"config": config["a"], "workers": os.environ["MLOPS_NUM_WORKERS"],
    "nan": float("nan"), "from": os.environ["MLOPS_CHECKPOINT"], "attempt": int(os.environ["MLOPS_ATTEMPT"])}},
    "model_uri": os.environ["MLOPS_RUN_DIR"] + "/model"}}
json.dump(value, open(os.environ["MLOPS_RESULT"], "w"))
'"""


def spec_of(tmp_path, entrypoint: str, **changes) -> TrainingSpec:
    spec = TrainingSpec(None, None, str(tmp_path), "r1", entrypoint=entrypoint, config={"a": 5}, **changes)
    spec.validate()
    return spec


def commit(tmp_path, name: str) -> str:
    """What Ray Train leaves of a committed checkpoint."""
    (tmp_path / "r1" / name).mkdir(parents=True)
    snapshot = {"latest_checkpoint_result": {"checkpoint_dir_name": name}}
    storage.write_json(str(tmp_path / "r1/checkpoint_manager_snapshot.json"), snapshot)
    return str(tmp_path / "r1" / name)


def driver(tmp_path, spec: TrainingSpec) -> subprocess.Popen:
    uri = storage.write_json(str(tmp_path / "spec.json"), spec.to_json())
    return subprocess.Popen([sys.executable, "-m", "airflow_mlops.training", "--spec", uri])


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.05)


def test_the_command_is_told_the_run_and_reports_its_result(tmp_path):
    checkpoint = commit(tmp_path, "checkpoint_7")
    done = run_command(spec_of(tmp_path, REPORT, attempt=3, num_workers=(2, 4)))
    assert done["metrics"] == {"config": 5, "workers": "2,4", "nan": None, "from": checkpoint, "attempt": 3}
    assert done["model_uri"] == str(tmp_path / "r1/model") and done["checkpoint_uri"] == checkpoint


def test_a_silent_command_succeeds_with_nothing(tmp_path):
    assert run_command(spec_of(tmp_path, "true")) == {"metrics": {}, "checkpoint_uri": None, "model_uri": None}


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("exit 3", TrainingError),
        ("no-such-command-at-all", TrainingError),
        ("kill -SEGV $$", TrainingError),
        ("kill -KILL $$", CommandLost),
        ("sh -c 'kill -KILL $$'; exit $?", CommandLost),
        ("exit 75", CommandLost),
        ("echo nonsense > $MLOPS_RESULT", InvalidInputError),
    ],
)
def test_whose_fault_it_is(tmp_path, command, error):
    with pytest.raises(error):
        run_command(spec_of(tmp_path, command))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "wrote a list to MLOPS_RESULT"),
        ('{"loss": 1}', "wrote 'loss' to MLOPS_RESULT; expected a JSON object with any of \"metrics\""),
        ('{"metrics": [1]}', "not an object of names and numbers"),
        ('{"model_uri": 3}', "model_uri 3"),
    ],
)
def test_a_result_of_another_form_is_named(tmp_path, content, words):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(InvalidInputError, match=words):
        read_reported(str(tmp_path / "result.json"))


def test_what_the_command_leaves_running_is_ended(tmp_path):
    run_command(spec_of(tmp_path, f"sleep 300 & echo $! > {tmp_path}/pid"))
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 5)


# Two processes: the shell ends at once on SIGTERM, what it has started needs a while to write its checkpoint.
SAVES = f"""{sys.executable} -c '
import os, signal, sys, time, pathlib
here = pathlib.Path(os.environ["MLOPS_RUN_DIR"])
def save(*_):
    time.sleep(1.0)
    (here / "saved").write_text("x")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(here / "pid").write_text(str(os.getpid()))
time.sleep(300)
'; true"""


def test_a_stop_lets_the_command_save_and_a_second_one_does_not_cut_it_off(tmp_path):
    (tmp_path / "r1").mkdir()
    spec = spec_of(tmp_path, SAVES)
    process = driver(tmp_path, spec)
    wait_for(lambda: (tmp_path / "r1/pid").exists())
    process.send_signal(signal.SIGTERM)
    time.sleep(0.4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert (tmp_path / "r1/saved").exists()
    result = read_result(spec)
    assert result is not None and (result.status, result.exit_class) == ("FAILED", "stopped")


def test_a_command_that_does_not_stop_is_killed_in_time_for_the_result(tmp_path):
    (tmp_path / "r1").mkdir()
    deaf = f"trap '' TERM; echo $$ > {tmp_path}/r1/pid; sleep 300 & wait; sleep 300"
    spec = spec_of(tmp_path, deaf, stop_timeout=4.0)
    process = driver(tmp_path, spec)
    wait_for(lambda: (tmp_path / "r1/pid").exists())
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143 and time.monotonic() - began < 4.0
    assert read_result(spec).exit_class == "stopped"


def test_the_command_does_not_outlive_a_killed_driver(tmp_path):
    (tmp_path / "r1").mkdir()
    process = driver(tmp_path, spec_of(tmp_path, SAVES))
    wait_for(lambda: (tmp_path / "r1/pid").exists() and (tmp_path / "r1/pid").read_text())
    pid = int((tmp_path / "r1/pid").read_text())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 10)


@pytest.mark.parametrize(("command", "code", "blame"), [("exit 3", 1, "app"), ("exit 75", 70, "infra")])
def test_exit_code_and_result_of_the_driver(tmp_path, command, code, blame):
    spec = spec_of(tmp_path, command, use_gpu=True)
    assert driver(tmp_path, spec).wait(30) == code
    result = read_result(spec)
    assert result.exit_class == blame and result.error


def test_a_finished_command_is_not_run_again(tmp_path):
    spec = spec_of(tmp_path, f"echo x >> {tmp_path}/ran")
    assert driver(tmp_path, spec).wait(30) == 0
    assert driver(tmp_path, spec.with_attempt(2)).wait(30) == 0
    assert (tmp_path / "ran").read_text() == "x\n" and read_result(spec).attempt == 2


def test_ray_of_another_version_is_refused(tmp_path):
    import ray

    spec = spec_of(tmp_path, f"touch {tmp_path}/ran", ray_version="1.0.0")
    assert driver(tmp_path, spec).wait(30) == 1
    assert f"has Ray {ray.__version__}, and ray_version is 1.0.0" in read_result(spec).error
    assert not (tmp_path / "ran").exists()
    assert driver(tmp_path, spec_of(tmp_path, "true", ray_version=ray.__version__)).wait(30) == 0


def test_gpu_time_of_a_command_is_that_of_its_workers(tmp_path):
    spec = spec_of(tmp_path, "sleep 1", num_workers=3, resources_per_worker={"GPU": 2})
    assert driver(tmp_path, spec).wait(30) == 0
    assert 6.0 <= json.loads((tmp_path / "r1/_mlops/result.json").read_text())["gpu_seconds"] < 12.0
