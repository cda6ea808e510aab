"""The HTTP side of the Kubernetes API server for tests: routes, answers, watches, faults."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import random
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, NamedTuple, Self

import yaml
from aiohttp import web
from support import kube_fields as fields
from support import kube_objects as rules
from support.crd import CrdSchemas
from support.kube_objects import ApiError, timestamp
from support.kube_store import Change, Object, Resource, Store

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


@dataclasses.dataclass
class Call:
    """A request, understood.

    :param verb: as RBAC names it
    :param resource: kind of object
    :param version: API version in the path
    :param namespace: None for all namespaces, empty for cluster-wide objects
    :param name: None for a collection
    :param subresource: status, log, or empty
    """

    verb: str
    resource: Resource
    version: str
    namespace: str | None
    name: str | None
    subresource: str
    request: web.Request

    @property
    def query(self) -> Mapping[str, str]:
        return self.request.query

    @property
    def place(self) -> tuple[Resource, str, str]:
        return self.resource, self.namespace or "", self.name or ""

    @property
    def dry_run(self) -> bool:
        return self.query.get("dryRun") == "All"

    @property
    def manager(self) -> str:
        """Who writes: the field manager, else the client's program."""
        agent = self.request.headers.get("User-Agent", "unknown").split("/")[0]
        return self.query.get("fieldManager") or agent


