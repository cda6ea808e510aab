"""Following a RayJob: in the triggerer, or in a worker that waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TaskSuccessEvent, TriggerEvent

from airflow_mlops.exceptions import ExternalSystemError, MlopsError
from airflow_mlops.training.decide import FINAL, Observation
from airflow_mlops.training.fence import signs_of_life
from airflow_mlops.training.limits import Breach
from airflow_mlops.training.manifest import MANAGED_BY, MANAGED_BY_LABEL, Owner
from airflow_mlops.training.parts import Gang
from airflow_mlops.training.rayjob import INCOMPLETE, RayJobView, observe
from airflow_mlops.training.spec import TrainingSpec, submission_id_of
from airflow_mlops.triggers._training import Training, insist, log_shown
from airflow_mlops.triggers._watch import Row, SharedWatch, watch

if TYPE_CHECKING:
    from airflow_mlops.hooks.kuberay import RayJobHook

LOG_TAIL = 200
#: Seconds after which the promised scheduler must have acted, and between two looks at a queue.
PREFLIGHT, QUEUE_LOOK = 60.0, 60.0
#: Seconds that a stopped attempt's pods have to go.
PODS_GO = 180.0


class RayJobResourceTrigger(BaseTrigger):
    """Fires once: when the RayJob of an attempt is over, lost, has broken a limit, or the API server is silent.

    A success that needs no worker ends the task here, with ``TaskSuccessEvent``. All else is for the operator, in the
    events of :class:`airflow_mlops.triggers.ray.RayJobTrigger`. All triggers of a triggerer that wait in one namespace
    share one list and one watch.

    :param connection: arguments of :class:`airflow_mlops.hooks.kubernetes.CustomResourceHook`: ``conn_id``,
        ``namespace``, ``in_cluster``, ``cluster_context``, ``config_file``
    :param owner: fields of :class:`airflow_mlops.training.manifest.Owner`: the task, and the try of it that follows
    :param poll_interval: seconds after which it looks by itself where nothing is told, for limits and queues
    :param unreachable_timeout: seconds that the API server may be away
    :param cancel_on_kill: delete the RayJob when a user clears the task or sets its state
    :param state: handed back with the event; ``spec`` and ``adopted`` in it are read here
    :param gang: fields of :class:`airflow_mlops.training.parts.Gang`, None without
    :param deadline: Unix time until which to wait, None for ever
    :param logs: ``"off"``, ``"tail"`` or ``"live"``, of the driver's log as its submitter has it
    :param limits: :meth:`airflow_mlops.training.limits.Limits.to_json`
    :param times: :meth:`airflow_mlops.training.limits.Times.to_json`, needed with ``limits``
    :param finish_in_triggerer: end the task here if the training has succeeded
    :param multiple_outputs: push each key of the result as an XCom of its own, too
    """

    def __init__(
        self,
        *,
        connection: dict[str, Any],
        owner: dict[str, Any],
        poll_interval: float,
        unreachable_timeout: float,
        cancel_on_kill: bool,
        state: dict[str, Any],
        gang: dict[str, Any] | None = None,
        deadline: float | None = None,
        logs: str = "tail",
        limits: dict[str, Any] | None = None,
        times: dict[str, Any] | None = None,
        finish_in_triggerer: bool = False,
        multiple_outputs: bool = True,
    ) -> None:
        super().__init__()
        self.connection, self.owner = connection, owner
        self.poll_interval, self.unreachable_timeout = poll_interval, unreachable_timeout
        self.cancel_on_kill, self.state, self.gang, self.deadline = cancel_on_kill, state, gang, deadline
        self.logs, self.limits, self.times = logs, limits, times
        self.finish_in_triggerer, self.multiple_outputs = finish_in_triggerer, multiple_outputs
        self._new_hook: Callable[[], RayJobHook] | None = None
        self._on_line: Callable[[str], None] = lambda line: self.log.info("%s", line)

    def use(self, new_hook: Callable[[], RayJobHook], on_line: Callable[[str], None]) -> None:
        """Follow from a worker, with hooks that know their connection, and pass the driver's log on to ``on_line``."""
        self._new_hook, self._on_line = new_hook, on_line

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Class path and constructor arguments."""
        names = (
            "connection",
            "owner",
            "poll_interval",
            "unreachable_timeout",
            "cancel_on_kill",
            "state",
            "gang",
            "deadline",
            "logs",
            "limits",
            "times",
            "finish_in_triggerer",
            "multiple_outputs",
        )
        return "airflow_mlops.triggers.kuberay.RayJobResourceTrigger", {name: getattr(self, name) for name in names}

    def show_end(self, text: str) -> None:
        """Pass the end of the driver's log on, if that is how it is to be shown."""
        if self.logs == "tail":
            for line in text.splitlines():
                self._on_line(line)

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Follow the RayJob until there is something to tell, the log's last lines first."""
        yield await self.ended()

    async def ended(self) -> TriggerEvent:
        """The event of the attempt's end."""
        try:
            training = Training(
                self.state,
                limits=self.limits,
                times=self.times,
                finish_in_triggerer=self.finish_in_triggerer,
                multiple_outputs=self.multiple_outputs,
                task=self.task_instance,
            )
            async with await self._hook() as hook:
                async with self._shared() as shared, self._log_shown(hook, training):
                    event = await _Following(self, training, hook, shared).event()
                if isinstance(event, TaskSuccessEvent) and training.spec is not None:
                    await self._discard(hook, training.spec)
                return event
        except MlopsError as error:
            return TriggerEvent({"error": str(error), "state": self.state})

    async def on_kill(self) -> None:
        """Delete the RayJob, unless a later try has taken it over: a user has cleared the task or set its state."""
        if not self.cancel_on_kill:
            return
        spec = TrainingSpec.from_json(self.state["spec"])
        async with await self._hook() as hook:
            deleted = await insist(lambda: hook.cancel(spec, Owner(**self.owner)), self.log.warning)
        self.log.info("RayJob %s %s", submission_id_of(spec), "is deleted" if deleted else "is not ours")

    async def _discard(self, hook: RayJobHook, spec: TrainingSpec) -> None:
        """Delete what nobody needs any more: its GPUs are free at once, not when the RayJob's TTL is over."""
        try:
            await hook.cancel(spec, Owner(**self.owner))
        except MlopsError as error:
            self.log.warning("RayJob %s stays until its TTL is over: %s", submission_id_of(spec), error)

    async def _hook(self) -> RayJobHook:
        if self._new_hook is not None:
            return self._new_hook()
        # The Kubernetes clients take a second to import, which an event loop does not have.
        module = await asyncio.to_thread(__import__, "airflow_mlops.hooks.kuberay", fromlist=["RayJobHook"])
        return module.RayJobHook(**self.connection)

    def _shared(self) -> SharedWatch:
        from airflow_mlops.hooks._kubernetes import RAYJOB

        selector = {MANAGED_BY_LABEL: MANAGED_BY}
        hook = self._new_hook() if self._new_hook is not None else None
        return watch(resource=RAYJOB, selector=selector, hook=hook, **self.connection)

    def _log_shown(self, hook: RayJobHook, training: Training) -> AbstractAsyncContextManager[None]:
        if (spec := training.spec) is None:
            return nullcontext()
        return log_shown(
            self.logs,
            spec,
            emit=self._on_line,
            source=lambda place, over: hook.driver_log(spec, place, over),
            tail=lambda: hook.tail(spec, LOG_TAIL),
            warn=self.log.warning,
        )


