"""A Kubernetes connection that requests go through, from a task or from an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

# The stock hook imports the Kubernetes clients, so Dag files and operators import this module only where they act.
from airflow.providers.cncf.kubernetes.hooks.kubernetes import AsyncKubernetesHook, KubernetesHook  # noqa: TID253
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.hooks import _kubernetes_transport as transport
from airflow_mlops.hooks._kubernetes import Answer, Call, Pause, Steps, Unanswered, checked

if TYPE_CHECKING:
    from kubernetes.client import ApiClient
    from kubernetes_asyncio.client import ApiClient as AsyncApiClient

_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_SWITCHES = ("in_cluster", "disable_verify_ssl", "disable_tcp_keepalive")


class KubernetesConnection(KubernetesHook):
    """What :class:`airflow_mlops.hooks.kubernetes.CustomResourceHook` stands on: connection, namespace, requests."""

    conn_name_attr = "conn_id"
    default_conn_name = "kubernetes_default"
    conn_type = "kuberay"
    hook_name = "KubeRay"

    def __init__(
        self,
        conn_id: str = default_conn_name,
        *,
        namespace: str | None = None,
        in_cluster: bool | None = None,
        cluster_context: str | None = None,
        config_file: str | None = None,
        patience: float = 30.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            conn_id, in_cluster=in_cluster, cluster_context=cluster_context, config_file=config_file, **kwargs
        )
        self.namespace, self.patience = namespace, patience
        self._opened: AsyncApiClient | None = None
        self._stack: AsyncExitStack | None = None
        self._renewing = asyncio.Lock()

    @cached_property
    def conn_extras(self) -> dict[str, Any]:
        """Fields of the connection; switches written as text are switches.

        :raises InvalidInputError: the connection does not exist
        """
        try:
            return _fields(self.get_connection(str(self.conn_id)).extra_dejson)
        except AirflowNotFoundException as error:
            raise self._no_connection() from error

    async def _load_extras(self) -> None:
        if "conn_extras" in self.__dict__:
            return
        from airflow.providers.common.compat.connection import get_async_connection

        try:
            extras = (await get_async_connection(str(self.conn_id))).extra_dejson
        except AirflowNotFoundException as error:
            if self.conn_id != self.default_conn_name:
                raise self._no_connection() from error
            extras = {}
        self.__dict__["conn_extras"] = _fields(extras)

    def _no_connection(self) -> InvalidInputError:
        return InvalidInputError(
            f"the connection {self.conn_id!r} does not exist; create one of type kuberay or kubernetes, or name "
            f"{self.default_conn_name!r}, which stands for the pod's service account or the default kubeconfig"
        )

    def namespace_of(self, namespace: str | None = None) -> str:
        """The namespace that a call works in."""
        chosen = namespace or self.namespace or self._get_field("namespace")
        return str(chosen or self._account_namespace() or self.DEFAULT_NAMESPACE)

    async def anamespace_of(self, namespace: str | None = None) -> str:
        """Like :meth:`namespace_of`, for an event loop."""
        await self._load_extras()
        return self.namespace_of(namespace)

    @property
    def _unconfigured(self) -> bool:
        """Whether neither the hook nor its connection names a kubeconfig."""
        fields = (self._get_field(name) for name in ("kube_config_path", "kube_config"))
        return not (self.config_file or self.config_dict or any(fields))

    def _account_namespace(self) -> str | None:
        if not self._unconfigured or not _ACCOUNT_NAMESPACE.exists():
            return None
        return _ACCOUNT_NAMESPACE.read_text().strip()

    async def __aenter__(self) -> Self:
        self._stack = AsyncExitStack()
        self._opened = await self._stack.enter_async_context(self._aclient())
        return self

    async def __aexit__(self, *_: object) -> None:
        stack, self._stack, self._opened = self._stack, None, None
        if stack is not None:
            await stack.aclose()

    @asynccontextmanager
    async def _aclient(self) -> AsyncIterator[AsyncApiClient]:
        if self._opened is not None:
            yield self._opened
            return
        async with self._anew() as client:
            yield client

    @asynccontextmanager
    async def _anew(self) -> AsyncIterator[AsyncApiClient]:
        await self._load_extras()
        # The stock asynchronous hook takes none of these from its arguments, nor a pod's account by itself.
        extras = {**self.conn_extras, **({"kube_config_path": self.config_file} if self.config_file else {})}
        unverified = self._coalesce_param(self.disable_verify_ssl, self._get_field("disable_verify_ssl"))
        stock = AsyncKubernetesHook(
            conn_id=self.conn_id,
            connection_extras=extras,
            config_dict=self.config_dict,
            client_configuration=_unverified() if unverified else None,
            in_cluster=self.in_cluster or (_in_pod() if self._unconfigured else None),
            cluster_context=self.cluster_context,
        )
        async with AsyncExitStack() as stack:
            try:
                client = await stack.enter_async_context(stock.get_conn())
            except Exception as error:
                raise self._unusable(error) from error
            yield client

    async def _arenew(self, refused: AsyncApiClient) -> None:
        """Load the credentials of the shared connection anew, once for all whose requests were refused with them."""
        if self._opened is not refused:
            return
        keys = dict(refused.configuration.api_key)
        async with self._renewing:
            if self._opened is not refused or keys != refused.configuration.api_key:
                return
            # The connection stays: others are in the middle of a request.
            async with self._anew() as client:
                refused.configuration.api_key = client.configuration.api_key
                refused.configuration.refresh_api_key_hook = client.configuration.refresh_api_key_hook

    def _unusable(self, error: Exception) -> InvalidInputError:
        return InvalidInputError(
            f"connection {self.conn_id!r} leads to no Kubernetes cluster ({type(error).__name__}: {error}); set one of "
            "in_cluster, kube_config_path and kube_config, or run where a service account or a default kubeconfig is"
        )

    # Requests

    def _client(self) -> ApiClient:
        try:
            return self.api_client
        except InvalidInputError:
            raise
        except Exception as error:
            raise self._unusable(error) from error

    def _send(self, call: Call) -> Answer:
        answer = transport.send(self._client(), call)
        if answer.status == 401:
            # A token that has expired since is loaded anew; one that is wrong is refused again.
            self.__dict__.pop("api_client", None)
            answer = transport.send(self._client(), call)
        return answer

    async def _asend(self, call: Call) -> Answer:
        for last in (False, True):
            async with self._aclient() as client:
                answer = await transport.asend(client, call)
            if answer.status != 401 or last:
                break
            await self._arenew(client)
        return answer

    def _run(self, steps: Steps) -> Any:
        """Take the steps of an operation, and return its result."""
        proceed: Callable[[], Any] = partial(next, steps)
        while True:
            try:
                step = proceed()
            except StopIteration as end:
                return end.value
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                proceed = partial(steps.send, None)
                continue
            try:
                proceed = partial(steps.send, self._send(step))
            except Unanswered as error:
                proceed = partial(steps.throw, error)

    async def _arun(self, steps: Steps) -> Any:
        """Like :meth:`_run`, for an event loop."""
        proceed: Callable[[], Any] = partial(next, steps)
        while True:
            try:
                step = proceed()
            except StopIteration as end:
                return end.value
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                proceed = partial(steps.send, None)
                continue
            try:
                proceed = partial(steps.send, await self._asend(step))
            except Unanswered as error:
                proceed = partial(steps.throw, error)

    def _stream(self, call: Call, silence: float) -> Iterator[bytes]:
        """The body of an answer as it comes.

        :param silence: seconds without a byte after which the connection is given up
        """
        with transport.stream(self._client(), call, silence) as reply:
            if reply.status >= 400:
                if reply.status == 401:
                    self.__dict__.pop("api_client", None)
                text = b"".join(reply.stream()).decode("utf-8", errors="replace")
                checked(call, Answer(reply.status, text, reply.headers.get("Retry-After")))
            yield from reply.stream()

    async def _astream(
        self,
        call: Call,
        silence: float,
        allow: Callable[[Answer], bool] = lambda _: False,
        opened: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[bytes, None]:
        """Like :meth:`_stream`, for an event loop.

        :param opened: called when the server has begun to answer
        :param allow: answers of 400 and more that are the same as an empty body
        """
        async with self._aclient() as client:
            async with transport.astream(client, call, silence) as reply:
                if reply.status < 400:
                    opened()
                    async for chunk in reply.content.iter_any():
                        yield chunk
                    return
                text = (await reply.read()).decode("utf-8", errors="replace")
        answer = Answer(reply.status, text, reply.headers.get("Retry-After"))
        if answer.status == 401:
            await self._arenew(client)
        if not allow(answer):
            checked(call, answer)


def _fields(extras: dict[str, Any]) -> dict[str, Any]:
    # A connection given as a URI has only text, and "false" must not switch something on.
    found = dict(extras)
    for name in (*_SWITCHES, *(f"extra__kubernetes__{switch}" for switch in _SWITCHES)):
        if isinstance(found.get(name), str):
            found[name] = found[name].strip().lower() in ("true", "1", "yes")
    return found


def _in_pod() -> bool:
    """Whether there is a service account to use."""
    from kubernetes_asyncio import client, config

    try:
        config.load_incluster_config(client_configuration=client.Configuration())
    except config.ConfigException:
        return False
    return True


def _unverified() -> Any:
    """A configuration in which no kubeconfig can switch the check of certificates on."""
    from kubernetes_asyncio.client import Configuration

    class Unverified(Configuration):
        verify_ssl = property(lambda _: False, lambda *_: None)

    return Unverified()
