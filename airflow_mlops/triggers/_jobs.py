"""One look at a Ray cluster for all the triggers that wait for its jobs."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import defaultdict
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from airflow_mlops.hooks.ray import Endpoint, Job, RayJobsHook

#: Up to so many jobs are asked for one by one; a list costs the cluster a read for every job that it remembers.
SINGLES = 5
#: Seconds in which triggers that start together are gathered for the first look.
GATHER = 0.02

_POLLS: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Endpoint, _Poll]] = WeakKeyDictionary()


async def next_look(endpoint: Endpoint, submission_id: str, interval: float) -> Job:
    """The job as the next look at its cluster finds it; its status is LOST if the cluster does not know it.

    All that wait for a cluster in this event loop share the look, so they get it at the same moment, up to ``interval``
    seconds from now. The first one does not wait.

    :param interval: seconds between two looks; of several the shortest counts
    :raises ExternalSystemError: the cluster did not answer this time
    :raises InvalidInputError: it refuses to, for example for its token
    """
    polls = _POLLS.setdefault(asyncio.get_running_loop(), {})
    if endpoint not in polls:
        polls[endpoint] = _Poll(endpoint, polls)
    return await polls[endpoint].wait(submission_id, interval)


@dataclass(frozen=True, eq=False)
class _Waiter:
    submission_id: str
    interval: float
    answer: asyncio.Future[Job]


class _Poll:
    """Looks at one cluster for as long as somebody waits for it.

    :param polls: where it is found until nobody does any more
    """

    def __init__(self, endpoint: Endpoint, polls: dict[Endpoint, _Poll]) -> None:
        self._endpoint, self._polls = endpoint, polls
        self._waiters: list[_Waiter] = []
        self._asked = asyncio.Event()
        # What the poll logs belongs to no task, above all not to the one whose trigger happened to be the first.
        self._task = asyncio.create_task(self._run(), context=contextvars.Context())

    async def wait(self, submission_id: str, interval: float) -> Job:
        waiter = _Waiter(submission_id, interval, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        self._asked.set()
        return await waiter.answer

    async def _run(self) -> None:
        try:
            async with RayJobsHook(endpoint=self._endpoint) as hook:
                await asyncio.sleep(GATHER)
                while waiters := self._present():
                    self._waiters, began = [], time.monotonic()
                    await self._look(hook, waiters)
                    await self._pause(began, min(waiter.interval for waiter in waiters))
                self._leave()  # without an await since the last look at who waits, so that nobody is forgotten
        finally:
            self._leave()
            for waiter in self._present():
                waiter.answer.cancel()

    def _leave(self) -> None:
        # While this one closes its session another may have begun.
        if self._polls.get(self._endpoint) is self:
            del self._polls[self._endpoint]

    def _present(self) -> list[_Waiter]:
        return [waiter for waiter in self._waiters if not waiter.answer.done()]

    async def _pause(self, began: float, interval: float) -> None:
        while True:
            shortest = min((waiter.interval for waiter in self._present()), default=interval)
            left = began + shortest - time.monotonic()
            if left <= 0:
                return
            self._asked.clear()
            try:
                await asyncio.wait_for(self._asked.wait(), left)
            except TimeoutError:
                return

    async def _look(self, hook: RayJobsHook, waiters: list[_Waiter]) -> None:
        by_job = defaultdict(list)
        for waiter in waiters:
            by_job[waiter.submission_id].append(waiter.answer)
        if len(by_job) <= SINGLES:
            await asyncio.gather(*(self._look_at(hook, name, answers) for name, answers in by_job.items()))
            return
        try:
            jobs = await hook.alist_jobs()
        except Exception as error:
            for answers in by_job.values():
                _fail(answers, error)
            return
        missing = {name: answers for name, answers in by_job.items() if name not in jobs}
        for name in by_job.keys() - missing.keys():
            _tell(by_job[name], jobs[name])
        # Whether a job is lost is never concluded from a list that may have been made while it was being taken in.
        for name, answers in missing.items():
            await self._look_at(hook, name, answers)

    async def _look_at(self, hook: RayJobsHook, submission_id: str, answers: list[asyncio.Future[Job]]) -> None:
        try:
            _tell(answers, await hook.alook(submission_id))
        except Exception as error:
            _fail(answers, error)


def _tell(answers: list[asyncio.Future[Job]], job: Job) -> None:
    for answer in answers:
        if not answer.done():
            answer.set_result(job)


def _fail(answers: list[asyncio.Future[Job]], error: Exception) -> None:
    for answer in answers:
        if not answer.done():
            answer.set_exception(error)
