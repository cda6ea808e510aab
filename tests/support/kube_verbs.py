"""What the stand-in API server does with a request that it has understood: one method per verb."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import random
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import yaml
from aiohttp import web
from support import kube_fields as fields
from support import kube_objects as rules
from support.crd import CrdSchemas
from support.kube_objects import ApiError, timestamp
from support.kube_store import Change, Object, Resource, Store


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


class Verbs:
    """Answers to the verbs of the API.

    :param store: what there is
    :param crds: schemas, None for no checks
    :param bookmark_seconds: how often a watch that asked for bookmarks gets one
    """

    def __init__(self, store: Store, crds: CrdSchemas | None, bookmark_seconds: float) -> None:
        self.store, self.crds, self.bookmark_seconds = store, crds, bookmark_seconds
        self.watches = 0
        self._pages: dict[str, tuple[list[Object], int]] = {}
        self._streams: set[web.StreamResponse] = set()
        self._wake: set[asyncio.Event] = set()

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
        with self.store.lock:
            pod = self.store.get(*call.place)
            # The list itself, so that what was written last is still there when the pod has gone.
            log = self.store.logs.setdefault((namespace, name), [])
            sent = len(log)
            written = log[:sent]
        container = _log_container(pod, call.query.get("container", ""))
        lines = self._log_lines(call, [line for line in written if line[1] == container])
        if call.query.get("follow") != "true":
            return web.Response(text="".join(lines))
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(call.request)
        self._streams.add(response)
        wake = asyncio.Event()
        self._wake.add(wake)
        try:
            for line in lines:
                await response.write(line.encode())
            while True:
                wake.clear()
                # Whether it is over comes before what is written: the last lines may come in between.
                over = self._log_over(call, pod)
                for stamp, where, text in log[sent:]:
                    sent += 1
                    if where == container:
                        await response.write(_log_line(call, stamp, text).encode())
                if over:
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

    def _log_over(self, call: Call, pod: Object) -> bool:
        current = self.store.find(*call.place)
        if current is None or current["metadata"]["uid"] != pod["metadata"]["uid"]:
            return True
        return current.get("status", {}).get("phase") in ("Succeeded", "Failed")

    def _log_lines(self, call: Call, written: list[tuple[float, str, str]]) -> list[str]:
        since = 0.0
        if call.query.get("sinceSeconds"):
            since = self.store.now() - float(call.query["sinceSeconds"])
        elif call.query.get("sinceTime"):
            since = rules.seconds_of(call.query["sinceTime"])
        found = [line for line in written if line[0] >= since]
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
