"""What the driver decides without Ray; Ray itself is in tests/integration/test_ray_train.py."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from airflow_mlops import storage
from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError, TrainingError
from airflow_mlops.training import driver, usage
from airflow_mlops.training.command import CommandLost
from airflow_mlops.training.raytrain import Clusterless, is_infrastructure, require_capacity, trainer_class
from airflow_mlops.training.spec import TrainingSpec


def spec(**changes) -> TrainingSpec:
    return TrainingSpec(
        **{"train_fn": "pkg.mod:loop", "trainer": "torch", "storage_path": "/runs", "run_key": "r1", **changes}
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_workers": 5}, "5 workers with 1 CPU each need 5, and this machine has 2; lower num_workers"),
        ({"num_workers": 2, "resources_per_worker": {"CPU": 1.5}}, "2 workers with 1.5 CPU each need 3"),
        ({"num_workers": (3, 9)}, "3 workers with 1 CPU each need 3"),
        ({"use_gpu": True}, "1 workers with 1 GPU each need 1, and this machine has 0"),
        ({"resources_per_worker": {"TPU": 4}}, "with 4 TPU each need 4"),
    ],
)
def test_workers_that_do_not_fit_are_not_waited_for(changes, words):
    with pytest.raises(InvalidInputError, match=words):
        require_capacity(spec(**changes), {"CPU": 2.0, "memory": 1e9})


@pytest.mark.parametrize(
    "changes", [{"num_workers": 2}, {"num_workers": (2, 9)}, {"num_workers": 4, "resources_per_worker": {"CPU": 0.5}}]
)
def test_workers_that_just_fit(changes):
    require_capacity(spec(**changes), {"CPU": 2.0})


def test_gpus_are_counted_while_they_are_held_and_by_the_workers_there_are(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(usage.time, "monotonic", lambda: now[0])
    meter = usage.Meter(gpus=2.0, world_file=str(tmp_path / "world.json"))
    now[0] += 10
    assert meter.read_all().gpu_seconds == 0
    meter.hold(4)
    now[0] += 10
    assert meter.read_all().gpu_seconds == 80
    storage.write_json(str(tmp_path / "world.json"), 1)
    meter.read_all()
    now[0] += 10
    assert meter.read_all().gpu_seconds == 100
    meter.hold(0)
    now[0] += 10
    meter.read_all()
    now[0] += 10
    seen = meter.read_all()
    assert (seen.gpu_seconds, seen.wall_seconds) == (100, 50), "a released worker is not counted again"


@pytest.mark.parametrize(
    ("error", "infra"),
    [
        (Clusterless("away"), True),
        (CommandLost("killed"), True),
        (ExternalSystemError("disk is full"), True),
        (SystemExit(1), True),
        (InvalidInputError("no checkpoint"), False),
        (TrainingError("exit code 3"), False),
        (ValueError("label"), False),
    ],
)
def test_whose_fault_an_error_is(error, infra):
    assert is_infrastructure(error) is infra


@pytest.fixture
def joined(monkeypatch):
    """Ray's own calls without a cluster; says whether one is joined, and takes SIGTERM over as ``ray.init`` does."""
    import ray

    state = {"joined": False}

    def init(**_):
        state["joined"] = True
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: state.update(joined=False))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}])
    before = signal.getsignal(signal.SIGTERM)
    yield state
    signal.signal(signal.SIGTERM, before)


def test_a_stop_while_the_cluster_is_put_down_is_a_stop(tmp_path, joined, monkeypatch):
    def stopped():
        os.kill(os.getpid(), signal.SIGTERM)
        return [{"Alive": True}]

    monkeypatch.setattr("ray.nodes", stopped)
    with pytest.raises(KeyboardInterrupt), driver._ray(spec(storage_path=str(tmp_path)), usage.Meter(), {}):
        pass
    assert joined == {"joined": False}


def test_ray_is_left_where_the_cluster_cannot_be_put_down(tmp_path, joined):
    (tmp_path / "runs").write_text("no folder")
    lost = spec(storage_path=str(tmp_path / "runs"))
    with pytest.raises(ExternalSystemError, match="cannot write"), driver._ray(lost, usage.Meter(), {}):
        pass
    assert joined == {"joined": False}


def test_library_of_a_trainer_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.train.torch", None)
    with pytest.raises(InvalidInputError, match=r"not installed where the driver runs.*airflow-mlops\[torch\]"):
        trainer_class("torch")
