"""A Ray cluster's connection and its Jobs REST API, without importing Ray."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError
from airflow_mlops.training.decide import ACTIVE, Observation

if TYPE_CHECKING:
    from airflow.sdk import Connection

LOG_TAIL = 200
DASHBOARD_PORT = 8265


@dataclass(frozen=True)
class Endpoint:
    """Where a Ray cluster answers, and how to be let in.

    :param address: of the dashboard, ``http://host:port``
    :param token: of the cluster's token authentication, None without
    :param verify: whether, or with which CA file, to check the server's certificate
    :param serve_url: of Serve's HTTP proxy
    """

    address: str
    token: str | None = field(repr=False)
    verify: bool | str
    serve_url: str

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request; the second one passes proxies that take ``Authorization`` for themselves."""
        if not self.token:
            return {}
        return {"Authorization": f"Bearer {self.token}", "X-Ray-Authorization": f"Bearer {self.token}"}

    @property
    def ssl(self) -> Any:
        """``verify`` in the form that aiohttp takes."""
        if isinstance(self.verify, str):
            import ssl

            return ssl.create_default_context(cafile=self.verify)
        return self.verify


def endpoint_of(connection: Connection) -> Endpoint:
    """The endpoint that a ``ray`` connection describes: an address as it is given, or a host name and the usual port.

    :raises InvalidInputError: its host is missing, or not one that HTTP reaches
    """
    host = (connection.host or "").strip()
    fix = "give the Ray dashboard's address, for example http://127.0.0.1:8265"
    if not host:
        raise InvalidInputError(f"connection {connection.conn_id!r} has no host; {fix}")
    named = "://" not in host
    url = urlsplit(f"{connection.schema or 'http'}://{host}" if named else host)
    try:
        port = url.port or connection.port or (DASHBOARD_PORT if named else None)
    except ValueError:
        port = 0
    if not url.hostname or url.scheme not in ("http", "https") or port == 0:
        raise InvalidInputError(
            f"the host of connection {connection.conn_id!r} is {connection.host!r}, expected http://host:port; {fix}"
        )
    name = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    extra = connection.extra_dejson
    return Endpoint(
        f"{url.scheme}://{name}{f':{port}' if port else ''}{url.path.rstrip('/')}",
        connection.password or None,
        _verify(extra.get("verify")),
        extra.get("serve_url") or f"http://{name}:8000",
    )


def _local_endpoint(name: str, address: str) -> Endpoint:
    from airflow.sdk import Connection

    token = os.environ.get("RAY_AUTH_TOKEN")
    return endpoint_of(Connection(conn_id=name, conn_type="ray", host=address, password=token))


def _verify(value: Any) -> bool | str:
    # The connection form gives text, and an empty one must not switch the check off.
    text = "" if value is None else str(value).strip()
    return {"": True, "true": True, "false": False}.get(text.lower(), text)


