"""Ray Serve through its REST API and its HTTP proxy; needs no Ray in the worker."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_mlops.exceptions import InvalidInputError

if TYPE_CHECKING:
    from airflow_mlops.rollout.targets.client import RayServeClient

DASHBOARD_URL = "http://127.0.0.1:8265"
SERVE_URL = "http://127.0.0.1:8000"


class RayServeHook(BaseHook):
    """Connects to the Serve instance of a Ray cluster.

    The connection is that of Ray: host and port of the dashboard, the token as password, and in the extra
    ``serve_url``, the address of Serve's HTTP proxy. Where the connection does not exist, a Ray on this machine is
    meant, with the token from ``RAY_AUTH_TOKEN``.

    :param ray_conn_id: connection of type ``ray``
    :param serve_url: overrides the connection's ``serve_url``
    """

    conn_name_attr = "ray_conn_id"
    default_conn_name = "ray_default"
    conn_type = "ray"
    hook_name = "Ray Serve"

    def __init__(self, ray_conn_id: str = default_conn_name, serve_url: str | None = None) -> None:
        super().__init__()
        self.ray_conn_id = ray_conn_id
        self.serve_url = serve_url

    def get_conn(self) -> RayServeClient:
        """A client, to be used as ``async with hook.get_conn() as client``."""
        try:
            return self._client(self.get_connection(self.ray_conn_id))
        except AirflowNotFoundException:
            return self._client(None)

    async def aget_conn(self) -> RayServeClient:
        """The same from a triggerer's event loop."""
        try:
            return self._client(await self.aget_connection(self.ray_conn_id))
        except AirflowNotFoundException:
            return self._client(None)

    def _client(self, connection: Any) -> RayServeClient:
        from airflow_mlops.rollout.targets.client import RayServeClient

        if connection is None or not connection.host:
            if connection is None and self.ray_conn_id != self.default_conn_name:
                raise InvalidInputError(
                    f"the connection {self.ray_conn_id!r} does not exist; create one of type ray with the dashboard's "
                    "host and port, its token as password and serve_url in the extra"
                )
            token = (connection.password if connection else None) or os.environ.get("RAY_AUTH_TOKEN")
            return RayServeClient(DASHBOARD_URL, self.serve_url or SERVE_URL, token)
        host = connection.host if "://" in connection.host else f"{connection.schema or 'http'}://{connection.host}"
        address = urlsplit(host)
        if not address.hostname or address.scheme not in ("http", "https"):
            raise InvalidInputError(
                f"the host of connection {self.ray_conn_id!r} is {connection.host!r}; expected http://host or "
                "a host name"
            )
        port = connection.port or address.port or 8265
        extra = connection.extra_dejson
        serve_url = self.serve_url or extra.get("serve_url") or f"http://{address.hostname}:8000"
        name = f"[{address.hostname}]" if ":" in address.hostname else address.hostname
        return RayServeClient(f"{address.scheme}://{name}:{port}", serve_url, connection.password or None)

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
