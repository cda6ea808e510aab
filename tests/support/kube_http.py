"""The HTTP side of the Kubernetes API server for tests: routes, answers, watches, faults."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Self

from aiohttp import web
from support.crd import CrdSchemas
from support.kube_objects import ApiError
from support.kube_store import Resource, Store
from support.kube_verbs import Call, Verbs, is_watch

USER = "system:serviceaccount:default:tests"


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next requests that match.

    :param match: called with method and path
    :param status: HTTP status of the answer; None with ``drop``: the connection is cut
    :param when: ``before``: the request has no effect; ``after``: it takes effect, only its answer is lost
    :param times: how many requests
    :param drop: cut the connection instead of answering
    :param retry_after: seconds, sent as ``Retry-After``
    :param delay: seconds before the answer
    :param watch: only watches (True), only other requests (False)
    """

    match: Callable[[str, str], bool] = lambda method, path: True
    status: int | None = None
    when: str = "before"
    times: int = 1
    drop: bool = False
    retry_after: float | None = None
    delay: float = 0.0
    watch: bool | None = None


class Request(NamedTuple):
    """A request as it came in."""

    method: str
    path: str
    query: dict[str, str]


class ProxyRequest(NamedTuple):
    """A request that the API server passes on to a service; its own Authorization header is not among the headers."""

    namespace: str
    service: str
    port: str
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


#: Answers a proxied request with status and body (text, or what becomes JSON); None: the service has no endpoints.
Service = Callable[[ProxyRequest], "tuple[int, Any] | None"]