class RayHook(BaseHook):
    """What every hook of a Ray cluster shares: its connection.

    Connection: ``host`` is the dashboard's address with scheme and port, ``password`` the cluster's token, extra
    ``verify`` (true, false or a CA file) how its certificate is checked, extra ``serve_url`` the address of Serve's
    HTTP proxy. Where the default connection does not exist, a Ray on this machine is meant, with the token from
    ``RAY_AUTH_TOKEN`` of the environment.

    :param ray_conn_id: connection of type ``ray``
    :param address: dashboard address to use instead of a connection; its token is then ``RAY_AUTH_TOKEN`` of the
        environment
    """

    conn_name_attr = "ray_conn_id"
    default_conn_name = "ray_default"
    conn_type = "ray"
    hook_name = "Ray cluster"

    def __init__(self, ray_conn_id: str = default_conn_name, address: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ray_conn_id, self.address = ray_conn_id, address
        self._endpoint: Endpoint | None = None

    @property
    def endpoint(self) -> Endpoint:
        """Addresses and token, looked up once.

        :raises InvalidInputError: the connection does not exist, or describes no cluster
        """
        if self._endpoint is None:
            try:
                self._endpoint = self._given() or endpoint_of(self.get_connection(self.ray_conn_id))
            except AirflowNotFoundException:
                self._endpoint = self._without_connection()
        return self._endpoint

    async def aendpoint(self) -> Endpoint:
        """Like :attr:`endpoint`, for an event loop."""
        if self._endpoint is None:
            from airflow.providers.common.compat.connection import get_async_connection

            try:
                self._endpoint = self._given() or endpoint_of(await get_async_connection(self.ray_conn_id))
            except AirflowNotFoundException:
                self._endpoint = self._without_connection()
        return self._endpoint

    def _given(self) -> Endpoint | None:
        return _local_endpoint("ray_address", self.address) if self.address else None

    def _without_connection(self) -> Endpoint:
        if self.ray_conn_id != self.default_conn_name:
            raise InvalidInputError(
                f"the connection {self.ray_conn_id!r} does not exist; create one of type ray with the dashboard's "
                "address as host and its token as password"
            )
        return _local_endpoint(self.ray_conn_id, "127.0.0.1")


class RayJobsHook(RayHook):
    """Submits, follows and stops jobs on a Ray cluster; see :class:`RayHook` for the connection.

    :param ray_conn_id: connection of type ``ray``
    :param address: dashboard address to use instead of a connection
    :param timeout: seconds that one request may take
    """

    def __init__(
        self,
        ray_conn_id: str = RayHook.default_conn_name,
        address: str | None = None,
        timeout: float = 30.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(ray_conn_id, address, **kwargs)
        self.timeout = timeout

    def submit(
        self,
        submission_id: str,
        entrypoint: str,
        runtime_env: dict[str, Any] | None = None,
        metadata: dict[str, str] | None = None,
        **resources: Any,
    ) -> bool:
        """Submit a job under a name of our choosing; False if there is one of that name already.

        An answer that says nothing (a duplicate is a 500, a timeout may come after success) is followed by a look.

        :param resources: ``entrypoint_num_cpus``, ``entrypoint_num_gpus``, ``entrypoint_memory`` and the like
        :raises ExternalSystemError: the job was not accepted and is not there
        """
        body = {
            "submission_id": submission_id,
            "entrypoint": entrypoint,
            "runtime_env": runtime_env or {},
            "metadata": metadata or {},
            **resources,
        }
        try:
            self.request("POST", "/api/jobs/", body)
            return True
        except ExternalSystemError:
            if self.observe(submission_id).status == "LOST":
                raise
            return False

    def observe(self, submission_id: str) -> Observation:
        """State of a job; LOST if the cluster does not know it."""
        return _observation(submission_id, *self.request("GET", f"/api/jobs/{submission_id}", allow=(404,)))

    async def aobserve(self, submission_id: str) -> Observation:
        """Like :meth:`observe`, for an event loop."""
        return _observation(submission_id, *await self.arequest("GET", f"/api/jobs/{submission_id}", allow=(404,)))

    def stop(self, submission_id: str) -> None:
        """Ask a job to end; harmless if it has, or is not known."""
        self.request("POST", f"/api/jobs/{submission_id}/stop", allow=(404,))

    async def astop(self, submission_id: str) -> None:
        """Like :meth:`stop`, for an event loop."""
        await self.arequest("POST", f"/api/jobs/{submission_id}/stop", allow=(404,))

    def logs(self, submission_id: str) -> str:
        """All that the job's driver has written; empty if the cluster does not know it."""
        code, text = self.request("GET", f"/api/jobs/{submission_id}/logs", allow=(404,))
        return "" if code == 404 else str(_decoded(text).get("logs") or "")

    def test_connection(self) -> tuple[bool, str]:
        """Whether a Ray dashboard answers there and accepts the token."""
        try:
            version = _decoded(self.request("GET", "/api/version")[1])
        except Exception as error:
            return False, str(error)
        return True, f"Ray {version.get('ray_version', 'of unknown version')} at {self.endpoint.address}"

    def request(self, method: str, path: str, body: Any = None, allow: tuple[int, ...] = ()) -> tuple[int, str]:
        """Status and text of one request.

        :param allow: status codes of 400 and more that are an answer too
        :raises ExternalSystemError: no answer, or a server error
        :raises InvalidInputError: the token is missing or wrong, or the request is refused for good
        """
        import requests

        endpoint = self.endpoint
        try:
            answer = requests.request(
                method,
                endpoint.address + path,
                json=body,
                headers=endpoint.headers,
                timeout=self.timeout,
                verify=endpoint.verify,
            )
        except requests.RequestException as error:
            raise _away(endpoint, error) from error
        return _checked(endpoint, answer.status_code, answer.text, allow)

    async def arequest(self, method: str, path: str, body: Any = None, allow: tuple[int, ...] = ()) -> tuple[int, str]:
        """Like :meth:`request`, for an event loop."""
        import aiohttp

        endpoint = await self.aendpoint()
        timeout = aiohttp.ClientTimeout(total=self.timeout)
        try:
            async with aiohttp.ClientSession(headers=endpoint.headers, timeout=timeout) as session:
                async with session.request(method, endpoint.address + path, json=body, ssl=endpoint.ssl) as answer:
                    return _checked(endpoint, answer.status, await answer.text(), allow)
        except (TimeoutError, aiohttp.ClientError) as error:
            raise _away(endpoint, error) from error


def _away(endpoint: Endpoint, error: BaseException) -> ExternalSystemError:
    return ExternalSystemError(
        f"Ray's dashboard at {endpoint.address} does not answer ({type(error).__name__}: {error}); check that the "
        "cluster runs and that the connection's host is its dashboard, usually port 8265"
    )


def _checked(endpoint: Endpoint, code: int, text: str, allow: tuple[int, ...]) -> tuple[int, str]:
    if code < 400 or code in allow:
        return code, text
    if code == 401:
        raise InvalidInputError(
            f"Ray at {endpoint.address} wants a token: put it in the connection's password (HTTP 401)"
        )
    if code == 403:
        raise InvalidInputError(f"Ray at {endpoint.address} refuses the token in the connection's password (HTTP 403)")
    if code < 500:
        raise InvalidInputError(f"Ray at {endpoint.address} refuses the request (HTTP {code}): {text[-2000:]}")
    raise ExternalSystemError(f"Ray at {endpoint.address} answered HTTP {code}: {text[-2000:]}")


def _decoded(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ExternalSystemError(
            f"what answers is no Ray dashboard but perhaps a proxy's page; check the connection's host: {text[:200]!r}"
        ) from error


def _observation(submission_id: str, code: int, text: str) -> Observation:
    if code == 404:
        if "does not exist" not in text:
            raise ExternalSystemError(f"no Ray dashboard answers at this address: HTTP 404 {text[:200]}")
        return Observation("LOST", message=f"The cluster does not know job {submission_id}.")
    job = _decoded(text)
    status = str(job.get("status"))
    message = "" if status in ACTIVE else str(job.get("message") or "")[-2000:]
    return Observation(status, job.get("driver_exit_code"), message)