class KubeServer:
    """Starts, stops, answers; :class:`support.kube_api.KubeApi` is the whole thing."""

    def __init__(
        self,
        crds: CrdSchemas | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        bookmark_seconds: float = 60.0,
    ) -> None:
        self.store = Store(crds, clock)
        self.crds, self.bookmark_seconds = crds, bookmark_seconds
        self.token = f"token-{uuid.uuid4().hex}"
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.watches = 0
        self.role: list[Mapping[str, Any]] | None = None
        self.used: set[tuple[str, str, str]] = set()
        self._forbidden: list[tuple[str, str, str | None]] = []
        self.proxied: Service | None = None
        self._pages: dict[str, tuple[list[Object], int]] = {}
        self._streams: set[web.StreamResponse] = set()
        self._wake: set[asyncio.Event] = set()
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
        if request.headers.get("Authorization") != f"Bearer {self.token}":
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

    # Reading

    async def _get(self, call: Call) -> web.StreamResponse:
        if call.subresource == "log":
            return await self._log(call)
        obj = self._shown(call, self.store.get(*call.place))
        return web.json_response(self._table(call, [obj], obj["metadata"]["resourceVersion"]) or obj)

    async def _list(self, call: Call) -> web.StreamResponse:
        start, matches = 0, self._matcher(call)
        if token := call.query.get("continue"):
            decoded = json.loads(base64.urlsafe_b64decode(token))
            if decoded["page"] not in self._pages:
                raise ApiError(
                    410,
                    "The provided continue parameter is too old to display a consistent list result. You can start "
                    "a new list without the continue parameter.",
                )
            (items, version), start = self._pages[decoded["page"]], decoded["start"]
            page = decoded["page"]
        else:
            items, version = self.store.items(call.resource, call.namespace)
            items, page = [item for item in items if matches(item)], uuid.uuid4().hex
        limit = int(call.query.get("limit") or 0) or len(items)
        meta: dict[str, Any] = {"resourceVersion": str(version)}
        if start + limit < len(items):
            self._pages[page] = items, version
            token_text = json.dumps({"v": "meta.k8s.io/v1", "page": page, "start": start + limit})
            meta["continue"] = base64.urlsafe_b64encode(token_text.encode()).decode()
            if not call.query.get("labelSelector") and not call.query.get("fieldSelector"):
                meta["remainingItemCount"] = len(items) - start - limit
        shown = [self._shown(call, item) for item in items[start : start + limit]]
        if table := self._table(call, shown, str(version)):
            return web.json_response({**table, "metadata": meta})
        if not call.resource.custom:
            shown = [{key: value for key, value in i.items() if key not in ("kind", "apiVersion")} for i in shown]
        body = {"kind": f"{call.resource.kind}List", "apiVersion": call.resource.api_version(call.version)}
        return web.json_response({**body, "metadata": meta, "items": shown})

    def _shown(self, call: Call, obj: Object) -> Object:
        return {**obj, "apiVersion": call.resource.api_version(call.version)}

    def _matcher(self, call: Call) -> Callable[[Mapping[str, Any]], bool]:
        labels = rules.label_selector(call.query.get("labelSelector", ""))
        supported = ("metadata.name", "metadata.namespace", *call.resource.fields)
        fields = rules.field_selector(call.query.get("fieldSelector", ""), supported)
        inside = call.namespace
        return lambda obj: (
            (inside in (None, "") or obj["metadata"].get("namespace") == inside) and labels(obj) and fields(obj)
        )

    def _table(self, call: Call, items: list[Object], version: str, *, headers: bool = True) -> Object | None:
        """The items as a Table, None if the client did not ask for one."""
        if "as=Table" not in call.request.headers.get("Accept", ""):
            return None
        include = call.query.get("includeObject", "Metadata")
        columns = call.resource.columns
        rows = []
        for item in items:
            partial = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": item["metadata"]}
            shown = {"Metadata": partial, "Object": item, "None": None}[include]
            row = rules.cells(item, columns, self.store.now())
            rows.append({"cells": row, **({"object": shown} if shown else {})})
        return {
            "kind": "Table",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": {"resourceVersion": version},
            "columnDefinitions": rules.definitions_of(columns) if headers else None,
            "rows": rows,
        }

    # Watching

    async def _watch(self, call: Call) -> web.StreamResponse:
        matches, version = self._matcher(call), call.query.get("resourceVersion", "")
        first: list[tuple[str, Object]] = []
        initial = call.query.get("sendInitialEvents") == "true"
        if version in ("", "0") or initial:
            items, since = self.store.items(call.resource, call.namespace)
            first = [("ADDED", item) for item in items if matches(item)]
        else:
            since = int(version)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(call.request)
        self._streams.add(response)
        self.watches += 1
        try:
            self.store.refuse_compacted(since)
            headers = True
            async for kind, obj in self._events(call, matches, since, first, initial):
                version = obj["metadata"]["resourceVersion"]
                shown = self._shown(call, obj)
                body = self._table(call, [shown], version, headers=headers) or shown
                headers = False
                await response.write(json.dumps({"type": kind, "object": body}).encode() + b"\n")
        except ApiError as error:
            await response.write(json.dumps({"type": "ERROR", "object": error.body()}).encode() + b"\n")
        except ConnectionError:
            return response
        finally:
            self._streams.discard(response)
            self.watches -= 1
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        return response

    async def _events(
        self,
        call: Call,
        matches: Callable[[Mapping[str, Any]], bool],
        since: int,
        first: list[tuple[str, Object]],
        initial: bool,
    ) -> AsyncIterator[tuple[str, Object]]:
        loop = asyncio.get_running_loop()
        limit = float(call.query.get("timeoutSeconds") or random.uniform(1800, 3600))
        bookmarks = call.query.get("allowWatchBookmarks") == "true"
        deadline, bookmark_at = loop.time() + limit, loop.time() + self.bookmark_seconds
        wake = asyncio.Event()
        self._wake.add(wake)
        try:
            for item in first:
                yield item
            if initial and bookmarks:
                yield "BOOKMARK", self._bookmark(call, since, {"k8s.io/initial-events-end": "true"})
            while (now := loop.time()) < deadline:
                wake.clear()
                changes, since = self.store.changes(call.resource, since)
                for change in changes:
                    if seen := _as_seen(change, matches):
                        yield seen
                if bookmarks and now >= bookmark_at:
                    bookmark_at = now + self.bookmark_seconds
                    yield "BOOKMARK", self._bookmark(call, since)
                until = min(deadline, bookmark_at) if bookmarks else deadline
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(wake.wait(), max(0.0, until - loop.time()))
            if bookmarks:
                yield "BOOKMARK", self._bookmark(call, since)
        finally:
            self._wake.discard(wake)

    @staticmethod
    def _bookmark(call: Call, version: int, annotations: Mapping[str, str] | None = None) -> Object:
        meta: dict[str, Any] = {"resourceVersion": str(version), "creationTimestamp": None}
        if annotations:
            meta["annotations"] = dict(annotations)
        return {"kind": call.resource.kind, "metadata": meta}

    async def _log(self, call: Call) -> web.StreamResponse:
        _, namespace, name = call.place
        pod = self.store.get(*call.place)
        container = _log_container(pod, call.query.get("container", ""))
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        lines = self._log_lines(call, container)
        if call.query.get("follow") != "true":
            return web.Response(text="".join(lines))
        await response.prepare(call.request)
        self._streams.add(response)
        wake, sent = asyncio.Event(), 0
        self._wake.add(wake)
        try:
            for line in lines:
                await response.write(line.encode())
            sent = self._log_length(namespace, name)
            while True:
                wake.clear()
                found = list(self.store.logs.get((namespace, name), ()))
                for stamp, where, text in found[sent:]:
                    if where == container:
                        await response.write(_log_line(call, stamp, text).encode())
                sent = len(found)
                current = self.store.find(*call.place)
                if current is None or current["metadata"]["uid"] != pod["metadata"]["uid"]:
                    break
                if current.get("status", {}).get("phase") in ("Succeeded", "Failed"):
                    break
                await wake.wait()
        except ConnectionError:
            return response
        finally:
            self._wake.discard(wake)
            self._streams.discard(response)
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        return response

    def _log_length(self, namespace: str, name: str) -> int:
        return len(self.store.logs.get((namespace, name), ()))

    def _log_lines(self, call: Call, container: str) -> list[str]:
        _, namespace, name = call.place
        found = [line for line in self.store.logs.get((namespace, name), ()) if line[1] == container]
        since = 0.0
        if call.query.get("sinceSeconds"):
            since = self.store.now() - float(call.query["sinceSeconds"])
        elif call.query.get("sinceTime"):
            since = rules.seconds_of(call.query["sinceTime"])
        found = [line for line in found if line[0] >= since]
        if "tailLines" in call.query:
            tail = int(call.query["tailLines"])
            found = found[-tail:] if tail else []
        return [_log_line(call, stamp, text) for stamp, _, text in found]

    # Writing

    async def _create(self, call: Call) -> web.StreamResponse:
        obj = await _body(call)
        meta = obj.get("metadata") or {}
        if meta.get("namespace") not in (None, "", call.namespace):
            raise ApiError(400, "the namespace of the provided object does not match the namespace sent on the request")
        if meta.get("resourceVersion"):
            raise ApiError(400, "resourceVersion should not be set on objects to be created")
        obj, headers = self._checked(call, obj)
        obj["apiVersion"] = call.resource.api_version()
        namespace = call.namespace or ""
        created = self.store.create(call.resource, namespace, obj, manager=call.manager, dry_run=call.dry_run)
        return web.json_response(self._shown(call, created), status=201, headers=headers)

    async def _update(self, call: Call) -> web.StreamResponse:
        body = await _body(call)
        if call.resource.custom and not (body.get("metadata") or {}).get("resourceVersion"):
            cause = "metadata.resourceVersion: Invalid value: 0: must be specified for an update"
            raise self._invalid(call, call.name or "", [cause])
        return self._change(call, lambda old: body)

    async def _patch(self, call: Call) -> web.StreamResponse:
        kind = call.request.content_type
        text = await call.request.text()
        try:
            patch = yaml.safe_load(text) if kind == "application/apply-patch+yaml" else json.loads(text)
        except (ValueError, yaml.YAMLError) as error:
            raise ApiError(400, f"error decoding patch: {error}") from error
        if kind == "application/merge-patch+json" or (
            kind == "application/strategic-merge-patch+json" and not call.resource.custom
        ):
            return self._change(call, lambda old: rules.merge_patch(old, patch))
        if kind == "application/apply-patch+yaml":
            return self._apply(call, patch)
        if kind == "application/json-patch+json":
            return self._change(call, lambda old: rules.json_patch(old, patch))
        supported = "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml"
        message = (
            "the body of the request was in an unknown format - accepted media types include: "
            f"{supported}; not {kind!r}"
        )
        raise ApiError(415, message)

    def _apply(self, call: Call, config: Object) -> web.StreamResponse:
        """Server-side apply: create what is not there, else merge by owners of fields."""
        manager, force = call.query.get("fieldManager"), call.query.get("force") == "true"
        if not manager:
            message = (
                'PatchOptions.meta.k8s.io "" is invalid: fieldManager: Required value: is required for apply patch'
            )
            raise ApiError(422, message)
        version, now = call.resource.api_version(), self.store.now()
        with self.store.lock:
            if self.store.find(*call.place) is not None:
                return self._change(
                    call, lambda old: fields.apply(old, config, manager, force, version, now), applied=True
                )
            obj, headers = self._checked(call, fields.apply(None, config, manager, force, version, now))
            obj["apiVersion"], obj["metadata"]["name"] = version, call.name
            created = self.store.create(call.resource, call.namespace or "", obj, dry_run=call.dry_run)
        return web.json_response(self._shown(call, created), status=201, headers=headers)

    def _change(self, call: Call, make: Callable[[Object], Object], *, applied: bool = False) -> web.StreamResponse:
        headers: dict[str, str] = {}

        def check(obj: Object) -> Object:
            checked, found = self._checked(call, obj)
            headers.update(found)
            return checked

        status = call.subresource == "status"
        manager = "" if applied else call.manager
        options: Any = {"status": status, "check": check, "manager": manager, "dry_run": call.dry_run}
        changed = self.store.update(*call.place, make, **options)
        return web.json_response(self._shown(call, changed), headers=headers)

    def _checked(self, call: Call, obj: Object) -> tuple[Object, dict[str, str]]:
        """The object as it is stored, and a warning's header; raises 400 and 422."""
        resource, meta = call.resource, obj.get("metadata") or {}
        name = meta.get("name") or meta.get("generateName", "")
        given = obj.get("apiVersion", resource.api_version(call.version)), obj.get("kind", resource.kind)
        if given not in {(resource.api_version(version), resource.kind) for version in resource.versions}:
            message = (
                f"{obj.get('kind')} in version {obj.get('apiVersion')!r} cannot be handled as a {resource.kind}: "
                f"no kind {obj.get('kind')!r} is registered for version {obj.get('apiVersion')!r}"
            )
            raise ApiError(400, message)
        if not name:
            raise self._invalid(call, "", ["metadata.name: Required value: name or generateName is required"])
        if self.crds is None or not resource.custom:
            return obj, {}
        errors = self.crds.errors(obj, strict=True)
        unknown = [error for error in errors if error.startswith("unknown field")]
        validation = call.query.get("fieldValidation", "Warn")
        if unknown and validation == "Strict":
            message = (
                f'{resource.kind} in version "{call.version}" cannot be handled as a {resource.kind}: '
                f"strict decoding error: {', '.join(unknown)}"
            )
            raise ApiError(400, message)
        if wrong := [error for error in errors if error not in unknown]:
            raise self._invalid(call, name, wrong)
        headers = {"Warning": ", ".join(f'299 - "{text}"' for text in unknown).replace('""', '"')}
        stored = self.crds.with_defaults(self.crds.prune(obj))
        return stored, headers if unknown and validation == "Warn" else {}

    @staticmethod
    def _invalid(call: Call, name: str, errors: list[str]) -> ApiError:
        resource = call.resource
        title = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
        text = errors[0] if len(errors) == 1 else f"[{', '.join(errors)}]"
        causes = []
        for error in errors:
            field, _, message = error.partition(": ")
            reason = "FieldValueRequired" if message.startswith("Required") else "FieldValueInvalid"
            causes.append({"reason": reason, "message": message, "field": field})
        details = {"name": name, "group": resource.group, "kind": resource.kind, "causes": causes}
        return ApiError(422, f'{title} "{name}" is invalid: {text}', details=details)

    async def _delete(self, call: Call) -> web.StreamResponse:
        obj, gone = self.store.delete(*call.place, **await _delete_options(call))
        if not gone or call.resource.plural in ("pods",):
            return web.json_response(self._shown(call, obj))
        details = {"name": call.name, "group": call.resource.group, "kind": call.resource.plural}
        details = {key: value for key, value in details.items() if value} | {"uid": obj["metadata"]["uid"]}
        body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
        return web.json_response(body)

    async def _deletecollection(self, call: Call) -> web.StreamResponse:
        options, matches = await _delete_options(call), self._matcher(call)
        items, version = self.store.items(call.resource, call.namespace)
        found = [item for item in items if matches(item)]
        for item in found:
            with contextlib.suppress(ApiError):
                self.store.delete(
                    call.resource, item["metadata"].get("namespace", ""), item["metadata"]["name"], **options
                )
        body = {"kind": f"{call.resource.kind}List", "apiVersion": call.resource.api_version(call.version)}
        return web.json_response({**body, "metadata": {"resourceVersion": str(version)}, "items": found})


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


