"""A Ray cluster's connection and its Jobs REST API, without importing Ray."""

from __future__ import annotations

import asyncio
import random
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError
from airflow_mlops.hooks._ray_api import (
    AccessRefusedError,
    Job,
    Lines,
    away,
    checked,
    decoded,
    job_of,
    jobs_of,
    logs_of,
)
from airflow_mlops.hooks._ray_endpoint import Endpoint, endpoint_of, local_endpoint
from airflow_mlops.training.decide import Observation

if TYPE_CHECKING:
    import aiohttp

__all__ = ["LOG_TAIL", "AccessRefusedError", "Endpoint", "Job", "RayHook", "RayJobsHook", "endpoint_of"]

LOG_TAIL = 200
#: Seconds without a word after which a log socket is opened anew: a peer that is gone may leave it open.
QUIET = 300.0
#: Seconds before a log socket that was lost is opened again; doubled up to 30 s while it fails.
LOG_PAUSE = 0.5
#: Pauses between two tries to submit, seconds.
SUBMIT_PAUSES = (0.5, 2.0, 5.0, 10.0)


class RayHook(BaseHook):
    """What every hook of a Ray cluster shares: its connection.

    Connection: ``host`` is the dashboard's address with scheme and port, ``password`` the cluster's token, extra
    ``verify`` (true, false or a CA file) how its certificate is checked, extra ``serve_url`` the address of Serve's
    HTTP proxy. Instead of ``host``, extra ``proxy_service`` names a Kubernetes service, ``namespace/service[:port]``,
    reached through the API server that extra ``kubernetes_conn_id`` (default ``kubernetes_default``) knows; that
    connection's account needs the verbs get and create on ``services/proxy``. Where the default connection does not
    exist, a Ray on this machine is meant, with the token from ``RAY_AUTH_TOKEN`` of the environment.

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
        endpoint = self._endpoint or self._given()
        if endpoint is None:
            from airflow.providers.common.compat.connection import get_async_connection

            try:
                # In a thread, for behind a proxy it asks for a second connection and reads files.
                endpoint = await asyncio.to_thread(endpoint_of, await get_async_connection(self.ray_conn_id))
            except AirflowNotFoundException:
                endpoint = self._without_connection()
        self._endpoint = endpoint
        return endpoint

    def refresh(self) -> bool:
        """Look the connection up again; whether it has changed, as when a token was rotated."""
        before, self._endpoint = self._endpoint, None
        return before != self.endpoint

    async def arefresh(self) -> bool:
        """Like :meth:`refresh`, for an event loop."""
        before, self._endpoint = self._endpoint, None
        return before != await self.aendpoint()

    def _given(self) -> Endpoint | None:
        return local_endpoint("ray_address", self.address) if self.address else None

    def _without_connection(self) -> Endpoint:
        if self.ray_conn_id != self.default_conn_name:
            raise InvalidInputError(
                f"the connection {self.ray_conn_id!r} does not exist; create one of type ray with the dashboard's "
                "address as host and its token as password"
            )
        return local_endpoint(self.ray_conn_id, "127.0.0.1")


class RayJobsHook(RayHook):
    """Submits, follows and stops jobs on a Ray cluster; see :class:`RayHook` for the connection.

    Used as ``async with hook:`` all its asynchronous requests share one HTTP session. A request that is refused is
    sent once more if the connection's credentials have changed meanwhile.

    :param ray_conn_id: connection of type ``ray``
    :param address: dashboard address to use instead of a connection
    :param timeout: seconds that one request may take
    :param endpoint: what a connection would say, for a caller that has looked it up
    """

    def __init__(
        self,
        ray_conn_id: str = RayHook.default_conn_name,
        address: str | None = None,
        timeout: float = 30.0,
        endpoint: Endpoint | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(ray_conn_id, address, **kwargs)
        self.timeout = timeout
        self._fixed = endpoint
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> RayJobsHook:
        self._session = self._new_session()
        return self

    async def __aexit__(self, *_: object) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @property
    def python(self) -> str:
        """The interpreter of the cluster's jobs: this one if the cluster is on this machine, else its ``python``."""
        return sys.executable if self.endpoint.on_this_machine else "python"

    def submit(
        self,
        submission_id: str,
        entrypoint: str,
        runtime_env: dict[str, Any] | None = None,
        metadata: dict[str, str] | None = None,
        **resources: Any,
    ) -> bool:
        """Submit a job under a name of our choosing; False if there was one of that name already.

        An answer that says nothing (a duplicate is a 500, a timeout may come after success) is followed by a look, and
        that by another try: the name keeps it from becoming a second job.

        :param resources: ``entrypoint_num_cpus``, ``entrypoint_num_gpus``, ``entrypoint_memory``,
            ``entrypoint_resources`` and ``entrypoint_label_selector``
        :raises ExternalSystemError: the job was not accepted and is not there
        """
        nonce = uuid.uuid4().hex
        body = {
            "submission_id": submission_id,
            "entrypoint": entrypoint,
            "runtime_env": runtime_env or {},
            "metadata": {**(metadata or {}), "submission": nonce},
            **resources,
        }
        for pause in (*SUBMIT_PAUSES, None):
            try:
                self.request("POST", "/api/jobs/", body)
                return True
            except ExternalSystemError as error:
                found = self._found(submission_id)
                if found is not None:
                    return found.nonce == nonce
                if pause is None:
                    raise
                self.log.warning("submitting %s again: %s", submission_id, error)
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _found(self, submission_id: str) -> Job | None:
        try:
            job = self.look(submission_id)
        except ExternalSystemError:
            return None
        return None if job.status == "LOST" else job

    def look(self, submission_id: str) -> Job:
        """A job as it is now; its status is LOST if the cluster does not know it."""
        return job_of(submission_id, *self.request("GET", f"/api/jobs/{submission_id}", allow=(404,)))

    async def alook(self, submission_id: str) -> Job:
        """Like :meth:`look`, for an event loop."""
        return job_of(submission_id, *await self.arequest("GET", f"/api/jobs/{submission_id}", allow=(404,)))

    def observe(self, submission_id: str) -> Observation:
        """State of a job; LOST if the cluster does not know it."""
        return self.look(submission_id).observation

    async def aobserve(self, submission_id: str) -> Observation:
        """Like :meth:`observe`, for an event loop."""
        return (await self.alook(submission_id)).observation

    def list_jobs(self) -> dict[str, Job]:
        """All submitted jobs that the cluster remembers, by their names."""
        return jobs_of(self.request("GET", "/api/jobs/")[1])

    async def alist_jobs(self) -> dict[str, Job]:
        """Like :meth:`list_jobs`, for an event loop; one request for any number of jobs."""
        return jobs_of((await self.arequest("GET", "/api/jobs/"))[1])

    def stop(self, submission_id: str) -> None:
        """Ask a job to end; harmless if it has, or is not known."""
        self.request("POST", f"/api/jobs/{submission_id}/stop", allow=(404,))

    async def astop(self, submission_id: str) -> None:
        """Like :meth:`stop`, for an event loop."""
        await self.arequest("POST", f"/api/jobs/{submission_id}/stop", allow=(404,))

    def logs(self, submission_id: str) -> str:
        """All that the job's driver has written; empty if the cluster does not know it."""
        return logs_of(*self.request("GET", f"/api/jobs/{submission_id}/logs", allow=(404,)))

    async def alogs(self, submission_id: str) -> str:
        """Like :meth:`logs`, for an event loop."""
        return logs_of(*await self.arequest("GET", f"/api/jobs/{submission_id}/logs", allow=(404,)))

    async def alog_lines(self, submission_id: str, offset: int = 0) -> AsyncGenerator[tuple[int, str]]:
        """Lines of the driver's log as they are written, each with the byte offset behind it, until the job is over.

        Ray sends the log from its start whenever it is asked, so all before ``offset`` is dropped, and a connection
        that is lost is opened again at the offset reached. A line that lacks its end comes when the job has ended.

        :param offset: where to begin: what an earlier call has returned with its last line, or 0
        :raises AccessRefusedError: the token is missing or wrong
        """
        lines, failures = Lines(offset), 0
        while True:
            lines.replayed()
            try:
                async for text in self._atail(submission_id):
                    failures = 0
                    for entry in lines.feed(text):
                        yield entry
                # The socket closes in the same way at the end of the job and when an agent on the way is gone.
                if (await self.alook(submission_id)).over:
                    break
            except ExternalSystemError as error:
                self.log.info("the log of %s is asked for again: %s", submission_id, error)
            await asyncio.sleep(min(LOG_PAUSE * 2**failures, 30.0) * random.uniform(0.5, 1.0))
            failures = min(failures + 1, 8)
        lines.replayed()
        try:
            for entry in lines.feed(await self.alogs(submission_id)):
                yield entry
        except ExternalSystemError as error:
            self.log.warning("the end of the log of %s may be missing: %s", submission_id, error)
        for entry in lines.rest():
            yield entry

    async def _atail(self, submission_id: str) -> AsyncGenerator[str]:
        import aiohttp

        endpoint = await self.aendpoint()
        url = f"{endpoint.address}/api/jobs/{submission_id}/logs/tail"
        limits = aiohttp.ClientWSTimeout(ws_receive=QUIET, ws_close=1.0)
        try:
            async with self._asession() as session:
                # No heartbeat and no long good-bye: Ray answers neither on this socket.
                async with session.ws_connect(
                    url, headers=endpoint.headers, ssl=endpoint.ssl, timeout=limits, max_msg_size=0
                ) as socket:
                    async for message in socket:
                        if message.type == aiohttp.WSMsgType.TEXT:
                            yield message.data
        except aiohttp.WSServerHandshakeError as error:
            if error.status in (401, 403) and await self.arefresh():
                raise ExternalSystemError("the connection's credentials have changed") from error
            checked(endpoint, error.status, str(error), allow=(404,))
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise away(endpoint, error) from error

    def test_connection(self) -> tuple[bool, str]:
        """Whether a Ray dashboard answers there and accepts the token."""
        try:
            version = decoded(self.request("GET", "/api/version")[1])
        except Exception as error:
            return False, str(error)
        return True, f"Ray {version.get('ray_version', 'of unknown version')} at {self.endpoint.address}"

    def request(self, method: str, path: str, body: Any = None, allow: tuple[int, ...] = ()) -> tuple[int, str]:
        """Status and text of one request.

        :param allow: status codes of 400 and more that are an answer too
        :raises ExternalSystemError: no answer, or a server error
        :raises AccessRefusedError: the token is missing or wrong
        :raises InvalidInputError: the request is refused for good
        """
        try:
            return self._send(method, path, body, allow)
        except AccessRefusedError:
            if not self.refresh():
                raise
            return self._send(method, path, body, allow)

    async def arequest(self, method: str, path: str, body: Any = None, allow: tuple[int, ...] = ()) -> tuple[int, str]:
        """Like :meth:`request`, for an event loop."""
        try:
            return await self._asend(method, path, body, allow)
        except AccessRefusedError:
            if not await self.arefresh():
                raise
            return await self._asend(method, path, body, allow)

    def _send(self, method: str, path: str, body: Any, allow: tuple[int, ...]) -> tuple[int, str]:
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
                cert=endpoint.certificate,
            )
        except requests.RequestException as error:
            raise away(endpoint, error) from error
        return checked(endpoint, answer.status_code, answer.text, allow)

    async def _asend(self, method: str, path: str, body: Any, allow: tuple[int, ...]) -> tuple[int, str]:
        import aiohttp

        endpoint = await self.aendpoint()
        options: Any = {"json": body, "headers": endpoint.headers, "ssl": endpoint.ssl}
        options["timeout"] = aiohttp.ClientTimeout(total=self.timeout)
        try:
            async with self._asession() as session:
                async with session.request(method, endpoint.address + path, **options) as answer:
                    return checked(endpoint, answer.status, await answer.text(), allow)
        except (TimeoutError, aiohttp.ClientError) as error:
            raise away(endpoint, error) from error

    def _new_session(self) -> aiohttp.ClientSession:
        import aiohttp

        # A log socket lives as long as its job: limits in time are set on each request.
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.timeout))

    @asynccontextmanager
    async def _asession(self) -> AsyncIterator[aiohttp.ClientSession]:
        if self._session is not None:
            yield self._session
            return
        async with self._new_session() as session:
            yield session

    def _given(self) -> Endpoint | None:
        return self._fixed or super()._given()
