"""Waiting for a Ray job, or before the next attempt at one, in the triggerer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_mlops.exceptions import ExternalSystemError, MlopsError
from airflow_mlops.hooks.ray import LOG_TAIL, AccessRefusedError, RayJobsHook
from airflow_mlops.training.decide import FINAL, Observation, Patience
from airflow_mlops.training.limits import Breach
from airflow_mlops.triggers._jobs import next_look
from airflow_mlops.triggers._training import Training, insist, log_shown

#: Seconds beyond the stop timeout that a job has to be seen ended.
STOP_MARGIN = 15.0


class RayJobTrigger(BaseTrigger):
    """Fires once: when a Ray job is over, lost, has broken a limit, or its cluster has been silent for too long.

    A success that needs no worker ends the task here, with ``TaskSuccessEvent``; when it may is said by
    :func:`airflow_mlops.triggers._training.ends_in_triggerer`. All else is for the operator to decide on:
    ``{"seen": {"status", "exit_code", "message"}}``; ``{"breach": {"kind", "message", "restart"}, "seen"}`` after the
    job was stopped for a limit, the state in ``seen`` is then final unless it would not end; ``{"error"}`` where asking
    again is pointless; ``{"timed_out": true}``. Each has ``"state"`` as it was given, and ``"times"`` as they are now.

    All triggers of a triggerer that wait for one cluster look at it together, once per ``poll_interval``.

    :param submission_id: the job
    :param ray_conn_id: connection of type ``ray``
    :param address: dashboard address instead of a connection
    :param poll_interval: seconds between two looks
    :param unreachable_timeout: seconds that the dashboard may be away, for example while the head restarts, or refuse
        a token that it has accepted before, for example while it is rotated
    :param cancel_on_kill: stop the job when a user clears the task or sets its state
    :param deadline: Unix time until which to wait, None for ever
    :param state: handed back with the event, so that the task needs no memory of its own; ``spec`` and ``adopted`` in
        it are read here
    :param logs: of the driver's log ``"off"``: nothing, ``"tail"``: the last 200 lines when the job is over, or
        ``"live"``: every line as it is written
    :param limits: :meth:`airflow_mlops.training.limits.Limits.to_json`, None without
    :param times: :meth:`airflow_mlops.training.limits.Times.to_json`, needed with ``limits``
    :param stop_timeout: seconds that a job stopped for a limit has to commit a checkpoint and end
    :param finish_in_triggerer: end the task here if the training has succeeded
    :param multiple_outputs: push each key of the result as an XCom of its own, too
    """

    def __init__(
        self,
        *,
        submission_id: str,
        ray_conn_id: str,
        address: str | None,
        poll_interval: float,
        unreachable_timeout: float,
        cancel_on_kill: bool,
        state: dict[str, Any],
        deadline: float | None = None,
        logs: str = "off",
        limits: dict[str, Any] | None = None,
        times: dict[str, Any] | None = None,
        stop_timeout: float = 15.0,
        finish_in_triggerer: bool = False,
        multiple_outputs: bool = True,
    ) -> None:
        super().__init__()
        self.submission_id, self.ray_conn_id, self.address = submission_id, ray_conn_id, address
        self.poll_interval, self.unreachable_timeout = poll_interval, unreachable_timeout
        self.cancel_on_kill, self.deadline, self.state = cancel_on_kill, deadline, state
        self.logs, self.limits, self.times, self.stop_timeout = logs, limits, times, stop_timeout
        self.finish_in_triggerer, self.multiple_outputs = finish_in_triggerer, multiple_outputs

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Class path and constructor arguments."""
        names = (
            "submission_id",
            "ray_conn_id",
            "address",
            "poll_interval",
            "unreachable_timeout",
            "cancel_on_kill",
            "deadline",
            "state",
            "logs",
            "limits",
            "times",
            "stop_timeout",
            "finish_in_triggerer",
            "multiple_outputs",
        )
        return "airflow_mlops.triggers.ray.RayJobTrigger", {name: getattr(self, name) for name in names}

    @property
    def _hook(self) -> RayJobsHook:
        return RayJobsHook(self.ray_conn_id, self.address)

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look at the job until there is something to tell, the log's last lines first."""
        try:
            training = Training(
                self.state,
                limits=self.limits,
                times=self.times,
                finish_in_triggerer=self.finish_in_triggerer,
                multiple_outputs=self.multiple_outputs,
                task=self.task_instance,
            )
        except MlopsError as error:
            yield TriggerEvent({"error": str(error), "state": self.state})
            return
        async with self._hook as hook:
            async with self._log_shown(hook, training):
                event = await self._until_over(hook, training)
        yield event

    async def _until_over(self, hook: RayJobsHook, training: Training) -> TriggerEvent:
        patience, admitted = Patience(self.unreachable_timeout), False
        while True:
            status: str | None = None
            seen: Observation | None
            try:
                seen = (await next_look(await hook.aendpoint(), self.submission_id, self.poll_interval)).observation
                status, admitted = seen.status, True
                patience.answered()
            except ExternalSystemError as error:
                self.log.warning("%s", error)
                seen = patience.silent(time.monotonic(), str(error))
            except AccessRefusedError as error:
                if await hook.arefresh():
                    continue
                if not admitted:
                    return training.event(error=str(error))
                self.log.warning("%s", error)
                seen = patience.silent(time.monotonic(), str(error))
            except MlopsError as error:
                return training.event(error=str(error))
            if seen is not None and seen.status in FINAL:
                return await training.over(seen)
            try:
                broken = await training.breach(status)
            except MlopsError as error:
                return training.event(error=str(error))
            if broken is not None:
                return await self._stopped(hook, training, broken)
            if self.deadline is not None and time.time() >= self.deadline:
                return training.event(timed_out=True)

    async def _stopped(self, hook: RayJobsHook, training: Training, broken: Breach) -> TriggerEvent:
        """Stop the job, which may commit a checkpoint first, and wait for its end without holding a worker."""
        self.log.warning("stopping Ray job %s: %s", self.submission_id, broken.message)
        deadline, asked = time.monotonic() + self.stop_timeout + STOP_MARGIN, False
        seen = Observation("UNREACHABLE", message="It is not known whether the job has ended.")
        while time.monotonic() < deadline:
            try:
                if not asked:
                    await hook.astop(self.submission_id)
                    asked = True
                seen = await hook.aobserve(self.submission_id)
                if seen.status in FINAL:
                    break
            except MlopsError as error:
                self.log.warning("%s", error)
            await asyncio.sleep(min(1.0, self.poll_interval))
        return training.event(breach=broken.to_json(), seen=vars(seen))

    def _log_shown(self, hook: RayJobsHook, training: Training) -> AbstractAsyncContextManager[None]:
        async def tail() -> str:
            return "\n".join((await hook.alogs(self.submission_id)).splitlines()[-LOG_TAIL:])

        return log_shown(
            self.logs,
            training.spec,
            emit=lambda line: self.log.info("%s", line),
            source=lambda place, _: hook.alog_lines(self.submission_id, int(place or 0)),
            tail=tail,
            warn=self.log.warning,
        )

    async def on_kill(self) -> None:
        """Stop the job: a user has cleared the deferred task or set its state."""
        if not self.cancel_on_kill:
            return
        self.log.info("stopping Ray job %s", self.submission_id)
        async with self._hook as hook:
            await insist(lambda: hook.astop(self.submission_id), self.log.warning)


class PauseTrigger(BaseTrigger):
    """Fires ``{"paused": true, "state": state}`` when it is time for the next attempt.

    :param until: Unix time
    :param state: handed back with the event
    """

    def __init__(self, *, until: float, state: dict[str, Any]) -> None:
        super().__init__()
        self.until, self.state = until, state

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Class path and constructor arguments."""
        return "airflow_mlops.triggers.ray.PauseTrigger", {"until": self.until, "state": self.state}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait; by the clock on the wall, so that a restarted triggerer does not begin anew."""
        await asyncio.sleep(max(self.until - time.time(), 0.0))
        yield TriggerEvent({"paused": True, "state": self.state})