def is_watch(query: Mapping[str, str]) -> bool:
    return query.get("watch") in ("true", "1", "True")


def _as_seen(change: Change, matches: Callable[[Mapping[str, Any]], bool]) -> tuple[str, Object] | None:
    """A change as a watch with a selector sees it: an object that no longer matches is deleted."""
    before, now = bool(change.old and matches(change.old)), change.type != "DELETED" and matches(change.new)
    if not before and not now:
        return None
    kind = "MODIFIED" if before and now else "ADDED" if now else "DELETED"
    if kind == "DELETED" and change.type != "DELETED" and change.old:
        meta = {**change.old["metadata"], "resourceVersion": str(change.version)}
        return kind, {**change.old, "metadata": meta}
    return kind, change.new


def _discovered(item: Resource) -> list[dict[str, Any]]:
    verbs = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
    base = {"singularName": item.kind.lower(), "namespaced": item.namespaced, "kind": item.kind}
    entries = [{"name": item.plural, **base, "verbs": verbs}]
    if item.status:
        entries.append({"name": f"{item.plural}/status", **base, "verbs": ["get", "patch", "update"]})
    if item.plural == "pods":
        entries.append({"name": "pods/log", **base, "verbs": ["get"]})
    return entries


async def _body(call: Call) -> Object:
    try:
        body = yaml.safe_load(await call.request.text()) if "yaml" in call.request.content_type else None
        body = body if body is not None else await call.request.json()
    except (ValueError, yaml.YAMLError) as error:
        raise ApiError(400, f"the object provided is unrecognized: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the object provided is unrecognized (must be of type Object)")
    return body


