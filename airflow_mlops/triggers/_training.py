"""What the triggers that wait for a training share: is it over, is a limit broken, may the task end here, its log.

A run may end in the triggerer, without a worker, only when it has succeeded and nothing else is to happen on success:
see :func:`ends_in_triggerer`. Everything else goes back to a worker, for what Airflow 3.3 does with
``TaskFailedEvent`` is less than a worker does: a failure that no retry mends would be retried, a retry policy is not
asked, and the message reaches nobody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_mlops import storage
from airflow_mlops.exceptions import ExternalSystemError, MlopsError
from airflow_mlops.training.decide import Observation, next_action
from airflow_mlops.training.fence import read_owner
from airflow_mlops.training.limits import Breach, Limits, Times, breach, remaining, updated
from airflow_mlops.training.result import outcome, read_result
from airflow_mlops.training.spec import TrainingSpec

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.triggers.base import TriggerEvent

log = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Lines of a log after which they are passed on before their time.
BATCH = 1000
#: Seconds in which the rest of a log is passed on once the job is over.
DRAIN = 30.0
#: Tries of ``on_kill`` to end what runs, and the seconds between them; Airflow gives it 30 s.
KILL_TRIES, KILL_PAUSE = 4, 3.0


def ends_in_triggerer(operator: BaseOperator) -> bool:
    """Whether a success of ``operator`` may end in the triggerer as a ``TaskSuccessEvent``.

    In Airflow 3.3.2 that event sets the state, writes the XComs it carries (as text of JSON, which a worker takes for
    text: so they are pushed beforehand) and no more. It runs neither
    ``on_success_callback`` (the callback request it sends is dropped, as only those of failures are run) nor
    ``post_execute``, registers no events of outlets, calls no listener (OpenLineage is one), and stores XComs as plain
    JSON past a custom XCom backend. What else a worker notes with an XCom, its length for tasks that are mapped over it
    and that it is the result of the Dag, a trigger does not know. An operator that has any of these ends on a worker.
    """
    from airflow.sdk import BaseOperator
    from airflow.sdk.bases.xcom import BaseXCom
    from airflow.sdk.execution_time.xcom import XCom
    from airflow.sdk.listener import get_listener_manager

    return (
        operator.do_xcom_push
        and XCom is BaseXCom
        and not operator.outlets
        and not operator.on_success_callback
        and getattr(operator, "_post_execute_hook", None) is None
        and type(operator).post_execute is BaseOperator.post_execute
        and not operator.returns_dag_result
        and not (operator.has_dag() and any(True for _ in operator.iter_mapped_dependants()))
        and not get_listener_manager().has_listeners
    )


class LimitWatch:
    """Holds one attempt to its limits; looks into the run directory only when one of them may be broken.

    :param times: how far the training is; kept up to date
    :param clock: Unix time
    """

    def __init__(
        self, spec: TrainingSpec, limits: Limits, times: Times, clock: Callable[[], float] = time.time
    ) -> None:
        self.spec, self.limits, self.times, self._clock = spec, limits, times, clock

    def starts(self, status: str) -> bool:
        """Whether ``status`` is the first in which the attempt runs."""
        return status == "RUNNING" and self.times.running_since is None

    def due(self) -> bool:
        """Whether, for all that is known, a limit is broken."""
        return remaining(self.limits, self.times, self._clock()) == 0

    def check(self, status: str | None) -> Breach | None:
        """The limit that is broken with the attempt in ``status`` (None: not known). Reads storage; blocks."""
        if status is not None:
            self.times = self.times.seen(status, self._clock(), self._driver_began() if self.starts(status) else None)
        if self.due():
            self.times = updated(self.spec, self.times)
        return breach(self.limits, self.times, self._clock())

    async def acheck(self, status: str | None) -> Breach | None:
        """Like :meth:`check`, for an event loop; costs nothing while nothing is due."""
        if status is not None and not self.starts(status):
            self.times = self.times.seen(status, self._clock())
        elif status is not None:
            return await asyncio.to_thread(self.check, status)
        return await asyncio.to_thread(self.check, None) if self.due() else None

    def _driver_began(self) -> float | None:
        # A triggerer that has been restarted sees the attempt run for the first time, though it has run for long.
        try:
            owner = read_owner(self.spec)
        except Exception as error:
            log.warning("when the driver in %s began cannot be read: %s", self.spec.run_dir, error)
            return None
        return owner.started if owner is not None and owner.attempt == self.spec.attempt else None


class Training:
    """The attempt that a trigger waits for.

    :param state: with ``spec`` and ``adopted``, as the operator keeps it; every event hands it back
    :param limits: :meth:`Limits.to_json`, None without limits
    :param times: :meth:`Times.to_json`; needed with limits, and handed back with every event
    :param finish_in_triggerer: whether a success ends the task here, see :func:`ends_in_triggerer`
    :param multiple_outputs: whether each key of the result is an XCom of its own, too
    :param task: the trigger's task instance, to which XComs are pushed; without one, outside a triggerer, the event of
        a success carries them
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        *,
        limits: Mapping[str, Any] | None = None,
        times: Mapping[str, Any] | None = None,
        finish_in_triggerer: bool = False,
        multiple_outputs: bool = True,
        task: Any = None,
    ) -> None:
        self._task = task
        self._state, self._finish, self._multiple_outputs = dict(state), finish_in_triggerer, multiple_outputs
        self.spec = TrainingSpec.from_json(state["spec"]) if state.get("spec") else None
        self._limits = Limits.from_mapping(limits or {})
        self._times = times
        self._watch = None
        if limits and times and self.spec is not None:
            self._watch = LimitWatch(self.spec, self._limits, Times.from_json(times))

    def event(self, **what: Any) -> TriggerEvent:
        """An event for the operator, with the state and the times as they are now."""
        from airflow.triggers.base import TriggerEvent

        times = self._watch.times.to_json() if self._watch is not None else self._times
        told = {**what, "state": self._state}
        return TriggerEvent(told if times is None else {**told, "times": times})

    async def breach(self, status: str | None) -> Breach | None:
        """The limit that is broken with the attempt in ``status`` (None: not known)."""
        return None if self._watch is None else await self._watch.acheck(status)

    async def over(self, seen: Observation) -> TriggerEvent:
        """The event of an attempt that is over, lost or out of reach: the end of the task if that may be, else a call
        for the operator, ``{"seen": {"status", "exit_code", "message"}, "state"}``.
        """
        xcoms = await asyncio.to_thread(self._success, seen) if self._finish else None
        if xcoms is None:
            return self.event(seen=vars(seen))
        from airflow.triggers.base import TaskSuccessEvent

        if self._task is None:
            end = TaskSuccessEvent(xcoms=xcoms)
        else:
            try:
                await _push(self._task, xcoms)
            except Exception as error:
                log.warning("the XComs cannot be pushed from the triggerer, so a worker will: %s", error)
                return self.event(seen=vars(seen))
            end = TaskSuccessEvent()
        # ``dag.test()`` ends no task here: it hands the payload, which a triggerer never looks at, to the operator.
        end.payload = self.event(seen=vars(seen)).payload
        return end

    def _success(self, seen: Observation) -> dict[str, Any] | None:
        """The XComs of a success, None where it is none or where that cannot be told now."""
        spec = self.spec
        if spec is None:
            return None
        try:
            result = read_result(spec)
        except Exception as error:  # the operator will find out, and say so
            log.warning("the result in %s cannot be read: %s", spec.run_dir, error)
            return None
        # Restarts are the operator's business: how many are left makes no difference to a success.
        action = next_action(seen, result, spec.attempt, 0, 0, bool(self._state.get("adopted")))
        if action.kind != "succeed" or result is None:
            return None
        budget = self._limits.budget
        value = outcome(spec, result, price_per_gpu_hour=None if budget is None else budget.price_per_gpu_hour)
        return {**(value if self._multiple_outputs else {}), "return_value": value}


