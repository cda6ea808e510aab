"""Waiting for a Ray job in the triggerer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_mlops.exceptions import ExternalSystemError, MlopsError
from airflow_mlops.hooks.ray import RayJobsHook
from airflow_mlops.training.decide import FINAL, Observation, Patience


class RayJobTrigger(BaseTrigger):
    """Fires once when a Ray job is over, lost, or its cluster has been silent for too long.

    The event is ``{"seen": {"status", "exit_code", "message"}, "state": state}``, ``{"error", "state"}`` where asking
    again is pointless, or ``{"timed_out": true, "state"}``. What to do about it is the task's decision.

    :param submission_id: the job
    :param ray_conn_id: connection of type ``ray``
    :param address: dashboard address instead of a connection
    :param poll_interval: seconds between two looks
    :param unreachable_timeout: seconds that the dashboard may be away, for example while the head restarts
    :param cancel_on_kill: stop the job when a user clears the task or sets its state
    :param deadline: Unix time until which to wait, None for ever
    :param state: handed back with the event, so that the task needs no memory of its own
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
    ) -> None:
        super().__init__()
        self.submission_id, self.ray_conn_id, self.address = submission_id, ray_conn_id, address
        self.poll_interval, self.unreachable_timeout = poll_interval, unreachable_timeout
        self.cancel_on_kill, self.deadline, self.state = cancel_on_kill, deadline, state

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
        )
        return "airflow_mlops.triggers.ray.RayJobTrigger", {name: getattr(self, name) for name in names}

    @property
    def _hook(self) -> RayJobsHook:
        return RayJobsHook(self.ray_conn_id, self.address)

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look at the job until there is something to tell."""
        hook, patience = self._hook, Patience(self.unreachable_timeout)
        while True:
            seen: Observation | None
            try:
                seen = await hook.aobserve(self.submission_id)
                patience.answered()
            except ExternalSystemError as error:
                self.log.warning("%s", error)
                seen = patience.silent(time.monotonic(), str(error))
            except MlopsError as error:
                yield TriggerEvent({"error": str(error), "state": self.state})
                return
            if seen is not None and seen.status in FINAL:
                yield TriggerEvent({"seen": vars(seen), "state": self.state})
                return
            if self.deadline is not None and time.time() >= self.deadline:
                yield TriggerEvent({"timed_out": True, "state": self.state})
                return
            await asyncio.sleep(self.poll_interval)

    async def on_kill(self) -> None:
        """Stop the job: a user has cleared the deferred task or set its state."""
        if self.cancel_on_kill:
            self.log.info("stopping Ray job %s", self.submission_id)
            await self._hook.astop(self.submission_id)
