"""Whatever happens between Airflow and Kubernetes: one attempt at a time, the result of a quiet run, nothing left.

Random schedules of killed workers, restarted triggerers, cleared tasks, lost answers, refusals, deleted RayJobs and
lost heads, each with a seed of its own. A failure names its seeds: ``SCHEDULES=17,203`` runs only those, and
``SCHEDULES=0-5000`` more than usual.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException
from airflow.triggers.base import TaskSuccessEvent
from support.kube_api import Fault, KubeApi
from support.kube_chaos import Kill, Triggerer, Waiting, Worker, killable
from support.kube_sim import RayJobSimulator
from support.kube_training import STEPS, Task, operator, steps, train

from airflow_mlops import storage
from airflow_mlops.training.manifest import run_label
from airflow_mlops.training.spec import TrainingSpec

COUNT, AT_ONCE = 500, 40
KINDS = ("POST", "worker", "triggerer", "clear", "delete", "head", "409", "410", "429", "5xx", "cut")
LEFT = ("RayJob", "RayCluster", "Pod", "Job")


@dataclass
class Act:
    """Something that is done to the run, once a request was made or a step was committed."""

    kind: str
    request: int = 0
    step: int = -1
    delay: float = 0.0


@dataclass
class Schedule:
    """What happens to one run."""

    seed: int
    deferrable: bool
    acts: list[Act] = field(default_factory=list)
    kills: list[Kill | None] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def drawn(cls, seed: int) -> Schedule:
        draw = random.Random(seed)
        found = cls(seed, draw.random() < 0.7)
        for kind in draw.choices(KINDS, k=draw.randint(1, 5)):
            nth = draw.randint(1, 12)
            match kind:
                case "worker" if draw.random() < 0.7:
                    method = draw.choice(["", "", "POST", "POST", "DELETE", "PATCH"])
                    number = draw.randint(1, 12) if not method else draw.choice([1, 1, 1, 2])
                    found.kills.append(Kill(method, number, draw.random() < 0.5))
                case "worker" | "triggerer" | "clear" | "delete" | "head":
                    at = {"request": draw.randint(1, 25)} if draw.random() < 0.5 else {"step": draw.randint(0, STEPS)}
                    found.acts.append(Act(kind, **at, delay=draw.choice([0.0, 0.0, draw.uniform(0, 0.1)])))
                case "POST":
                    lost = draw.choice([{"drop": True}, {"status": 500}, {"status": 504}])
                    found.faults.append({"method": "POST", "nth": draw.choice([1, 1, 2]), "when": "after", **lost})
                case "409":
                    method = draw.choice(["POST", "PATCH", "DELETE"])
                    found.faults.append({"method": method, "nth": draw.choice([1, 1, 2]), "status": 409})
                case "410":
                    found.faults.append({"watch": True, "nth": draw.choice([1, 1, 2]), "status": 410})
                case "429":
                    found.faults.append({"nth": nth, "status": 429, "times": draw.choice([1, 1, 2])})
                case "5xx":
                    when = draw.choice(["before", "after"])
                    found.faults.append({"nth": nth, "status": draw.choice([500, 502, 503]), "when": when})
                case "cut":
                    found.faults.append({"nth": nth, "drop": True, "when": draw.choice(["before", "after"])})
        draw.shuffle(found.kills)
        return found


def fault(namespace: str, method: str = "", nth: int = 1, **values: Any) -> Fault:
    """A fault for the nth request of a method in a namespace."""
    left = [nth]

    def match(used: str, path: str) -> bool:
        if f"/namespaces/{namespace}/" not in path or method not in ("", used):
            return False
        left[0] -= 1
        return left[0] < 1

    return Fault(match, **values)


class World:
    """What all schedules share."""

    def __init__(self, api: KubeApi, kuberay: RayJobSimulator, triggerer: Triggerer, folder: Path) -> None:
        self.api, self.kuberay, self.triggerer, self.folder = api, kuberay, triggerer, folder
        self.namespaces: SimpleQueue[str] = SimpleQueue()
        self.runs: dict[str, Run] = {}
        for number in range(AT_ONCE):
            api.create_namespace(f"ns{number}")
            self.namespaces.put(f"ns{number}")

    def note(self, namespace: str | None) -> None:
        if run := self.runs.get(namespace or ""):
            run.requests += 1
            run.wake.set()

    def play(self, seed: int) -> Counter[str]:
        """Play a schedule; what was done in it.

        :raises AssertionError: something that must hold does not
        """
        namespace = self.namespaces.get()
        run = self.runs[namespace] = Run(self, namespace, Schedule.drawn(seed))
        faults = [fault(namespace, **values) for values in run.schedule.faults]
        self.api.faults.extend(faults)
        try:
            run.play()
            run.check()
            return run.done
        except BaseException as error:
            if run.worker is not None:
                run.worker.die()
            at = traceback.extract_tb(error.__traceback__)[-1]
            rayjobs = [(item["metadata"], item.get("status")) for item in self.api.list("RayJob", namespace)]
            told = [
                str(run.schedule),
                *run.story,
                f"{rayjobs}, {run.requests} requests",
                f"{type(error).__name__} at {at.name}:{at.lineno}: {error}",
            ]
            raise AssertionError("\n".join(told)) from error
        finally:
            for added in faults:
                if added in self.api.faults:
                    self.api.faults.remove(added)
            for rayjob in self.api.list("RayJob", namespace):
                self.api.delete_now("RayJob", namespace, rayjob["metadata"]["name"])
            self.namespaces.put(namespace)


class Run:
    """One task instance under one schedule."""

    def __init__(self, world: World, namespace: str, schedule: Schedule) -> None:
        self.world, self.namespace, self.schedule = world, namespace, schedule
        self.wake, self.requests, self.done = threading.Event(), 0, Counter[str]()
        self.folder = world.folder / namespace / f"s{schedule.seed}"
        self.try_number, self.stopped_by_hand = 0, False
        self.worker: Worker | None = None
        self.waiting: Waiting | None = None
        self.clearing: list[Future[None]] = []
        self.result: dict[str, Any] | None = None
        self.story: list[str] = []

    def say(self, what: str) -> None:
        self.story.append(f"request {self.requests}, step {self.step}, try {self.try_number}: {what}")

    @property
    def step(self) -> int:
        try:
            return steps(self.folder / "r1")
        except ValueError:
            return 0

    def play(self) -> None:
        self._next_try()
        deadline = time.monotonic() + 240
        while self.result is None:
            assert time.monotonic() < deadline, "the run does not end"
            self.wake.wait(0.02)
            self.wake.clear()
            for act in list(self.schedule.acts):
                if self._due(act) and getattr(self, f"_{act.kind}")(act):
                    self.say(act.kind)
                    self.done[act.kind] += 1
                    self.schedule.acts.remove(act)
            self._go_on()

    def check(self) -> None:
        """What must hold of every run, however it went."""
        for future in self.clearing:
            future.result(30)
        assert self.result is not None
        same = {key: self.result[key] for key in ("status", "metrics", "model_uri")}
        assert same == {"status": "SUCCEEDED", "metrics": {"steps": STEPS}, "model_uri": "m"}
        assert self.step == STEPS
        spec = TrainingSpec.from_json(storage.read_json(str(self.folder / "r1" / "_mlops" / "spec-a1.json")))
        label, kuberay = run_label(spec), self.world.kuberay
        assert kuberay.max_overlap.get(label, 0) <= 1, f"{kuberay.max_overlap[label]} attempts had pods at one time"
        assert kuberay.max_running.get(label, 0) <= 1, f"{kuberay.max_running[label]} attempts ran at one time"
        deadline = time.monotonic() + 60
        while left := self._left():
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.02)

    def _left(self) -> list[str]:
        found = [(kind, item) for kind in LEFT for item in self.world.api.list(kind, self.namespace)]
        return [f"{kind} {item['metadata']['name']}" for kind, item in found]

    # Airflow

    def _next_try(self) -> None:
        self.try_number += 1
        self._work(lambda op, context: op.execute(context))

    def _work(self, what: Any) -> None:
        op = operator(
            self.folder,
            deferrable=self.schedule.deferrable,
            max_restarts=20,
            poll_interval=0.5,
            unreachable_timeout=60.0,
            cluster={"namespace": self.namespace},
        )
        kill = self.schedule.kills.pop() if self.schedule.kills else None
        self.waiting, self.op = None, op
        self.worker = Worker(partial(what, op, {"ti": Task(self.try_number)}), kill, self.wake.set)

    def _go_on(self) -> None:
        if self.waiting is not None and (event := self.waiting.event) is not None:
            self.say(f"{type(event).__name__} {str(getattr(event, 'payload', ''))[:300]}")
            if isinstance(event, TaskSuccessEvent):
                self.result = event.xcoms["return_value"]
                return
            payload, method = json.loads(json.dumps(event.payload)), self.waiting.deferred.method_name
            self._work(lambda op, context: getattr(op, method)(context, payload))
        elif self.worker is not None and not self.worker.running:
            worker, self.worker = self.worker, None
            if worker.was_killed:
                self.say("the worker is dead")
                self.done["worker"] += 1
                self._next_try()
            elif worker.deferred is not None:
                self.say("deferred")
                self.waiting = self.world.triggerer.start(worker.deferred, self.wake.set)
            elif isinstance(worker.outcome, AirflowFailException) and "was stopped" in str(worker.outcome):
                # Whoever deleted the RayJob clears the task.
                assert self.stopped_by_hand, worker.outcome
                self.say("failed, and cleared by its user")
                self._next_try()
            elif isinstance(worker.outcome, BaseException):
                raise worker.outcome
            else:
                self.result = worker.outcome

    # Acts; each returns whether it could be done now

    def _due(self, act: Act) -> bool:
        return self.requests >= act.request and self.step >= act.step

    def _worker(self, act: Act) -> bool:
        if self.worker is None or not self.worker.running:
            return False
        self.worker.die()
        return self.worker.was_killed

    def _triggerer(self, act: Act) -> bool:
        if self.waiting is None or self.waiting.event is not None:
            return False
        self.waiting.end()
        time.sleep(act.delay)
        self.waiting = self.world.triggerer.start(self.waiting.deferred, self.wake.set)
        return True

    def _clear(self, act: Act) -> bool:
        if self.waiting is not None and self.waiting.event is None:
            self.clearing.append(self.waiting.clear(act.delay))
        elif self.worker is not None and self.worker.running:
            self.worker.call(self.op.on_kill)
            self.worker.die()
        else:
            return False
        self._next_try()
        return True

    def _delete(self, act: Act) -> bool:
        for rayjob in self.world.api.list("RayJob", self.namespace):
            if not rayjob["metadata"].get("deletionTimestamp"):
                self.stopped_by_hand = True
                self.world.api.delete("RayJob", self.namespace, rayjob["metadata"]["name"])
                return True
        return False

    def _head(self, act: Act) -> bool:
        for rayjob in self.world.api.list("RayJob", self.namespace):
            name = rayjob["metadata"]["name"]
            if (rayjob.get("status") or {}).get("jobDeploymentStatus") == "Running":
                reason = ("AppFailed", "JobStatusCheckTimeoutExceeded")[self.schedule.seed % 2]
                self.world.kuberay.kill_head(name, namespace=self.namespace, reason=reason)
                return True
        return False


def chosen() -> list[int]:
    wanted = os.environ.get("SCHEDULES")
    if not wanted:
        return list(range(COUNT))
    if "-" in wanted:
        first, _, last = wanted.partition("-")
        return list(range(int(first), int(last)))
    return [int(seed) for seed in wanted.split(",")]


@pytest.fixture
def world(kube_api, kubeconfig, tmp_path, monkeypatch) -> Iterator[World]:
    connection = {"conn_type": "kuberay", "extra": {"kube_config_path": str(kubeconfig)}}
    monkeypatch.setenv("AIRFLOW_CONN_KUBERAY", json.dumps(connection))
    monkeypatch.setattr("airflow_mlops.hooks.kuberay._LOOK", 0.02)
    monkeypatch.setattr("airflow_mlops.operators._kuberay.MARGIN", 1e7)
    script = partial(train, pause=0.002)
    with RayJobSimulator(kube_api, scale=0.002, script=script) as kuberay, Triggerer() as triggerer:
        kuberay.pods_linger(30)
        shared = World(kube_api, kuberay, triggerer, tmp_path)
        with killable(monkeypatch, shared.note):
            yield shared


def test_no_schedule_doubles_loses_or_leaves_anything(world):
    def failure(seed: int) -> tuple[int, str | None]:
        try:
            done.update(world.play(seed))
            return seed, None
        except AssertionError as error:
            return seed, str(error)

    seeds, done = chosen(), Counter[str]()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        failed = {seed: error for seed, error in threads.map(failure, seeds) if error}
    print(dict(done))
    assert not failed, f"SCHEDULES={','.join(map(str, failed))}\n" + "\n\n".join(list(failed.values())[:5])
    if len(seeds) >= COUNT:
        assert all(done[kind] >= COUNT / 50 for kind in ("worker", "triggerer", "clear", "delete", "head")), done