async def _delete_options(call: Call) -> dict[str, Any]:
    text = await call.request.text()
    body = json.loads(text) if text else {}
    grace = body.get("gracePeriodSeconds", call.query.get("gracePeriodSeconds"))
    policy = body.get("propagationPolicy") or call.query.get("propagationPolicy") or "Background"
    return {
        "preconditions": body.get("preconditions"),
        "grace": None if grace is None else int(grace),
        "policy": policy,
        "dry_run": call.dry_run or "All" in (body.get("dryRun") or ()),
    }


def containers(pod: Mapping[str, Any]) -> list[str]:
    return [item["name"] for item in pod.get("spec", {}).get("containers", ())] or ["main"]


def _log_container(pod: Mapping[str, Any], wanted: str) -> str:
    name, names = pod["metadata"]["name"], containers(pod)
    init = [item["name"] for item in pod.get("spec", {}).get("initContainers", ())]
    if wanted and wanted not in names + init:
        raise ApiError(400, f"container {wanted} is not valid for pod {name}")
    if not wanted and len(names) > 1:
        raise ApiError(400, f"a container name must be specified for pod {name}, choose one of: [{' '.join(names)}]")
    container = wanted or names[0]
    for state in pod.get("status", {}).get("containerStatuses", ()):
        waiting = state.get("state", {}).get("waiting")
        if state["name"] == container and waiting and not state.get("lastState"):
            reason = waiting.get("reason", "ContainerCreating")
            message = f'container "{container}" in pod "{name}" is waiting to start: {reason}'
            raise ApiError(400, message)
    return container


def _log_line(call: Call, stamp: float, text: str) -> str:
    prefix = f"{timestamp(stamp, micro=True)} " if call.query.get("timestamps") == "true" else ""
    return f"{prefix}{text}\n"
