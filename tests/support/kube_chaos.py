"""Airflow in small, for random schedules of faults: workers that can be killed, and a triggerer that can be restarted.

A killed worker says nothing more to the API server: the request it dies at is the last, before or after it took effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any

from airflow.sdk.exceptions import TaskDeferred

from airflow_mlops.hooks._kubernetes import Call
from airflow_mlops.hooks._kubernetes_connection import KubernetesConnection
from airflow_mlops.operators import _kuberay
from airflow_mlops.triggers.kuberay import RayJobResourceTrigger


class KilledError(BaseException):
    """The worker is no more."""


@dataclass
class Kill:
    """At which request a worker dies.

    :param method: of the requests that are counted, empty for all
    :param number: of the request, from 1 on
    :param after: whether that request still takes effect
    """

    method: str
    number: int
    after: bool


_worker: ContextVar[Worker | None] = ContextVar("worker", default=None)


class Worker:
    """One process of a worker, as a thread.

    :param work: what it does; ``outcome`` becomes its value, or what it raised
    :param kill: when it dies by itself
    """

    def __init__(self, work: Callable[[], Any], kill: Kill | None, wake: Callable[[], None]) -> None:
        self._work, self._kill, self._wake = work, kill, wake
        self._asking: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any], threading.Thread]] = []
        self._lock = threading.Lock()
        self.dead = self.was_killed = False
        self.outcome: Any = None
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        _worker.set(self)
        try:
            self.outcome = self._work()
        except BaseException as error:
            self.outcome = error
        self.was_killed = self.dead
        self._wake()

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._thread.is_alive()

    @property
    def deferred(self) -> TaskDeferred | None:
        """How the task waits, None if it does not."""
        return self.outcome if isinstance(self.outcome, TaskDeferred) else None

    def call(self, function: Callable[[], Any]) -> None:
        """Run something else in this process, as a signal handler does."""
        context = copy_context()

        def inside() -> None:
            _worker.set(self)
            with contextlib.suppress(KilledError):
                function()

        thread = threading.Thread(target=context.run, args=(inside,), daemon=True)
        thread.start()
        thread.join()

    def fall(self) -> None:
        """SIGKILL, now."""
        with self._lock:
            self.dead = True
            asking = list(self._asking)
        for loop, task, _ in asking:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)

    def die(self) -> None:
        """SIGKILL, now; returns when nothing of it is left."""
        self.fall()
        with self._lock:
            asking = list(self._asking)
        for _, _, thread in asking:
            thread.join(20)
        self._thread.join(20)

    def ask(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Like the operator's way to ask: in a thread with an event loop of its own."""
        future: Future[Any] = Future()

        async def asked() -> Any:
            task = asyncio.current_task()
            assert task is not None
            with self._lock:
                self._asking.append((asyncio.get_running_loop(), task, threading.current_thread()))
            self.alive()
            return await coroutine

        def work() -> None:
            try:
                future.set_result(asyncio.run(asked()))
            except BaseException as error:
                coroutine.close()
                future.set_exception(KilledError() if self.dead else error)

        threading.Thread(target=copy_context().run, args=(work,), name="kuberay", daemon=True).start()
        return future.result()

    def alive(self) -> None:
        """Raise if it is not."""
        if self.dead:
            raise KilledError

    def comes(self, call: Call) -> bool:
        """Note a request; whether the worker dies once it has taken effect."""
        self.alive()
        kill = self._kill
        if kill is None or kill.method not in ("", call.method):
            return False
        kill.number -= 1
        if kill.number:
            return False
        if not kill.after:
            self.fall()
            self.alive()
        return True


@contextlib.contextmanager
def killable(monkeypatch: Any, note: Callable[[str | None], None]) -> Any:
    """Let workers die at their requests, and call ``note`` with the namespace of each request."""
    send, stream, ask = KubernetesConnection._asend, KubernetesConnection._astream, _kuberay._in_thread

    async def asend(self: KubernetesConnection, call: Call) -> Any:
        note(self.namespace)
        worker = _worker.get()
        if worker is None:
            return await send(self, call)
        dies = worker.comes(call)
        try:
            answer = await send(self, call)
        finally:
            if dies:
                worker.fall()
        worker.alive()
        return answer

    async def astream(self: KubernetesConnection, *args: Any, **kwargs: Any) -> AsyncGenerator[bytes, None]:
        if worker := _worker.get():
            worker.alive()
        async for chunk in stream(self, *args, **kwargs):
            yield chunk

    def in_thread(coroutine: Coroutine[Any, Any, Any]) -> Any:
        worker = _worker.get()
        return ask(coroutine) if worker is None else worker.ask(coroutine)

    with monkeypatch.context() as patched:
        patched.setattr(KubernetesConnection, "_asend", asend)
        patched.setattr(KubernetesConnection, "_astream", astream)
        patched.setattr(_kuberay, "_in_thread", in_thread)
        yield


class Triggerer:
    """An event loop for all triggers; a context manager."""

    def __enter__(self) -> Triggerer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="triggerer", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()

    def start(self, deferred: TaskDeferred, wake: Callable[[], None]) -> Waiting:
        """Run the trigger of a task as it comes out of the database."""
        kwargs = json.loads(json.dumps(deferred.trigger.serialize()[1]))
        return Waiting(self._loop, deferred, RayJobResourceTrigger(**kwargs), wake)


class Waiting:
    """A deferred task with its trigger."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        deferred: TaskDeferred,
        trigger: RayJobResourceTrigger,
        wake: Callable[[], None],
    ) -> None:
        self.deferred, self._loop, self._trigger = deferred, loop, trigger
        self._future = asyncio.run_coroutine_threadsafe(self._event(), loop)
        self._future.add_done_callback(lambda _: wake())

    async def _event(self) -> Any:
        async for event in self._trigger.run():
            return event

    @property
    def event(self) -> Any:
        """What the trigger has fired, None before."""
        return self._future.result() if self._future.done() else None

    def end(self) -> None:
        """Cancel the trigger, as a triggerer does that is stopped."""
        self._future.cancel()

    def clear(self, delay: float) -> Future[None]:
        """Cancel the trigger for a user, with ``on_kill`` after so many seconds."""

        async def told() -> None:
            await asyncio.sleep(delay)
            await self._trigger.on_kill()

        self.end()
        return asyncio.run_coroutine_threadsafe(told(), self._loop)
