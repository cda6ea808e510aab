"""One list and one watch of Kubernetes objects for any number of triggers in one event loop.

The watch asks for Tables: the columns that the CRD prints and the metadata, so that a thousand RayJobs cost a few
kilobytes each. :class:`SharedWatch` holds the last known row of each object. A broken watch goes on from the version
that was seen last; where that is forgotten, a new list is compared with the rows, so that nobody misses a change.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet, finalize

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError, MlopsError
from airflow_mlops.hooks._kubernetes import TABLE, Backoff, HistoryGone, Object, Resource, selector_text

if TYPE_CHECKING:
    from airflow_mlops.hooks.kubernetes import CustomResourceHook

log = logging.getLogger(__name__)

_WATCH_SECONDS = (240, 360)
# A watch that ends sooner, without having brought anything, counts as a failure.
_USEFUL_SECONDS = 5.0
_BREATH = 50
_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"

_watches: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[Any, ...], SharedWatch]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Row:
    """One object as the API server prints it.

    :param name: its name
    :param uid: its uid; another one is another object of the same name
    :param resource_version: its version
    :param labels: its labels
    :param annotations: its annotations
    :param deleting: whether it has a deletionTimestamp
    :param columns: what the CRD prints, by the column's name: of a RayJob ``job status``, ``deployment status``,
        ``ray cluster name``, ``start time``, ``end time``, ``age``; empty text for nothing
    """

    name: str
    uid: str
    resource_version: str
    labels: dict[str, str]
    annotations: dict[str, str]
    deleting: bool
    columns: dict[str, str]


def watch(
    conn_id: str,
    resource: Resource,
    namespace: str | None = None,
    selector: str | Mapping[str, str] | None = None,
    *,
    hook: CustomResourceHook | None = None,
    **connection: Any,
) -> SharedWatch:
    """The watch that everybody in this event loop shares who asks for the same; enter it to use it.

    :param conn_id: Kubernetes connection
    :param resource: kind of object
    :param namespace: namespace, None for the connection's
    :param selector: labels; only a selector that is the same for all is shared by all
    :param hook: one that knows its connection, for a watch of one's own that looks none up
    :param connection: ``in_cluster``, ``cluster_context`` and ``config_file`` of
        :class:`airflow_mlops.hooks.kubernetes.CustomResourceHook`
    """
    if hook is not None:
        return SharedWatch({}, (), conn_id, resource, namespace, selector_text(selector), connection, hook)
    key = (conn_id, resource, namespace, selector_text(selector), *sorted(connection.items()))
    shared = _watches.setdefault(asyncio.get_running_loop(), {})
    if key not in shared:
        shared[key] = SharedWatch(shared, key, conn_id, resource, namespace, selector_text(selector), connection)
    return shared[key]


class SharedWatch:
    """Rows of all objects that a selector matches, kept up to date while anybody is inside ``async with``.

    :ivar silent_since: ``time.monotonic()`` at which the API server stopped to answer, None while it does
    :ivar trouble: what it said last, or why there was no answer
    """

    def __init__(
        self,
        registry: dict[tuple[Any, ...], SharedWatch],
        key: tuple[Any, ...],
        conn_id: str,
        resource: Resource,
        namespace: str | None,
        selector: str,
        connection: Mapping[str, Any],
        hook: CustomResourceHook | None = None,
    ) -> None:
        self._given = hook
        self.silent_since: float | None = None
        self.trouble = ""
        self._registry, self._key = registry, key
        self._resource, self._selector = resource, selector
        self._connection = {"conn_id": conn_id, "namespace": namespace, **connection}
        self._hook: CustomResourceHook | None = None
        self._users = 0
        self._task: asyncio.Task[None] | None = None
        self._forget()

    def _forget(self) -> None:
        self._rows: dict[str, Row] = {}
        self._followers: dict[str, WeakSet[Follower]] = {}
        self._names: list[str] = []
        self._version = ""
        self._heard = self._proven = False
        self._known = asyncio.Event()
        self._error: Exception | None = None

    @property
    def hook(self) -> CustomResourceHook:
        """A hook whose connection is open while the watch runs; for what else is asked about the objects."""
        if self._hook is None:
            raise RuntimeError("enter the watch first: async with watch(...) as shared")
        return self._hook

    async def __aenter__(self) -> SharedWatch:
        self._users += 1
        try:
            # The Kubernetes clients take a second to import, which an event loop does not have.
            module = await asyncio.to_thread(import_module, "airflow_mlops.hooks.kubernetes")
        except BaseException:
            self._users -= 1
            raise
        if self._task is None:
            self._registry.setdefault(self._key, self)
            self._forget()
            self._hook = self._given or module.CustomResourceHook(**self._connection)
            # What a shared watch logs belongs to no task, above all not to the one whose trigger was the first.
            context = None if self._given is not None else contextvars.Context()
            self._task = asyncio.create_task(self._run(), name=f"watch {self._resource.plural}", context=context)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._users -= 1
        if self._users:
            return
        self._leave()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def _leave(self) -> None:
        if self._registry.get(self._key) is self:
            del self._registry[self._key]

    def follow(self, name: str) -> Follower:
        """The present state of an object, then each change of it: a :class:`Row`, None while there is none.

        To wait only so long, ``await asyncio.wait_for(anext(follower), seconds)``: a wait that is given up loses
        nothing.
        """
        return Follower(self, name)

    # Keeping up

    async def _run(self) -> None:
        try:
            await self._stay_connected()
        except Exception as error:
            log.warning("the watch of %s ends: %s", self._resource.plural, error)
            self._leave()
            self._error = error
            self._known.set()
            for followers in self._followers.values():
                for follower in followers:
                    follower._put(error)

    async def _stay_connected(self) -> None:
        backoff = Backoff(most=30.0)
        while True:
            try:
                async with self.hook:
                    await self._keep_up(backoff)
            except InvalidInputError as error:
                # Rights that are gone for a while must not end what has been followed for hours.
                if not self._proven:
                    raise
                self._failed(error)
                await asyncio.sleep(backoff.after(error))

    async def _keep_up(self, backoff: Backoff) -> None:
        eager = True
        while True:
            began, self._heard = time.monotonic(), False
            failure: Exception | None = None
            try:
                if not self._version:
                    await self._list()
                await self._follow_changes()
            except HistoryGone as error:
                self._version, failure = "", error
            except ExternalSystemError as error:
                self._failed(error)
                failure = error
            if self._heard or time.monotonic() - began > _USEFUL_SECONDS:
                backoff.reset()
                eager = True
            if eager and (failure is None or isinstance(failure, HistoryGone)):
                # Once at once: the server ended the watch in time, or history ended.
                eager = False
                continue
            await asyncio.sleep(backoff.after(failure))

    def _answered(self) -> None:
        self.silent_since, self.trouble = None, ""

    def _failed(self, error: Exception) -> None:
        log.info("watching %s: %s", self._resource.plural, error)
        self.trouble = str(error)
        if self.silent_since is None:
            self.silent_since = time.monotonic()

    async def _list(self) -> None:
        found: dict[str, Row] = {}
        proceed: str | None = None
        while True:
            page = await self.hook.atable_page(self._resource, self._selector, proceed=proceed)
            self._answered()
            found.update((row.name, row) for row in self._rows_of(page))
            meta = page.get("metadata") or {}
            proceed = meta.get("continue")
            if not proceed:
                break
        version = str(meta.get("resourceVersion") or "")
        for row in found.values():
            self._take(row)
        for name, row in list(self._rows.items()):
            # What was found by name after the list was made is not on it.
            if name not in found and not _newer(row.resource_version, version):
                self._drop(name)
        self._version = version
        self._known.set()

    async def _follow_changes(self) -> None:
        seconds = random.randint(*_WATCH_SECONDS)
        stream = self.hook.awatch(
            self._resource, self._version, self._selector, seconds=seconds, accept=TABLE, opened=self._opened
        )
        count = 0
        async with aclosing(stream) as events:
            async for kind, found in events:
                self._heard = True
                self._answered()
                self._take_event(kind, found)
                count += 1
                if count % _BREATH == 0:
                    # A burst must leave the event loop to others, too.
                    await asyncio.sleep(0)

    def _opened(self) -> None:
        self._proven = True
        self._answered()

    def _take_event(self, kind: str, found: Object) -> None:
        version = (found.get("metadata") or {}).get("resourceVersion")
        if kind != "BOOKMARK":
            for row in self._rows_of(found):
                version = row.resource_version or version
                if kind == "DELETED":
                    known = self._rows.get(row.name)
                    if known is not None and not _newer(known.resource_version, row.resource_version):
                        self._drop(row.name)
                else:
                    self._take(row)
        else:
            version = version or next((row["object"]["metadata"]["resourceVersion"] for row in found["rows"]), None)
        if version:
            self._version = str(version)

    def _rows_of(self, table: Object) -> Iterator[Row]:
        if table.get("kind") != "Table":
            raise InvalidInputError(
                f"the Kubernetes API gives {self._resource.plural} not as a Table but as {table.get('kind')!r}; "
                "something between here and the API server changes the Accept header"
            )
        if defined := table.get("columnDefinitions"):
            # A watch sends them with its first event only.
            self._names = [column["name"] for column in defined]
        for row in table.get("rows") or []:
            meta = row["object"]["metadata"]
            yield Row(
                name=meta["name"],
                uid=meta.get("uid", ""),
                resource_version=meta.get("resourceVersion", ""),
                labels=meta.get("labels") or {},
                annotations={key: value for key, value in (meta.get("annotations") or {}).items() if key != _APPLIED},
                deleting=bool(meta.get("deletionTimestamp")),
                columns={name: "" if cell is None else str(cell) for name, cell in zip(self._names, row["cells"])},
            )

    def _take(self, row: Row) -> None:
        known = self._rows.get(row.name)
        if known is not None:
            if known.resource_version == row.resource_version or _newer(known.resource_version, row.resource_version):
                return
            if known.uid != row.uid:
                self._drop(row.name)
        self._rows[row.name] = row
        self._publish(row.name, row)

    def _drop(self, name: str) -> None:
        del self._rows[name]
        self._publish(name, None)

    def _publish(self, name: str, row: Row | None) -> None:
        for follower in self._followers.get(name, ()):
            follower._put(row)

    # Followers

    async def _present(self, follower: Follower) -> Row | None:
        """The present state of an object; from here on the follower is told of changes."""
        await self._known.wait()
        name = follower.name
        if name not in self._rows and self._error is None:
            found = await self._look(name)
            # What the watch has passed by now, it knows better.
            if found is not None and not _newer(self._version, found.resource_version):
                self._take(found)
        if self._error is not None:
            raise self._error
        self._followers.setdefault(name, WeakSet()).add(follower)
        finalize(follower, self._tidy, name).atexit = False
        return self._rows.get(name)

    def _tidy(self, name: str) -> None:
        if not list(self._followers.get(name, (None,))):
            del self._followers[name]

    async def _look(self, name: str) -> Row | None:
        """Ask for an object that the watch has not shown: it may be younger than what was seen last."""
        backoff = Backoff()
        while True:
            try:
                page = await self.hook.atable_page(self._resource, self._selector, name=name)
            except MlopsError as error:
                if isinstance(error, InvalidInputError) and not self._proven:
                    raise
                self.trouble = str(error)
                await asyncio.sleep(backoff.after(error))
                continue
            return next(self._rows_of(page), None)


class Follower:
    """Iterates over the states of one object; see :meth:`SharedWatch.follow`."""

    def __init__(self, shared: SharedWatch, name: str) -> None:
        self.name = name
        self._shared = shared
        self._states: asyncio.Queue[Row | Exception | None] = asyncio.Queue()
        self._begun = False

    def __aiter__(self) -> Follower:
        return self

    async def __anext__(self) -> Row | None:
        if not self._begun:
            present = await self._shared._present(self)
            self._begun = True
            return present
        state = await self._states.get()
        if isinstance(state, Exception):
            # It is raised again for whoever asks again.
            self._put(state)
            raise state
        return state

    def _put(self, state: Row | Exception | None) -> None:
        self._states.put_nowait(state)


def _newer(version: str, than: str) -> bool:
    """Whether a resourceVersion is later; those of one kind are decimal numbers that grow (KEP-5504)."""
    return version.isdigit() and than.isdigit() and int(version) > int(than)
