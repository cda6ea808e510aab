"""Ray Serve through its REST API and its HTTP proxy; needs no Ray in the worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_mlops.hooks.ray import Endpoint, RayHook

if TYPE_CHECKING:
    from airflow_mlops.rollout.targets.client import RayServeClient


class RayServeHook(RayHook):
    """Connects to the Serve instance of a Ray cluster; see :class:`RayHook` for the connection.

    :param ray_conn_id: connection of type ``ray``
    :param serve_url: overrides the connection's ``serve_url``
    """

    hook_name = "Ray Serve"

    def __init__(self, ray_conn_id: str = RayHook.default_conn_name, serve_url: str | None = None) -> None:
        super().__init__(ray_conn_id)
        self.serve_url = serve_url

    def get_conn(self) -> RayServeClient:
        """A client, to be used as ``async with hook.get_conn() as client``."""
        return self._client(self.endpoint)

    async def aget_conn(self) -> RayServeClient:
        """The same from a triggerer's event loop."""
        return self._client(await self.aendpoint())

    def _client(self, endpoint: Endpoint) -> RayServeClient:
        from airflow_mlops.rollout.targets.client import RayServeClient

        serve_url = self.serve_url or endpoint.serve_url
        return RayServeClient(endpoint.address, serve_url, endpoint.token, ssl=endpoint.ssl)

    def test_connection(self) -> tuple[bool, str]:
        """Ask the dashboard for Serve's applications."""
        import asyncio

        async def count() -> int:
            async with self.get_conn() as client:
                return len((await client.serve()).get("applications", {}))

        try:
            return True, f"Ray answers; Serve runs {asyncio.run(count())} applications"
        except Exception as error:
            return False, str(error)
