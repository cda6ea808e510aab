"""A Prometheus server, or what speaks like one: Thanos, Mimir, VictoriaMetrics."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_mlops.exceptions import InvalidInputError

if TYPE_CHECKING:
    import ssl

    from airflow.sdk import Connection

    from airflow_mlops.rollout.sources.prometheus_api import PrometheusApi
    from airflow_mlops.rollout.sources.protocol import EvidenceSource

PORT = 9090
#: The header that Mimir, Cortex and Loki tell tenants by; Thanos takes it when it is told to.
TENANT_HEADER = "X-Scope-OrgID"


class PrometheusHook(BaseHook):
    """Asks a Prometheus server.

    Connection: ``host`` is the server's address, a name or a URL with scheme, port and path; ``port`` (9090 for a bare
    name) and ``schema`` (http or https) complete a bare name. With ``login`` and ``password`` it is asked with basic
    authentication, with a password alone with that as bearer token. Extra: ``verify`` (true, false or a CA file),
    ``path_prefix``, ``org_id`` (tenant of Mimir or Thanos), ``headers`` (a JSON object) and ``timeout`` in seconds.
    Where the default connection does not exist, a Prometheus on this machine is meant.

    :param prometheus_conn_id: connection of type ``prometheus``
    """

    conn_name_attr = "prometheus_conn_id"
    default_conn_name = "prometheus_default"
    conn_type = "prometheus"
    hook_name = "Prometheus"

    def __init__(self, prometheus_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.prometheus_conn_id = prometheus_conn_id

    def get_conn(self) -> PrometheusApi:
        """What asks the server.

        :raises InvalidInputError: the connection does not exist, or describes no server
        """
        try:
            return api_of(self.get_connection(self.prometheus_conn_id))
        except AirflowNotFoundException:
            return self._without_connection()

    async def aget_conn(self) -> PrometheusApi:
        """The same from a triggerer's event loop."""
        import asyncio

        from airflow.providers.common.compat.connection import get_async_connection

        try:
            # In a thread, for a CA file is read.
            return await asyncio.to_thread(api_of, await get_async_connection(self.prometheus_conn_id))
        except AirflowNotFoundException:
            return self._without_connection()

    def _without_connection(self) -> PrometheusApi:
        if self.prometheus_conn_id != self.default_conn_name:
            raise InvalidInputError(
                f"the connection {self.prometheus_conn_id!r} does not exist; create one of type prometheus with the "
                "server's address as host"
            )
        from airflow_mlops.rollout.sources.prometheus_api import PrometheusApi

        return PrometheusApi(f"http://127.0.0.1:{PORT}")

    def test_connection(self) -> tuple[bool, str]:
        """Whether the server answers a query with these credentials."""
        import asyncio

        async def count() -> int:
            api = self.get_conn()
            async with api.session() as session:
                answer = await api.query(session, "count(up)")
            return int(answer[0].value) if answer else 0

        try:
            return True, f"Prometheus answers; it scrapes {asyncio.run(count())} targets"
        except Exception as error:
            return False, str(error)


def evidence_source(config: Mapping[str, Any] | str | None, **context: Any) -> EvidenceSource:
    """:func:`airflow_mlops.rollout.sources.source_of` with the connection that ``config`` names."""
    from airflow_mlops.rollout.sources.config import connection_of, source_of

    conn_id = connection_of(config)
    return source_of(config, **context, prometheus=PrometheusHook(conn_id).get_conn() if conn_id else None)


async def aevidence_source(config: Mapping[str, Any] | str | None, **context: Any) -> EvidenceSource:
    """The same from a triggerer's event loop."""
    from airflow_mlops.rollout.sources.config import connection_of, source_of

    conn_id = connection_of(config)
    return source_of(config, **context, prometheus=await PrometheusHook(conn_id).aget_conn() if conn_id else None)


def api_of(connection: Connection) -> PrometheusApi:
    """What asks the server that a ``prometheus`` connection describes.

    :raises InvalidInputError: its host is missing or none that HTTP reaches, or an extra cannot be used
    """
    from airflow_mlops.rollout.sources.prometheus_api import PrometheusApi

    extra = connection.extra_dejson
    timeout = _timeout(connection, extra.get("timeout"))
    verify = _ssl(connection, extra.get("verify"))
    return PrometheusApi(_url(connection), headers=_headers(connection), ssl=verify, timeout=timeout)


def _url(connection: Connection) -> str:
    host = (connection.host or "").strip()
    fix = "give the server's address as host, for example http://prometheus.monitoring:9090"
    if not host:
        raise InvalidInputError(f"connection {connection.conn_id!r} has no host; {fix}")
    named = "://" not in host
    url = urlsplit(f"{connection.schema or 'http'}://{host}" if named else host)
    try:
        port = url.port if url.port is not None else connection.port or (PORT if named else None)
    except ValueError:
        port = 0
    if not url.hostname or url.scheme not in ("http", "https") or port == 0 or url.username or url.query:
        raise InvalidInputError(
            f"the host of connection {connection.conn_id!r} is no address of a server, expected http://host:port/path "
            f"without user or query; {fix}"
        )
    name = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    prefix = str(connection.extra_dejson.get("path_prefix") or url.path).strip("/").removesuffix("api/v1").rstrip("/")
    return f"{url.scheme}://{name}{f':{port}' if port else ''}{f'/{prefix}' if prefix else ''}"


def _headers(connection: Connection) -> dict[str, str]:
    import json

    extra = connection.extra_dejson
    given = extra.get("headers") or {}
    try:
        # The connection form gives text.
        given = json.loads(given) if isinstance(given, str) else given
        headers = {str(name): str(value) for name, value in given.items()}
    except (ValueError, AttributeError):
        raise InvalidInputError(
            f"extra headers of connection {connection.conn_id!r} is no JSON object of names and values"
        ) from None
    if extra.get("org_id"):
        headers[TENANT_HEADER] = str(extra["org_id"])
    if connection.login:
        pair = f"{connection.login}:{connection.password or ''}".encode()
        headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
    elif connection.password:
        headers["Authorization"] = f"Bearer {connection.password}"
    return headers


def _ssl(connection: Connection, verify: Any) -> bool | ssl.SSLContext:
    # The connection form gives text, and an empty one must not switch the check off.
    text = "" if verify is None else str(verify).strip()
    if text.lower() in ("", "true", "false"):
        return text.lower() != "false"
    import ssl

    try:
        return ssl.create_default_context(cafile=text)
    except OSError as error:
        raise InvalidInputError(
            f"extra verify of connection {connection.conn_id!r} is {text!r}, from which no CA can be read: {error}"
        ) from None


def _timeout(connection: Connection, value: Any) -> float:
    try:
        timeout = 10.0 if value in (None, "") else float(value)
    except (TypeError, ValueError):
        timeout = 0.0
    if not 0 < timeout <= 300:
        raise InvalidInputError(
            f"extra timeout of connection {connection.conn_id!r} is {value!r}; expected seconds, at most 300"
        )
    return timeout
