"""Custom resources of Kubernetes, and the pods, events and logs that belong to them; for tasks and for triggers."""

from __future__ import annotations

import asyncio
import builtins
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError, MlopsError
from airflow_mlops.hooks import _kubernetes as api
from airflow_mlops.hooks._kubernetes import (
    EVENT,
    NEEDED_ACCESS,
    POD,
    PODGROUP,
    RAYCLUSTER,
    RAYJOB,
    WORKLOAD,
    AlreadyExists,
    HistoryGone,
    Object,
    Objects,
    Resource,
)
from airflow_mlops.hooks._kubernetes_connection import KubernetesConnection
from airflow_mlops.hooks._pod_log import LogCursor, LogLine, LogReader

__all__ = [
    "EVENT",
    "NEEDED_ACCESS",
    "POD",
    "PODGROUP",
    "RAYCLUSTER",
    "RAYJOB",
    "WORKLOAD",
    "AlreadyExists",
    "CustomResourceHook",
    "HistoryGone",
    "LogLine",
    "Resource",
]

# Bookmarks come about every minute; a watch that is silent for longer may hang on a dead connection.
_SILENCE = 150.0
_LOG_SILENCE = 300.0


class CustomResourceHook(KubernetesConnection):
    """Creates, reads, changes, watches and deletes objects of Kubernetes; each call also as ``a...`` for an event loop.

    Connection: of type ``kuberay`` or ``kubernetes``, with the fields of the latter; without any, the pod's service
    account, else the default kubeconfig. The namespace of a call is the one given to it, else the hook's, else the
    connection's, else that of the service account, else ``default``.

    Calls are repeated while the server is busy (429, 5xx) or away, honouring ``Retry-After``, and raise
    :class:`~airflow_mlops.exceptions.ExternalSystemError` when ``patience`` ends. What no retry mends (401, 403, 422,
    an unknown kind or field) is :class:`~airflow_mlops.exceptions.InvalidInputError`; a lost race (409) is
    :class:`~airflow_mlops.exceptions.ConcurrentChangeError`. Credentials that expired are loaded anew once.

    ``async with hook:`` keeps one connection for all asynchronous calls inside, from any number of tasks.

    :param conn_id: connection
    :param namespace: namespace to work in
    :param in_cluster: use the pod's service account
    :param cluster_context: context of the kubeconfig
    :param config_file: path of a kubeconfig
    :param patience: seconds for which a call is repeated
    """

    def create(self, resource: Resource, body: Object, *, namespace: str | None = None) -> Object:
        """Create an object; unknown fields are refused.

        After an answer that said nothing (a time-out, a 5xx, a cut connection) an object with our labels and
        annotations is ours, and returned.

        :param body: manifest with ``metadata.name``
        :raises AlreadyExists: an object of that name is there that this call did not make
        :raises InvalidInputError: the manifest, the kind or the account is refused
        """
        return self._run(api.create(resource, body, self.namespace_of(namespace), self.patience))

    async def acreate(self, resource: Resource, body: Object, *, namespace: str | None = None) -> Object:
        """Like :meth:`create`, for an event loop."""
        return await self._arun(api.create(resource, body, await self.anamespace_of(namespace), self.patience))

    def get(self, resource: Resource, name: str, *, namespace: str | None = None) -> Object | None:
        """The object, None if there is none."""
        return self._run(api.get(resource, name, self.namespace_of(namespace), self.patience))

    async def aget(self, resource: Resource, name: str, *, namespace: str | None = None) -> Object | None:
        """Like :meth:`get`, for an event loop."""
        return await self._arun(api.get(resource, name, await self.anamespace_of(namespace), self.patience))

    def list(
        self, resource: Resource, selector: str | Mapping[str, str] | None = None, *, namespace: str | None = None
    ) -> tuple[Objects, str]:
        """The objects with these labels, and the version from which :meth:`watch` goes on.

        :param selector: text of a label selector, or labels with their values
        """
        return self._run(api.list_all(resource, self.namespace_of(namespace), _labels(selector), self.patience))

    async def alist(
        self, resource: Resource, selector: str | Mapping[str, str] | None = None, *, namespace: str | None = None
    ) -> tuple[Objects, str]:
        """Like :meth:`list`, for an event loop."""
        inside = await self.anamespace_of(namespace)
        return await self._arun(api.list_all(resource, inside, _labels(selector), self.patience))

    async def atable_page(
        self,
        resource: Resource,
        selector: str | Mapping[str, str] | None = None,
        *,
        name: str | None = None,
        proceed: str | None = None,
        namespace: str | None = None,
    ) -> Object:
        """One page of a list as a Table of printed columns and metadata; asked once, for callers that wait themselves.

        :param name: only the object of this name
        :param proceed: ``metadata.continue`` of the page before
        :raises HistoryGone: the list is too old to go on with: start again
        """
        query = {"includeObject": "Metadata", **_labels(selector)}
        if name:
            query["fieldSelector"] = f"metadata.name={name}"
        call = api.list_page(resource, await self.anamespace_of(namespace), query, proceed, api.TABLE)
        return api.checked(call, await self._asend(call)).data

    def patch(
        self,
        resource: Resource,
        name: str,
        change: Object,
        *,
        resource_version: str | None = None,
        subresource: str | None = None,
        namespace: str | None = None,
    ) -> Object:
        """Lay a JSON merge patch over an object.

        :param resource_version: change only this version
        :raises ConcurrentChangeError: it is another version by now, or gone
        """
        inside = self.namespace_of(namespace)
        return self._run(api.patch(resource, name, change, inside, self.patience, resource_version, subresource))

    async def apatch(
        self,
        resource: Resource,
        name: str,
        change: Object,
        *,
        resource_version: str | None = None,
        subresource: str | None = None,
        namespace: str | None = None,
    ) -> Object:
        """Like :meth:`patch`, for an event loop."""
        inside = await self.anamespace_of(namespace)
        return await self._arun(api.patch(resource, name, change, inside, self.patience, resource_version, subresource))

    def apply(
        self, resource: Resource, body: Object, field_manager: str, *, force: bool = False, namespace: str | None = None
    ) -> Object:
        """Server-side apply: create the object, or change the fields that ``body`` names.

        :param force: take fields over from other managers
        :raises ConcurrentChangeError: another manager owns one of the fields
        """
        inside = self.namespace_of(namespace)
        return self._run(api.apply(resource, body, field_manager, inside, self.patience, force))

    async def aapply(
        self, resource: Resource, body: Object, field_manager: str, *, force: bool = False, namespace: str | None = None
    ) -> Object:
        """Like :meth:`apply`, for an event loop."""
        inside = await self.anamespace_of(namespace)
        return await self._arun(api.apply(resource, body, field_manager, inside, self.patience, force))

    def delete(
        self,
        resource: Resource,
        name: str,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
        grace: int | None = None,
        namespace: str | None = None,
    ) -> bool:
        """Delete an object and, in the background, what it owns; True also if it is on its way, False if it is gone.

        :param uid: delete only the object with this uid
        :param resource_version: delete only this version
        :param grace: seconds of ``gracePeriodSeconds``
        :raises ConcurrentChangeError: it is another object or version by now
        """
        inside = self.namespace_of(namespace)
        return self._run(api.delete(resource, name, inside, self.patience, uid, resource_version, grace))

    async def adelete(
        self,
        resource: Resource,
        name: str,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
        grace: int | None = None,
        namespace: str | None = None,
    ) -> bool:
        """Like :meth:`delete`, for an event loop."""
        inside = await self.anamespace_of(namespace)
        return await self._arun(api.delete(resource, name, inside, self.patience, uid, resource_version, grace))

    # What belongs to them

    def pods(self, selector: str | Mapping[str, str], *, namespace: str | None = None) -> Objects:
        """The pods with these labels."""
        return self.list(POD, selector, namespace=namespace)[0]

    async def apods(self, selector: str | Mapping[str, str], *, namespace: str | None = None) -> Objects:
        """Like :meth:`pods`, for an event loop."""
        return (await self.alist(POD, selector, namespace=namespace))[0]

    def events(self, for_name: str | None = None, *, uid: str | None = None, namespace: str | None = None) -> Objects:
        """Events about an object, the oldest first.

        :param for_name: its name
        :param uid: its uid, where an earlier object of that name does not count
        """
        query = _about(for_name, uid)
        found, _ = self._run(api.list_all(EVENT, self.namespace_of(namespace), query, self.patience))
        return sorted(found, key=_time_of)

    async def aevents(
        self, for_name: str | None = None, *, uid: str | None = None, namespace: str | None = None
    ) -> Objects:
        """Like :meth:`events`, for an event loop."""
        query = _about(for_name, uid)
        found, _ = await self._arun(api.list_all(EVENT, await self.anamespace_of(namespace), query, self.patience))
        return sorted(found, key=_time_of)

    def pod_log(
        self,
        name: str,
        *,
        tail: int | None = 200,
        since_seconds: int | None = None,
        container: str | None = None,
        namespace: str | None = None,
    ) -> str:
        """The end of a pod's log; empty if the pod is gone or has not started.

        :param tail: lines at most, None for all
        :param since_seconds: only what was written in so many seconds
        :param container: one of several
        """
        query = _log_query(tail, since_seconds, container)
        return self._run(api.pod_log(name, query, self.namespace_of(namespace), self.patience))

    async def apod_log(
        self,
        name: str,
        *,
        tail: int | None = 200,
        since_seconds: int | None = None,
        container: str | None = None,
        namespace: str | None = None,
    ) -> str:
        """Like :meth:`pod_log`, for an event loop."""
        query = _log_query(tail, since_seconds, container)
        return await self._arun(api.pod_log(name, query, await self.anamespace_of(namespace), self.patience))

    def log_lines(
        self, name: str, since: str | None = None, *, container: str | None = None, namespace: str | None = None
    ) -> builtins.list[LogLine]:
        """The lines of a pod's log that were not read yet, as far as they are written.

        :param since: ``str(cursor)`` of the last line that was read, None for the beginning
        """
        reader = LogReader(LogCursor.parse(since))
        query = {**reader.cursor.query, **_log_query(None, None, container)}
        text = self._run(api.pod_log(name, query, self.namespace_of(namespace), self.patience))
        return [*reader.feed(text.encode())]

    async def alog_lines(
        self, name: str, since: str | None = None, *, container: str | None = None, namespace: str | None = None
    ) -> AsyncGenerator[LogLine, None]:
        """The lines of a pod's log as they are written, until its container has ended or the pod is gone.

        A cut connection is taken up again at its place: no line is lost or comes twice. It is asked for until there is
        an answer, however long the server is away.

        :param since: ``str(cursor)`` of the last line that was read, None for the beginning
        """
        inside, cursor, backoff = await self.anamespace_of(namespace), LogCursor.parse(since), api.Backoff(most=5.0)
        while True:
            reader, start, failure = LogReader(cursor), cursor, None
            try:
                over = _over(await self.aget(POD, name, namespace=inside), container)
                follow = {} if over else {"follow": "true"}
                query = {**cursor.query, **_log_query(None, None, container), **follow}
                call = api.log_call(name, query, inside)
                async with aclosing(self._astream(call, _LOG_SILENCE, allow=api.no_log)) as chunks:
                    async for chunk in chunks:
                        for line in reader.feed(chunk):
                            cursor = line.cursor
                            yield line
                if over:
                    return
            except ExternalSystemError as error:
                self.log.debug("log of pod %s: %s", name, error)
                failure = error
            if reader.cursor != start:
                backoff.reset()
            await asyncio.sleep(backoff.after(failure))

    def watch(
        self,
        resource: Resource,
        resource_version: str,
        selector: str | Mapping[str, str] | None = None,
        *,
        seconds: int = 300,
        accept: str = api.JSON,
        namespace: str | None = None,
    ) -> Iterator[tuple[str, Object]]:
        """What happens after a version, as (type, object), bookmarks included, for so many seconds.

        :param accept: media type, for example a Table's
        :raises HistoryGone: the version is forgotten: list again
        :raises ExternalSystemError: the server is busy, or the connection broke: watch on from the last version
        """
        call = _watch_call(resource, self.namespace_of(namespace), selector, resource_version, seconds, accept)
        lines = api.Lines()
        for chunk in self._stream(call, _SILENCE):
            yield from (_change(call, line) for line in lines.feed(chunk))
        yield from (_change(call, line) for line in lines.end())

    async def awatch(
        self,
        resource: Resource,
        resource_version: str,
        selector: str | Mapping[str, str] | None = None,
        *,
        seconds: int = 300,
        accept: str = api.JSON,
        opened: Callable[[], None] = lambda: None,
        namespace: str | None = None,
    ) -> AsyncGenerator[tuple[str, Object], None]:
        """Like :meth:`watch`, for an event loop.

        :param opened: called when the server has accepted the watch
        """
        inside = await self.anamespace_of(namespace)
        call = _watch_call(resource, inside, selector, resource_version, seconds, accept)
        lines = api.Lines()
        async with aclosing(self._astream(call, _SILENCE, opened=opened)) as chunks:
            async for chunk in chunks:
                for line in lines.feed(chunk):
                    yield _change(call, line)
        for line in lines.end():
            yield _change(call, line)

    def test_connection(self) -> tuple[bool, str]:
        """Whether the API answers, knows RayJobs, and lets the account do all that a training needs."""
        try:
            namespace = self.namespace_of()
            about = f"Kubernetes {self._run(api.version(self.patience))} at {self._client().configuration.host}"
            if not self._run(api.serves(RAYJOB, self.patience)):
                return False, f"{about} has no {RAYJOB.plural} of {RAYJOB.api_version}: install KubeRay 1.6 or newer"
            if denied := self._run(api.lacking(namespace, self.patience)):
                return False, f"{about}: in namespace {namespace!r} the account may not {', '.join(denied)}"
        except MlopsError as error:
            return False, str(error)
        return True, f"{about}, with KubeRay; the account may train in namespace {namespace!r}"


