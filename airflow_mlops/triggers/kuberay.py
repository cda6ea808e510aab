"""Following a RayJob: in the triggerer, or in a worker that waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TaskSuccessEvent, TriggerEvent

from airflow_mlops.exceptions import ExternalSystemError, MlopsError
from airflow_mlops.training.decide import FINAL, Observation
from airflow_mlops.training.fence import signs_of_life
from airflow_mlops.training.limits import Breach
from airflow_mlops.training.manifest import MANAGED_BY, MANAGED_BY_LABEL
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
    :param try_number: the try of the task that follows the attempt
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
        try_number: int,
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
        self.connection, self.try_number = connection, try_number
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
            "try_number",
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
            deleted = await insist(lambda: hook.cancel(spec, self.try_number), self.log.warning)
        self.log.info("RayJob %s %s", submission_id_of(spec), "is deleted" if deleted else "is not ours")

    async def _discard(self, hook: RayJobHook, spec: TrainingSpec) -> None:
        """Delete what nobody needs any more: its GPUs are free at once, not when the RayJob's TTL is over."""
        try:
            await hook.cancel(spec, self.try_number)
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
        self._gang = Gang(**trigger.gang) if trigger.gang else None
        self._view: RayJobView | None = None
        self._last: RayJobView | None = None
        self._settling_since: float | None = None
        self._began = self._looked = time.monotonic()

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
            silent = self._shared.silent_since
            if silent is not None and time.monotonic() - silent >= self._trigger.unreachable_timeout:
                seen = Observation("UNREACHABLE", message=f"The API server is away: {self._shared.trouble}")
            if seen is not None and seen.status in FINAL:
                return await self._training.over(seen)
            broken = await self._training.breach(None if seen is None else seen.status)
            if broken is not None:
                return await self._broken(broken)
            if seen is not None and (problem := await self._in_vain(seen)):
                return self._training.event(seen=vars(Observation("INVALID", message=problem)))
            if self._trigger.deadline is not None and time.time() >= self._trigger.deadline:
                return self._training.event(timed_out=True)

    def _take(self, row: Row | None) -> None:
        self._view = None if row is None else RayJobView.of_row(row.columns, _metadata(row))
        self._last = self._view or self._last
        settling = self._view is not None and self._view.settling
        self._settling_since = (self._settling_since or time.monotonic()) if settling else None

    async def _seen(self) -> Observation:
        seen = self._observed()
        if seen.status == INCOMPLETE:
            self._view = await self._hook.view(self._spec)
            self._last = self._view or self._last
            seen = self._observed()
        if seen.status == "SUBMITTER_LOST":
            # The run directory knows whether the driver lives; Ray would have to be reached for it.
            return await asyncio.to_thread(signs_of_life, self._spec, time.time(), seen.message)
        return seen

    def _observed(self) -> Observation:
        now = time.monotonic()
        return observe(self._view, now=now, terminal_since=self._settling_since, last=self._last)

    async def _broken(self, broken: Breach) -> TriggerEvent:
        self._trigger.log.warning("deleting RayJob %s: %s", submission_id_of(self._spec), broken.message)
        if broken.kind in ("startup", "queue"):
            why = await self._asked(self._hook.diagnosis(self._spec))
            broken = Breach(broken.kind, f"{broken.message} {why or 'Nothing seen explains it.'}", broken.restart)
        seen = Observation("STOPPED")
        try:
            await self._hook.end(self._spec, self._trigger.try_number, PODS_GO)
        except MlopsError as error:
            seen = Observation("UNREACHABLE", message=str(error))
        return self._training.event(breach=broken.to_json(), seen=vars(seen))

    async def _in_vain(self, seen: Observation) -> str | None:
        """Why waiting for the scheduler is in vain, None otherwise."""
        now = time.monotonic()
        if self._gang is None or seen.status not in ("PENDING", "QUEUED") or now - self._looked < self._pause:
            return None
        self._looked = now
        problem = await self._asked(self._hook.scheduler_problem(self._spec, self._gang))
        if problem is None and self._gang.scheduler == "kueue":
            problem = await self._asked(self._hook.queue_problem(self._spec))
        elif problem is None:
            self._gang = None
        return problem

    @property
    def _pause(self) -> float:
        return QUEUE_LOOK if self._looked > self._began else PREFLIGHT

    async def _asked(self, question: Any) -> Any:
        """The answer, None if it cannot be had now."""
        try:
            return await question
        except ExternalSystemError as error:
            self._trigger.log.warning("%s", error)
            return None


def _metadata(row: Row) -> Mapping[str, Any]:
    return {
        "name": row.name,
        "uid": row.uid,
        "resourceVersion": row.resource_version,
        "labels": row.labels,
        "annotations": row.annotations,
        "deletionTimestamp": "set" if row.deleting else None,
    }