async def _push(task: Any, xcoms: Mapping[str, Any]) -> None:
    from airflow.sdk.execution_time.xcom import XCom

    place = {"dag_id": task.dag_id, "task_id": task.task_id, "run_id": task.run_id, "map_index": task.map_index}
    for key, value in xcoms.items():
        await XCom.aset(key, value, **place)


class LogRelay:
    """Passes an attempt's log on to the task's, no line lost and none twice, whoever follows it next.

    Lines are gathered for ``every`` seconds and passed on together, and then the place reached is noted in the run
    directory: ``_mlops/log-offset-a<n>.json``. A process that is killed in the moment between the two makes its
    successor repeat one such batch; one that is told to end loses and repeats nothing.

    :param emit: takes a line
    :param every: seconds
    """

    def __init__(self, spec: TrainingSpec, emit: Callable[[str], None], every: float = 5.0) -> None:
        self._uri = spec.file(f"log-offset-a{spec.attempt}.json")
        self._emit, self._every = emit, every
        self._lines: list[str] = []
        self._place: Any = None
        self._passing = asyncio.Lock()

    async def follow(self, source: Callable[[Any], AsyncGenerator[tuple[Any, str]]]) -> None:
        """Pass on what ``source`` yields, until it ends.

        :param source: called with the place to go on from, None for the start; yields lines, each with the place (JSON)
            behind it
        """
        reader = asyncio.create_task(self._gather(source(await asyncio.to_thread(self._read))))
        try:
            while not reader.done():
                await asyncio.wait({reader}, timeout=self._every)
                await self._pass_on()
            reader.result()
        finally:
            reader.cancel()
            try:
                await self._pass_on()
            finally:
                # What it reads from is the caller's, who may close it next.
                await asyncio.gather(reader, return_exceptions=True)

    async def _gather(self, lines: AsyncGenerator[tuple[Any, str]]) -> None:
        async with aclosing(lines):
            async for place, line in lines:
                self._lines.append(line)
                self._place = place
                if len(self._lines) >= BATCH:
                    await self._pass_on()

    async def _pass_on(self) -> None:
        async with self._passing:
            lines, self._lines = self._lines, []
            if not lines:
                return
            for line in lines:
                self._emit(line)
            noting = asyncio.ensure_future(asyncio.to_thread(self._note, self._place))
            try:
                await asyncio.shield(noting)
            except asyncio.CancelledError:
                await asyncio.wait({noting})  # or a successor would begin before what was passed on
                raise

    def _read(self) -> Any:
        try:
            return storage.read_json(self._uri)["place"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s): the log is passed on from its start", self._uri, error)
            return None

    def _note(self, place: Any) -> None:
        try:
            storage.write_json(self._uri, {"place": place})
        except Exception as error:  # a log must not end a training
            log.warning("how far the log was read cannot be noted: %s", error)