class _Following:
    """One attempt on its way to its end."""

    def __init__(
        self, trigger: RayJobResourceTrigger, training: Training, hook: RayJobHook, shared: SharedWatch
    ) -> None:
        assert training.spec is not None
        self._trigger, self._training, self._hook, self._shared = trigger, training, hook, shared
        self._spec = training.spec
        self._owner = Owner(**trigger.owner)
        self._gang = Gang(**trigger.gang) if trigger.gang else None
        self._acts, self._ran = False, False
        self._silent_since: float | None = None
        self._trouble = ""
        self._view: RayJobView | None = None
        self._last: RayJobView | None = None
        self._settling_since: float | None = None
        self._look_at = time.monotonic() + PREFLIGHT

    async def event(self) -> TriggerEvent:
        """Follow until there is something to tell."""
        follower = self._shared.follow(submission_id_of(self._spec))
        known = False
        while True:
            try:
                self._take(await asyncio.wait_for(anext(follower), self._trigger.poll_interval))
                known = True
            except TimeoutError:
                pass
            seen = await self._seen() if known else None
            if problem := self._unreachable():
                seen = Observation("UNREACHABLE", message=f"The API server is away: {problem}")
            # Whoever was ending an attempt for a limit may have been lost before it could say so.
            ended_by_us = seen is not None and seen.status in ("LOST", "STOPPED")
            if seen is not None and seen.status in FINAL and not ended_by_us:
                return await self._training.over(seen)
            broken = await self._training.breach(None if seen is None or ended_by_us else seen.status)
            if broken is not None:
                return await self._broken(broken)
            if seen is not None and ended_by_us:
                return await self._training.over(seen)
            if seen is not None and (problem := await self._in_vain(seen)):
                return self._training.event(seen=vars(Observation("INVALID", message=problem)))
            if self._trigger.deadline is not None and time.time() >= self._trigger.deadline:
                return self._training.event(timed_out=True)

    def _take(self, row: Row | None) -> None:
        self._view = None if row is None else RayJobView.of_row(row.columns, _metadata(row))
        self._last = self._view or self._last
        settling = self._view is not None and self._view.settling
        self._settling_since = (self._settling_since or time.monotonic()) if settling else None

    async def _seen(self) -> Observation | None:
        """How the attempt is, None while that cannot be told."""
        seen = self._observed()
        if seen.status == INCOMPLETE:
            try:
                self._view = await self._hook.view(self._spec)
            except ExternalSystemError as error:
                self._silent_since, self._trouble = self._silent_since or time.monotonic(), str(error)
                return None
            self._silent_since = None
            self._last = self._view or self._last
            seen = self._observed()
        if seen.status == "SUBMITTER_LOST":
            return await asyncio.to_thread(signs_of_life, self._spec, time.time(), seen.message)
        return seen

    def _unreachable(self) -> str | None:
        """What the API server said last, if it has been away for too long."""
        for since, trouble in (
            (self._shared.silent_since, self._shared.trouble),
            (self._silent_since, self._trouble),
        ):
            if since is not None and time.monotonic() - since >= self._trigger.unreachable_timeout:
                return trouble
        return None

    def _observed(self) -> Observation:
        now = time.monotonic()
        return observe(self._view, now=now, terminal_since=self._settling_since, last=self._last)

    async def _broken(self, broken: Breach) -> TriggerEvent:
        self._trigger.log.warning("deleting RayJob %s: %s", submission_id_of(self._spec), broken.message)
        if broken.kind in ("startup", "queue"):
            _, why = await self._asked(self._hook.diagnosis(self._spec))
            broken = replace(broken, message=f"{broken.message} {why or 'Nothing seen explains it.'}")
        else:
            # The log goes with its pod.
            _, log = await self._asked(self._hook.tail(self._spec, LOG_TAIL))
            self._trigger.show_end(log or "")
            broken = replace(broken, log=log or "")
        seen = Observation("STOPPED")
        try:
            await self._hook.end(self._spec, self._owner, PODS_GO)
        except MlopsError as error:
            seen = Observation("UNREACHABLE", message=str(error))
        return self._training.event(breach=broken.to_json(), seen=vars(seen))

    async def _in_vain(self, seen: Observation) -> str | None:
        """Why waiting for the scheduler is in vain, None otherwise."""
        gang, runs, waits = self._gang, seen.status == "RUNNING", seen.status in ("PENDING", "QUEUED")
        if gang is None or not (waits or runs):
            return None
        queued = waits and gang.scheduler == "kueue"
        # What starts at once is looked at, too.
        due = time.monotonic() >= self._look_at or (runs and not self._ran)
        if not due or (self._acts and not queued):
            return None
        self._ran, self._look_at = self._ran or runs, time.monotonic() + QUEUE_LOOK
        problem = None
        if not self._acts:
            self._acts, problem = await self._asked(self._hook.scheduler_problem(self._spec, gang))
        if queued and self._acts and problem is None:
            _, problem = await self._asked(self._hook.queue_problem(self._spec))
        return problem

    async def _asked(self, question: Coroutine[Any, Any, str | None]) -> tuple[bool, str | None]:
        """Whether there is an answer, and the answer; that it may not be asked for is one."""
        try:
            return True, await question
        except ExternalSystemError as error:
            self._trigger.log.warning("%s", error)
            return False, None
        except MlopsError as error:
            return True, str(error)


def _metadata(row: Row) -> Mapping[str, Any]:
    return {
        "name": row.name,
        "uid": row.uid,
        "resourceVersion": row.resource_version,
        "labels": row.labels,
        "annotations": row.annotations,
        "deletionTimestamp": "set" if row.deleting else None,
    }