class KubeServer(Verbs):
    """Starts, stops, answers; :class:`support.kube_api.KubeApi` is the whole thing."""

    def __init__(
        self,
        crds: CrdSchemas | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        bookmark_seconds: float = 60.0,
    ) -> None:
        super().__init__(Store(crds, clock), crds, bookmark_seconds)
        self.token: str | None = f"token-{uuid.uuid4().hex}"
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.role: list[Mapping[str, Any]] | None = None
        self.used: set[tuple[str, str, str]] = set()
        self._forbidden: list[tuple[str, str, str | None]] = []
        self.proxied: Service | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._port = 0
        self.store.listeners.append(self._notify)

    # Life

    def start(self) -> Self:
        """Serve on a free port of the loopback address."""
        started: list[Any] = []
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready, started), name="kube-api", daemon=True)
        self._thread.start()
        if not ready.wait(20) or isinstance(started[0], BaseException):
            raise RuntimeError(f"the API server did not start: {started}")
        self._port = started[0]
        return self

    def stop(self) -> None:
        """Close all connections and the port."""
        loop, thread = self._loop, self._thread
        if loop and thread and thread.is_alive():
            loop.call_soon_threadsafe(self._stopping.set)
            thread.join(20)
        self._loop = self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *args: object) -> None:
        self.stop()

    def _run(self, ready: threading.Event, started: list[Any]) -> None:
        async def serve() -> None:
            self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
            app = web.Application(client_max_size=16 * 2**20)
            app.router.add_route("*", "/{path:.*}", self._handle)
            runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            started.append(runner.addresses[0][1])
            ready.set()
            await self._stopping.wait()
            self.drop_watches()
            await runner.cleanup()

        try:
            asyncio.run(serve())
        except BaseException as error:
            started.append(error)
            ready.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def drop_watches(self) -> None:
        """Cut the connections of all open watches and log streams."""
        loop = self._loop
        if loop is None:
            return

        def cut() -> None:
            for stream in list(self._streams):
                request = stream._req
                if request is not None and request.transport is not None:
                    request.transport.abort()

        if threading.current_thread() is self._thread:
            cut()
        else:
            loop.call_soon_threadsafe(cut)

    def _notify(self) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._wake_all)

    def _wake_all(self) -> None:
        for event in self._wake:
            event.set()

    # Requests

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(Request(request.method, request.path, dict(request.query)))
        fault = self._fault(request)
        if fault and fault.delay:
            await asyncio.sleep(fault.delay)
        if fault and fault.when == "before" and (fault.drop or fault.status):
            return self._broken(request, fault)
        try:
            answer = await self._answer(request)
        except ApiError as error:
            answer = _refusal(error)
        if fault and fault.when == "after" and (fault.drop or fault.status):
            return self._broken(request, fault)
        return answer

    def _fault(self, request: web.Request) -> Fault | None:
        for fault in list(self.faults):
            if fault.watch is not None and fault.watch != is_watch(request.query):
                continue
            if fault.match(request.method, request.path):
                fault.times -= 1
                if fault.times <= 0:
                    self.faults.remove(fault)
                return fault
        return None

    @staticmethod
    def _broken(request: web.Request, fault: Fault) -> web.StreamResponse:
        if fault.drop or fault.status is None:
            if request.transport is not None:
                request.transport.abort()
            return web.Response()
        if fault.status == 410 and is_watch(request.query):
            error = ApiError(410, "too old resource version: 1 (2)")
            return web.json_response({"type": "ERROR", "object": error.body()})
        return _refusal(ApiError(fault.status, "an injected fault", retry_after=fault.retry_after))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            raise ApiError(401, "Unauthorized")
        parts = [part for part in request.path.split("/") if part]
        if (found := self._discovery(parts)) is not None:
            return web.json_response(found)
        if parts[:3:2] == ["api", "namespaces"] and parts[4:5] == ["services"] and parts[6:7] == ["proxy"]:
            return await self._proxy(request, parts)
        call = self._understand(request, parts)
        self._authorize(call)
        return await getattr(self, f"_{call.verb}")(call)

    async def _proxy(self, request: web.Request, parts: list[str]) -> web.StreamResponse:
        service, _, port = parts[5].partition(":")
        verbs = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
        resource = self.store.named("services")
        self._authorize(Call(verbs[request.method], resource, "v1", parts[3], service, "proxy", request))
        path = request.path.split("/proxy", 1)[1] or "/"
        headers = {key: value for key, value in request.headers.items() if key.lower() != "authorization"}
        sent = ProxyRequest(
            parts[3], service, port, request.method, path, dict(request.query), headers, await request.read()
        )
        # A service may block, so it is not asked in the event loop.
        answer = await asyncio.to_thread(self.proxied, sent) if self.proxied else None
        if answer is None:
            raise ApiError(503, f'no endpoints available for service "{parts[5]}"')
        status, body = answer
        if isinstance(body, str):
            return web.Response(status=status, text=body)
        return web.json_response(body, status=status)

    def _discovery(self, parts: list[str]) -> dict[str, Any] | None:
        match parts:
            case ["version"]:
                return {"major": "1", "minor": "36", "gitVersion": "v1.36.0", "platform": "stand-in"}
            case ["api"]:
                return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
            case ["apis"]:
                versions: dict[str, dict[str, None]] = {}
                for item in self.store.resources():
                    if item.group:
                        versions.setdefault(item.group, {}).update(dict.fromkeys(item.versions))
                groups = []
                for group, found in versions.items():
                    listed = [{"groupVersion": f"{group}/{version}", "version": version} for version in found]
                    groups.append({"name": group, "versions": listed, "preferredVersion": listed[0]})
                return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
            case ["api", version] | ["apis", _, version]:
                group = parts[1] if len(parts) == 3 else ""
                served = [i for i in self.store.resources() if i.group == group and version in i.versions]
                listed = [entry for item in served for entry in _discovered(item)]
                group_version = f"{group}/{version}".lstrip("/")
                return (
                    {"kind": "APIResourceList", "groupVersion": group_version, "resources": listed} if served else None
                )
        return None

    def _understand(self, request: web.Request, parts: list[str]) -> Call:
        group, version, rest = "", "", []
        if parts[:1] == ["api"] and len(parts) > 2:
            version, rest = parts[1], parts[2:]
        elif parts[:1] == ["apis"] and len(parts) > 3:
            group, version, rest = parts[1], parts[2], parts[3:]
        namespace: str | None = None
        if rest[:1] == ["namespaces"] and len(rest) > 2 and rest[2] != "status":
            namespace, rest = rest[1], rest[2:]
        resource = self.store.resource(group, rest[0]) if rest else None
        if resource is None or version not in resource.versions or rest[0] != resource.plural or len(rest) > 3:
            raise _NoSuchPath
        name, subresource = (*rest[1:], None, "")[:2] if len(rest) < 3 else (rest[1], rest[2])
        subresource = subresource or ""
        known = {"", "log"} if resource.plural == "pods" else {""}
        if subresource not in known | ({"status"} if resource.status else set()):
            raise _NoSuchPath
        if not resource.namespaced:
            namespace = ""
        elif namespace is None and (name or request.method == "POST"):
            raise _NoSuchPath
        verbs = {"GET": "get" if name else "list", "POST": "create", "PUT": "update", "PATCH": "patch"}
        verbs["DELETE"] = "delete" if name else "deletecollection"
        verb = verbs.get(request.method)
        if verb is None or (verb in ("update", "patch") and not name) or (verb == "create" and name):
            raise ApiError(405, "the server does not allow this method on the requested resource")
        if verb == "list" and is_watch(request.query):
            verb = "watch"
        return Call(verb, resource, version, namespace, name, subresource, request)

    def _authorize(self, call: Call) -> None:
        name = f"{call.resource.plural}/{call.subresource}" if call.subresource else call.resource.plural
        self.used.add((call.resource.group, name, call.verb))
        # Nobody else has any right here.
        user = call.request.headers.get("Impersonate-User")
        if user or not _granted(self.role, call.resource.group, name, call.verb):
            raise self._forbid_error(call, name, user or USER)
        for verb, resource, namespace in self._forbidden:
            if verb in ("*", call.verb) and resource in ("*", name) and namespace in (None, call.namespace):
                raise self._forbid_error(call, name, USER)

    @staticmethod
    def _forbid_error(call: Call, name: str, user: str) -> ApiError:
        title = call.resource.title + (f' "{call.name}"' if call.name else "")
        where = f'in the namespace "{call.namespace}"' if call.namespace else "at the cluster scope"
        message = (
            f'{title} is forbidden: User "{user}" cannot {call.verb} resource "{name}" '
            f'in API group "{call.resource.group}" {where}'
        )
        details = {"name": call.name, "group": call.resource.group, "kind": call.resource.plural}
        return ApiError(403, message, details={key: value for key, value in details.items() if value})


