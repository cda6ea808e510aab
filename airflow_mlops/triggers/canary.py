"""The trigger that looks at a canary, judges and acts while no worker is held."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_mlops.exceptions import MlopsError
from airflow_mlops.hooks.ray_serve import RayServeHook


class CanaryTrigger(BaseTrigger):
    """Runs one rollout on Ray Serve to its verdict.

    Its event is ``{"status": "done", "result": ...}`` or ``{"status": "error", "error": ..., "retryable": ...}``. A
    triggerer that dies leaves the rollout's state on the route, from where the next one continues; when none does,
    the lease on the route runs out and stable has all traffic.

    :param spec: :meth:`airflow_mlops.rollout.controller.RolloutSpec.to_json`
    :param route: keyword arguments of :class:`airflow_mlops.rollout.targets.client.Route`, but for the client
    :param ray_conn_id: connection of type ``ray``
    :param serve_url: overrides the connection's ``serve_url``
    """

    def __init__(
        self,
        *,
        spec: dict[str, Any],
        route: dict[str, Any],
        ray_conn_id: str = RayServeHook.default_conn_name,
        serve_url: str | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.route = route
        self.ray_conn_id = ray_conn_id
        self.serve_url = serve_url

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Class path and arguments."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {"spec": self.spec, "route": self.route, "ray_conn_id": self.ray_conn_id, "serve_url": self.serve_url},
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look, judge and act until the verdict is final."""
        from airflow_mlops.rollout.controller import RolloutSpec, run_rollout
        from airflow_mlops.rollout.reporting import LookLog
        from airflow_mlops.rollout.targets.client import Route

        try:
            spec = RolloutSpec.from_json(self.spec)
            hook = RayServeHook(self.ray_conn_id, self.serve_url)
            async with await hook.aget_conn() as client:
                result = await run_rollout(Route(client, **self.route), spec, LookLog(self.log.info))
        except MlopsError as error:
            yield TriggerEvent({"status": "error", "error": str(error), "retryable": error.retryable})
            return
        yield TriggerEvent({"status": "done", "result": result})

    async def on_kill(self) -> None:
        """A person ended the task: stable gets its traffic back."""
        from airflow_mlops.rollout.controller import RolloutSpec, abort
        from airflow_mlops.rollout.targets.client import Route

        with contextlib.suppress(MlopsError):
            async with await RayServeHook(self.ray_conn_id, self.serve_url).aget_conn() as client:
                await abort(Route(client, **self.route), RolloutSpec.from_json(self.spec))
