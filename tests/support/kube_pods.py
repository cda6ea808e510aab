"""Nodes for the stand-in API server: pods are scheduled, pull images, run, and stop when they are deleted."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from support.kube_api import KubeApi
from support.kube_objects import ApiError, timestamp
from support.kube_store import Object

TRACE: dict[str, Any] = json.loads((Path(__file__).parent / "rayjob_trace.json").read_text())
#: Pods that hold resources or may run something.
LIVE_PHASES = ("Pending", "Running")


def recorded(kind: str, *state: Any, since: tuple[Any, ...] = (), run: str = "succeeds") -> float:
    """Seconds in the recorded trace until ``kind`` reached a state, counted from another (kind, state...) if given."""

    def at(kind: str, state: tuple[Any, ...]) -> float:
        return next(row[0] for row in TRACE[run][kind] if tuple(row[1 : 1 + len(state)]) == state)

    return max(0.0, at(kind, state) - (at(since[0], since[1:]) if since else 0.0))


class Stop(threading.Event):
    """Set when a container has to end.

    :ivar killed: it ends at once (SIGKILL): nothing may be saved any more
    :ivar log: writes a line of output
    """

    killed = False
    log: Callable[[str], None] = staticmethod(lambda line: None)


class Driver:
    """What a RayJob's entrypoint runs: a thread with a Python callable, as long as its head pod lives.

    :param run: called with the RayJob and a :class:`Stop`, returns the exit code
    :param rayjob: the RayJob
    :param done: called in the thread when it has ended
    """

    def __init__(self, run: Callable[[Object, Stop], int], rayjob: Object, done: Callable[[], None]) -> None:
        self.stop, self.error = Stop(), ""
        self.status = "PENDING"
        self._run, self._rayjob, self._done = run, rayjob, done
        self.exit_code: int | None = None
        self.thread = threading.Thread(target=self._work, name=f"driver-{rayjob['metadata']['name']}", daemon=True)

    def start(self) -> None:
        """Run the entrypoint."""
        self.status = "RUNNING"
        self.thread.start()

    def _work(self) -> None:
        try:
            code = int(self._run(self._rayjob, self.stop) or 0)
        except Exception as error:
            code, self.error = 1, f"{type(error).__name__}: {error}"
        self.exit_code = code
        # A killed process reports nothing.
        if not self.stop.killed:
            self.status = "STOPPED" if self.stop.is_set() else "SUCCEEDED" if code == 0 else "FAILED"
        self._done()

    def kill(self, wait: float = 2.0) -> None:
        """End it at once."""
        self.stop.killed = True
        self.stop.set()
        if self.thread.is_alive() and self.thread is not threading.current_thread():
            self.thread.join(wait)

    @property
    def running(self) -> bool:
        """Whether its code runs at this moment."""
        return self.thread.is_alive()


@dataclasses.dataclass
class Trouble:
    """Why pods do not start.

    :param kind: ``image`` or ``unschedulable``
    :param job: part of the RayJob's name, empty for all
    :param role: head, worker or submitter; empty for all
    :param message: what the event says
    """

    kind: str
    job: str
    role: str
    message: str


class Kubelet:
    """Runs the pods of a stand-in API server; used inside the simulator's event loop.

    :param api: the server
    :param scale: real seconds per recorded second
    """

    def __init__(self, api: KubeApi, scale: float) -> None:
        self.api, self.scale = api, scale
        self.linger = 0.0
        self.troubles: list[Trouble] = []
        self.drivers: dict[str, Driver] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._dying: dict[str, asyncio.Task[None]] = {}
        self._pods = api.store.named("pods")

    async def sleep(self, seconds: float) -> None:
        """Wait for recorded seconds."""
        await asyncio.sleep(max(0.0, seconds) * self.scale)

    async def pause(self) -> None:
        """Wait a little before looking again, without spinning at small scales."""
        await asyncio.sleep(min(0.05, max(0.002, 0.1 * self.scale)))

    def observe(self, pod: Object, gone: bool) -> None:
        """Act on a pod that was created, changed or removed."""
        uid = pod["metadata"]["uid"]
        if gone:
            for tasks in (self._tasks, self._dying):
                if task := tasks.pop(uid, None):
                    task.cancel()
            if driver := self.drivers.pop(uid, None):
                driver.kill(0)
        elif pod["metadata"].get("deletionTimestamp"):
            if uid not in self._dying and pod["spec"].get("nodeName"):
                if task := self._tasks.pop(uid, None):
                    task.cancel()
                self._dying[uid] = asyncio.create_task(self._terminate(pod))
        elif uid not in self._tasks and _role(pod):
            self._tasks[uid] = asyncio.create_task(self._start(pod))

    async def _start(self, pod: Object) -> None:
        role, name = _role(pod), pod["metadata"]["name"]
        while trouble := self._trouble(pod, "unschedulable"):
            self._status(pod, "Pending", False, scheduled=trouble.message)
            self._event(pod, "FailedScheduling", trouble.message, "Warning")
            await self.sleep(5)
            while self._trouble(pod, "unschedulable"):
                await self.pause()
        self._bind(pod)
        self._event(pod, "Scheduled", f"Successfully assigned {pod['metadata']['namespace']}/{name} to node-1")
        first = True
        while trouble := self._trouble(pod, "image"):
            reason = "ErrImagePull" if first else "ImagePullBackOff"
            self._status(pod, "Pending", False, waiting=(reason, trouble.message))
            self._event(pod, "Failed" if first else "BackOff", trouble.message, "Warning")
            first = False
            await self.sleep(10)
            await self.pause()
        self._status(pod, "Pending", False, waiting=("ContainerCreating", ""))
        created = recorded(role, "Pending")
        await self.sleep(recorded(role, "Running") - created)
        if role == "submitter":
            self._status(pod, "Running", True)
            return
        self._status(pod, "Running", False)
        await self.sleep(recorded(role, "Running", True) - recorded(role, "Running"))
        self._status(pod, "Running", True)

    def _trouble(self, pod: Object, kind: str) -> Trouble | None:
        labels = pod["metadata"].get("labels") or {}
        owner = labels.get("ray.io/originated-from-cr-name") or pod["metadata"]["name"]
        for trouble in self.troubles:
            if trouble.kind == kind and trouble.job in owner and trouble.role in ("", _role(pod)):
                return trouble
        return None

    async def _terminate(self, pod: Object) -> None:
        role, uid = _role(pod) or "worker", pod["metadata"]["uid"]
        if driver := self.drivers.get(uid):
            driver.stop.set()
            await self._wait(driver, pod["metadata"].get("deletionGracePeriodSeconds") or 0)
        role = "worker" if role == "submitter" else role
        deleting = (role, "Running", True, True)
        await self.sleep(recorded(role, "Failed", since=deleting) + self.linger)
        self._status(pod, "Failed", False, terminated=1)
        await self.sleep(recorded(role, "deleted", since=(role, "Failed")))
        self.drop(pod)

    async def _wait(self, driver: Driver, grace: float) -> None:
        deadline = asyncio.get_running_loop().time() + max(grace * self.scale, 0.05)
        while driver.running and asyncio.get_running_loop().time() < deadline:
            await self.pause()
        if driver.running:
            await asyncio.to_thread(driver.kill)

    def finish(self, pod: Object, phase: str) -> None:
        """The pod's container has ended by itself."""
        self._status(pod, phase, False, terminated=0 if phase == "Succeeded" else 1)

    def drop(self, pod: Object) -> None:
        """The pod is gone."""
        current = self.find(pod)
        if current is not None:
            self.api.store.remove(self._pods, current["metadata"]["namespace"], current["metadata"]["name"])

    def find(self, pod: Object) -> Object | None:
        """The pod as it is now, None if it is gone."""
        meta = pod["metadata"]
        found = self.api.store.find(self._pods, meta["namespace"], meta["name"])
        return found if found and found["metadata"]["uid"] == meta["uid"] else None

    def ready(self, pod: Object) -> bool:
        """Whether the pod runs and is ready."""
        found = self.find(pod)
        states = (found or {}).get("status", {}).get("containerStatuses", [{}])
        return bool(found and all(state.get("ready") for state in states))

    def _bind(self, pod: Object) -> None:
        if current := self.find(pod):
            self._put(pod, {"spec": {**current["spec"], "nodeName": "node-1"}})

    def _status(
        self,
        pod: Object,
        phase: str,
        ready: bool,
        *,
        waiting: tuple[str, str] | None = None,
        terminated: int | None = None,
        scheduled: str = "",
    ) -> None:
        now = timestamp(self.api.store.now())
        if scheduled:
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": scheduled}
            self._put(pod, {"status": {"phase": phase, "conditions": [{**condition, "lastTransitionTime": now}]}})
            return
        state: dict[str, Any] = {"running": {"startedAt": now}}
        if waiting:
            state = {"waiting": {"reason": waiting[0], **({"message": waiting[1]} if waiting[1] else {})}}
        elif terminated is not None:
            reason = "Error" if terminated else "Completed"
            state = {"terminated": {"exitCode": terminated, "reason": reason, "finishedAt": now}}
        base = {"state": state, "lastState": {}, "ready": ready, "restartCount": 0, "imageID": ""}
        states = [{"name": c["name"], "image": c.get("image", ""), **base} for c in pod["spec"]["containers"]]
        conditions = [
            {"type": kind, "status": str(value), "lastTransitionTime": now}
            for kind, value in (("PodScheduled", True), ("Ready", ready), ("ContainersReady", ready))
        ]
        self._put(pod, {"status": {"phase": phase, "conditions": conditions, "containerStatuses": states}})

    def _put(self, pod: Object, change: Mapping[str, Any]) -> None:
        if current := self.find(pod):
            meta = current["metadata"]
            try:
                self.api.store.put(self._pods, meta["namespace"], meta["name"], change)
            except ApiError:
                return

    def _event(self, pod: Object, reason: str, message: str, kind: str = "Normal") -> None:
        meta = pod["metadata"]
        self.api.add_event("Pod", meta["name"], reason, message, namespace=meta["namespace"], type=kind)

    async def close(self) -> None:
        """Stop everything that runs."""
        tasks = [*self._tasks.values(), *self._dying.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for driver in list(self.drivers.values()):
            driver.kill(0)


def _role(pod: Object) -> str:
    labels = pod["metadata"].get("labels") or {}
    return labels.get("ray.io/node-type") or ("submitter" if "job-name" in labels else "")