# A path that no resource has is answered in plain text, not with a Status.
_NoSuchPath = ApiError(404, "404 page not found")


def _refusal(error: ApiError) -> web.Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, round(error.retry_after)))}
    if error is _NoSuchPath:
        return web.Response(status=404, text=f"{error.message}\n")
    return web.json_response(error.body(), status=error.status, headers=headers)


def _granted(role: Iterable[Mapping[str, Any]] | None, group: str, resource: str, verb: str) -> bool:
    """Whether a Role's rules allow a request; no role allows all."""

    def holds(wanted: str, given: Iterable[str]) -> bool:
        return "*" in given or wanted in given

    return role is None or any(
        holds(group, rule["apiGroups"]) and holds(resource, rule["resources"]) and holds(verb, rule["verbs"])
        for rule in role
    )


def _discovered(item: Resource) -> list[dict[str, Any]]:
    verbs = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
    base = {"singularName": item.kind.lower(), "namespaced": item.namespaced, "kind": item.kind}
    entries = [{"name": item.plural, **base, "verbs": verbs}]
    if item.status:
        entries.append({"name": f"{item.plural}/status", **base, "verbs": ["get", "patch", "update"]})
    if item.plural == "pods":
        entries.append({"name": "pods/log", **base, "verbs": ["get"]})
    return entries
