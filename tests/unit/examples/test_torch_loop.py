"""The PyTorch loop in this process: what it saves when its machine is about to go, and how it goes on from there."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import ray.train  # noqa: E402
import ray.train.torch  # noqa: E402

from airflow_mlops.examples.torch_loop import train_loop_per_worker  # noqa: E402

# 4 parts per epoch, 12 steps in all; asked after steps 1, 3, 5, ...
CONFIG = {"rows": 64, "batch": 16, "epochs": 3, "ask_every": 2, "checkpoint_every": 3, "hidden": 8}


class Worker:
    """The one worker of a run, as Ray Train presents itself to it."""

    def __init__(self, folder, monkeypatch, world: int = 1) -> None:
        self.folder, self.world = folder, world
        self.reports: list[dict] = []
        self.asked, self.preempted_at = 0, -1
        self.checkpoint: ray.train.Checkpoint | None = None
        context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: self.world)
        monkeypatch.setattr(ray.train, "get_context", lambda: context)
        monkeypatch.setattr(ray.train, "get_checkpoint", lambda: self.checkpoint)
        monkeypatch.setattr(ray.train, "report", self.report)
        monkeypatch.setattr(ray.train, "get_preemption_info", self.preemption)
        monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model: model)

    def report(self, metrics: dict, checkpoint: ray.train.Checkpoint) -> None:
        kept = self.folder / f"checkpoint-{len(self.reports)}"
        shutil.copytree(checkpoint.path, kept)
        self.reports.append({**metrics, "path": str(kept)})

    def preemption(self) -> object | None:
        self.asked += 1
        return SimpleNamespace(deadline_ms=1) if 0 <= self.preempted_at <= self.asked - 1 else None

    def run(self, **changes) -> list[dict]:
        self.reports, self.asked = [], 0
        train_loop_per_worker(CONFIG | changes)
        return self.reports


@pytest.fixture
def worker(tmp_path, monkeypatch) -> Worker:
    return Worker(tmp_path, monkeypatch)


def test_undisturbed_it_saves_as_often_as_it_is_told(worker):
    assert [(report["step"], report["just_in_time"]) for report in worker.run()] == [(11, False)]
    worker.folder = worker.folder / "more"
    assert [report["epoch"] for report in worker.run(checkpoint_every=1)] == [0, 1, 2]


def test_before_its_machine_goes_it_saves_once_more_and_nothing_is_lost(worker):
    undisturbed = worker.run()[-1]["loss"]
    worker.folder, worker.preempted_at = worker.folder / "preempted", 2
    reports = worker.run()
    assert [(report["step"], report["just_in_time"]) for report in reports] == [(5, True), (11, False)]

    worker.checkpoint = ray.train.Checkpoint(reports[0]["path"])
    worker.folder, worker.preempted_at = worker.folder / "resumed", -1
    resumed = worker.run()
    assert worker.asked == 3, "after steps 7, 9 and 11: steps 6 to 11 are trained"
    assert resumed[-1]["step"] == 11 and resumed[-1]["loss"] == pytest.approx(undisturbed, abs=1e-7)


@pytest.mark.parametrize(("asked", "saved"), [(2, 5), (1, 3)])
def test_another_number_of_workers_begins_the_epoch_again(worker, asked, saved):
    """Their shares of the rows are others; an epoch that was complete is not repeated."""
    worker.preempted_at = asked
    first = worker.run()[0]
    assert first["step"] == saved
    worker.checkpoint = ray.train.Checkpoint(first["path"])
    worker.folder, worker.preempted_at, worker.world = worker.folder / "resumed", -1, 2
    assert worker.run()[-1]["step"] == 11
    assert worker.asked == 4, "after steps 5, 7, 9 and 11: both go on at step 4"