@asynccontextmanager
async def log_shown(
    how: str,
    spec: TrainingSpec | None,
    *,
    emit: Callable[[str], None],
    source: Callable[[Any, asyncio.Event], AsyncGenerator[tuple[Any, str]]],
    tail: Callable[[], Awaitable[str]],
    warn: Callable[..., object],
) -> AsyncIterator[None]:
    """Show the log of what the block waits for.

    :param how: ``"off"``; ``"tail"``: its end, after the block; ``"live"``: as it is written, and up to 30 s longer
    :param spec: the attempt; without one, live is shown as a tail
    :param emit: takes a line
    :param source: see :meth:`LogRelay.follow`; called with an event, too, which is set when the block has ended
    :param tail: gives the end of the log
    :param warn: a logger's ``warning``, told why the log cannot be had
    """
    if how != "live" or spec is None:
        yield
        if how != "off":
            try:
                text = await tail()
            except MlopsError as error:
                warn("%s", ended_with(error))
                return
            for line in text.splitlines():
                emit(line)
        return
    over = asyncio.Event()
    following = asyncio.create_task(LogRelay(spec, emit).follow(lambda place: source(place, over)), name="driver's log")
    try:
        yield
        over.set()
        await asyncio.wait({following}, timeout=DRAIN)
    finally:
        following.cancel()
        (end,) = await asyncio.gather(following, return_exceptions=True)
        if isinstance(end, Exception):
            warn("%s", ended_with(end))


async def insist(ask: Callable[[], Awaitable[Result]], warn: Callable[..., object]) -> Result:
    """The answer, asked for again while the other side is away: for ``on_kill``, which nobody calls twice."""
    for _ in range(KILL_TRIES - 1):
        try:
            return await ask()
        except ExternalSystemError as error:
            warn("%s", error)
            await asyncio.sleep(KILL_PAUSE)
    return await ask()


def ended_with(error: BaseException) -> str:
    """Why a log could not be followed to its end, for the task's log."""
    hint = "" if isinstance(error, MlopsError) else f"{type(error).__name__}: "
    return f"the driver's log is not followed any further: {hint}{error}"
