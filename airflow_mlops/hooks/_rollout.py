"""Where a rollout's traffic is split and where its evidence comes from, opened with the connections they need."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_mlops.hooks.ray_serve import RayServeHook

if TYPE_CHECKING:
    from airflow_mlops.rollout.sources import EvidenceSource
    from airflow_mlops.rollout.targets.protocol import Target

RAY_SERVE = "ray_serve"


@dataclass(frozen=True)
class RolloutPlace:
    """A target and a source of evidence as small JSON, for a trigger.

    :param target: ``kind`` (``ray_serve``, ``kserve``, ``gateway``) and the arguments of that target
    :param evidence: ``kind`` (``target``, ``prometheus``, ``logs``) and the arguments of that source
    :param ray_conn_id: connection of type ``ray``, for Ray Serve
    :param kubernetes_conn_id: connection of type ``kuberay`` or ``kubernetes``, for KServe and the Gateway API
    :param prometheus_conn_id: connection of type ``prometheus``
    """

    target: Mapping[str, Any]
    evidence: Mapping[str, Any] = field(default_factory=lambda: {"kind": "target"})
    ray_conn_id: str = RayServeHook.default_conn_name
    kubernetes_conn_id: str = "kuberay_default"
    prometheus_conn_id: str = "prometheus_default"

    def to_json(self) -> dict[str, Any]:
        """Plain Python types."""
        return asdict(self)

    @asynccontextmanager
    async def open(self, *, worker: bool) -> AsyncIterator[tuple[Target, EvidenceSource]]:
        """Both, for as long as the context lasts.

        :param worker: whether a task's process asks, where connections are read as ever; a triggerer's event loop
            must not wait for them
        """
        async with AsyncExitStack() as stack:
            target = await self._target(stack, worker)
            yield target, await self._source(stack, worker)

    async def _target(self, stack: AsyncExitStack, worker: bool) -> Target:
        arguments = dict(self.target)
        if arguments.pop("kind") == RAY_SERVE:
            from airflow_mlops.rollout.targets.client import Route

            hook = RayServeHook(self.ray_conn_id, arguments.pop("serve_url", None))
            client = hook.get_conn() if worker else await hook.aget_conn()
            return Route(await stack.enter_async_context(client), **arguments)
        raise NotImplementedError

    async def _source(self, stack: AsyncExitStack, worker: bool) -> EvidenceSource:
        raise NotImplementedError