def _labels(selector: str | Mapping[str, str] | None) -> dict[str, str]:
    text = api.selector_text(selector)
    return {"labelSelector": text} if text else {}


def _about(name: str | None, uid: str | None) -> dict[str, str]:
    wanted = {"involvedObject.name": name, "involvedObject.uid": uid}
    if not any(wanted.values()):
        raise InvalidInputError("events need the name or the uid of the object that they are about")
    return {"fieldSelector": ",".join(f"{key}={value}" for key, value in wanted.items() if value)}


def _time_of(event: Object) -> str:
    times = (event.get("lastTimestamp"), event.get("eventTime"), event["metadata"].get("creationTimestamp"))
    return next((str(time) for time in times if time), "")


def _log_query(tail: int | None, since_seconds: int | None, container: str | None) -> dict[str, str]:
    wanted = {"tailLines": tail, "sinceSeconds": since_seconds, "container": container}
    return {key: str(value) for key, value in wanted.items() if value is not None}


def _over(pod: Object | None, container: str | None) -> bool:
    """Whether nothing more will be written to the log."""
    if pod is None or (status := pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return True
    ended = [
        found["name"] for found in status.get("containerStatuses") or [] if "terminated" in (found.get("state") or {})
    ]
    return pod.get("spec", {}).get("restartPolicy") == "Never" and container in ended


def _watch_call(
    resource: Resource, namespace: str, selector: Any, resource_version: str, seconds: int, accept: str
) -> api.Call:
    query = {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": resource_version,
        "timeoutSeconds": str(seconds),
        **_labels(selector),
    }
    doing = f"watch {resource.plural} in {namespace!r}"
    return api.Call("GET", resource.path(namespace), query, accept=accept, doing=doing)


def _change(call: api.Call, line: bytes) -> tuple[str, Object]:
    try:
        event = json.loads(line)
        kind, found = event["type"], event["object"]
    except (ValueError, KeyError, TypeError) as error:
        raise api.Unanswered(
            f"a watch of {call.path} brought what is no event, or half of one: {line[:200]!r}"
        ) from error
    if kind == "ERROR":
        api.checked(call, api.Answer(int(found.get("code") or 500), json.dumps(found)))
    return kind, found
