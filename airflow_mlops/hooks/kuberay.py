"""The RayJobs that training attempts run as: created once, taken over by a later try, ended with all their pods."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any, Literal

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError
from airflow_mlops.hooks._kubernetes import Backoff
from airflow_mlops.hooks._pod_log import DriverLog
from airflow_mlops.hooks.kubernetes import (
    PODGROUP,
    RAYJOB,
    WORKLOAD,
    AlreadyExists,
    CustomResourceHook,
)
from airflow_mlops.training.cluster import SUBMITTER
from airflow_mlops.training.diagnose import diagnose_startup, preflight, queue_problem
from airflow_mlops.training.manifest import ATTEMPT_LABEL, RUN_LABEL, Owner, run_label, run_selector
from airflow_mlops.training.parts import Gang
from airflow_mlops.training.rayjob import OWNER_ANNOTATION, OWNER_TRY_ANNOTATION, RayJobView
from airflow_mlops.training.spec import TrainingSpec, submission_id_of

#: On a Workload: uid of the object that Kueue queues by it.
JOB_UID_LABEL = "kueue.x-k8s.io/job-uid"
#: Tries to change a RayJob that KubeRay changes at the same time.
_RACES = 20
_LOOK = 1.0


class RayJobHook(CustomResourceHook):
    """RayJobs by the attempt of a training run; see :class:`~airflow_mlops.hooks.kubernetes.CustomResourceHook`.

    :param look: seconds between two looks at pods that are to go
    """

    def __init__(self, *args: Any, look: float = _LOOK, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._look = look

    async def view(self, spec: TrainingSpec) -> RayJobView | None:
        """The attempt's RayJob, None if there is none."""
        found = await self.aget(RAYJOB, submission_id_of(spec))
        return None if found is None else RayJobView.of(found)

    async def start(
        self, spec: TrainingSpec, manifest: Mapping[str, Any], owner: Owner, patience: float
    ) -> Literal["created", "adopted"] | None:
        """Create the attempt's RayJob, or take over the one of that name; None if that one is about to go.

        No other attempt of the run is alive when this creates one: their RayJobs are deleted, and their pods gone.

        :param manifest: of the RayJob
        :param owner: the task and the try of it that follow it from here on
        :param patience: seconds that other attempts' pods have to go
        :raises ConcurrentChangeError: a RayJob of that name belongs to something else, or a later try or another task
            follows the run
        :raises ExternalSystemError: pods of another attempt do not go
        """
        await self._end_others(spec, owner, patience)
        if await self._created(manifest):
            return "created"
        found = await self.aget(RAYJOB, submission_id_of(spec))
        if found is None:
            return None
        if (found["metadata"].get("labels") or {}).get(RUN_LABEL) != run_label(spec):
            raise ConcurrentChangeError(
                f"a RayJob {submission_id_of(spec)} exists and belongs to another run; delete it, or use another "
                "namespace or run_key"
            )
        return "adopted" if await self.adopt(spec, owner) else None

    async def _created(self, manifest: Mapping[str, Any]) -> bool:
        for _ in range(_RACES):
            try:
                await self.acreate(RAYJOB, dict(manifest))
                return True
            except AlreadyExists:
                return False
            except ConcurrentChangeError:
                # The namespace's quota was changed in between, by whoever created something else.
                await asyncio.sleep(self._look)
        raise ExternalSystemError(
            f"RayJob {manifest['metadata']['name']} was refused {_RACES} times because others change the namespace's "
            "quota at the same time"
        )

    async def adopt(self, spec: TrainingSpec, owner: Owner) -> bool:
        """Note on the attempt's RayJob that this try follows it; False if it is gone or about to go.

        :raises ConcurrentChangeError: a later try or another task follows it
        """
        for _ in range(_RACES):
            view = await self.view(spec)
            if view is None or view.deleting:
                return False
            self._refuse_to_rob(view, owner)
            if (view.owner, view.owner_try) == (owner.name, owner.try_number):
                return True
            notes = {OWNER_ANNOTATION: owner.name, OWNER_TRY_ANNOTATION: str(owner.try_number)}
            change = {"metadata": {"annotations": notes}}
            try:
                await self.apatch(RAYJOB, view.name, change, resource_version=view.resource_version)
                return True
            except ConcurrentChangeError:
                continue
        raise ExternalSystemError(f"RayJob {submission_id_of(spec)} changes too fast to be taken over")

    async def cancel(self, spec: TrainingSpec, owner: Owner) -> bool:
        """Delete the attempt's RayJob unless a later try or another task follows it; whether it was deleted."""
        for _ in range(_RACES):
            view = await self.view(spec)
            if view is None or view.deleting or view.owner_try is None or _robs(view, owner):
                return False
            try:
                return await self.adelete(RAYJOB, view.name, uid=view.uid, resource_version=view.resource_version)
            except ConcurrentChangeError:
                continue
        raise ExternalSystemError(f"RayJob {submission_id_of(spec)} changes too fast to be deleted")

    async def end(self, spec: TrainingSpec, owner: Owner, patience: float) -> None:
        """Delete the attempt's RayJob and return when it and all its pods are gone.

        :raises ConcurrentChangeError: a later try or another task follows it
        :raises ExternalSystemError: they are not gone within ``patience`` seconds
        """
        deadline = time.monotonic() + patience
        while True:
            view = await self.view(spec)
            if view is not None:
                await self._delete(view, owner)
            pods = await self.apods(run_selector(spec, spec.attempt))
            if view is None and not pods:
                return
            await self._not_later_than(deadline, submission_id_of(spec), pods)

    async def diagnosis(self, spec: TrainingSpec) -> str | None:
        """What keeps the attempt from running, in a sentence; None if nothing explains it."""
        view = await self.view(spec)
        pods = await self.apods(run_selector(spec, spec.attempt))
        about = [pod["metadata"]["name"] for pod in pods] + [submission_id_of(spec)]
        events: list[Any] = []
        if view is not None:
            about += [_pod_group(view), *filter(None, [view.cluster])]
        for name in about:
            events += await self.aevents(name)
        workload = None if view is None or not view.queued else await self._workload(view)
        return diagnose_startup(pods, events, workload)

    async def scheduler_problem(self, spec: TrainingSpec, gang: Gang) -> str | None:
        """What shows that the promised scheduler does not act on the attempt, None if it does.

        :raises ExternalSystemError: there is nothing yet that shows either
        """
        view = await self.view(spec)
        pods = await self.apods(run_selector(spec, spec.attempt))
        groups, workloads = [], []
        if gang.scheduler == "volcano" and view is not None:
            group = await self.aget(PODGROUP, _pod_group(view))
            groups = [group] if group else []
        if gang.scheduler == "kueue" and view is not None:
            workloads = [found] if (found := await self._workload(view)) else []
        if view is None or (gang.scheduler != "kueue" and not pods and not groups):
            raise ExternalSystemError(
                f"RayJob {submission_id_of(spec)} has no pod yet, so whether {gang.scheduler} acts cannot be seen"
            )
        return preflight(gang, pods=pods, pod_groups=groups, workloads=workloads)

    async def queue_problem(self, spec: TrainingSpec) -> str | None:
        """Why waiting in Kueue's queue is in vain, None otherwise."""
        view = await self.view(spec)
        workload = None if view is None else await self._workload(view)
        return None if workload is None else queue_problem(workload)

    async def tail(self, spec: TrainingSpec, lines: int) -> str:
        """The end of the driver's log as its submitter has it; empty without a submitter."""
        pod = await self._submitter(spec)
        return "" if pod is None else await self.apod_log(pod, tail=lines, container=SUBMITTER)

    async def driver_log(
        self, spec: TrainingSpec, place: str | None, over: asyncio.Event
    ) -> AsyncGenerator[tuple[str, str], None]:
        """The driver's log as its submitters have it, from ``place`` on: each line with the place behind it.

        A submitter that loses the driver is replaced by another, which tells the log from its start: no line of the
        driver is lost or comes twice. What the first one says itself before the driver's log, and any one after it,
        comes too; see :class:`~airflow_mlops.hooks._pod_log.DriverLog` for what tells them apart.

        :param over: set when the attempt is over; who has no submitter then gets none
        """
        log, backoff, ended, known = DriverLog(place), Backoff(self._look, 30.0), None, False
        while True:
            last, failure = over.is_set(), None
            try:
                pod = await self._submitter(spec)
                if pod is None and not known:
                    rayjob = await self.aget(RAYJOB, submission_id_of(spec))
                    known = rayjob is not None
                    if rayjob is not None and rayjob["spec"].get("submissionMode") == "HTTPMode":
                        return
            except ExternalSystemError as error:
                pod, failure = None, error
            if pod is not None and pod != ended:
                async with aclosing(self.alog_lines(pod, log.since(pod), container=SUBMITTER)) as lines:
                    async for line in lines:
                        if log.is_new(line):
                            yield log.place, line.text
                ended = pod
                backoff.reset()
            elif last and failure is None:
                return
            elif last:
                await asyncio.sleep(backoff.after(failure))
            else:
                with suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), backoff.after(failure))

    async def _submitter(self, spec: TrainingSpec) -> str | None:
        pods = await self.apods(run_selector(spec, spec.attempt))
        found = [
            pod["metadata"]
            for pod in pods
            if any(container["name"] == SUBMITTER for container in pod["spec"].get("containers", ()))
        ]
        newest = max(found, key=lambda metadata: metadata.get("creationTimestamp") or "", default=None)
        return None if newest is None else str(newest["name"])

    async def _workload(self, view: RayJobView) -> Any:
        found, _ = await self.alist(WORKLOAD, {JOB_UID_LABEL: view.uid})
        return found[0] if found else None

    async def _end_others(self, spec: TrainingSpec, owner: Owner, patience: float) -> None:
        deadline = time.monotonic() + patience
        name = submission_id_of(spec)
        while True:
            jobs, _ = await self.alist(RAYJOB, run_selector(spec))
            others = [view for job in jobs if (view := RayJobView.of(job)).name != name]
            for view in others:
                await self._delete(view, owner)
            pods = await self.apods(f"{run_selector(spec)},{ATTEMPT_LABEL}!={spec.attempt}")
            if not pods and all(view.deleting for view in others):
                return
            await self._not_later_than(deadline, "an earlier attempt", pods)

    async def _delete(self, view: RayJobView, owner: Owner) -> None:
        """Delete it as it was seen; nothing happens if it has changed since, or is about to go."""
        self._refuse_to_rob(view, owner)
        if not view.deleting:
            with suppress(ConcurrentChangeError):
                await self.adelete(RAYJOB, view.name, uid=view.uid, resource_version=view.resource_version)

    def _refuse_to_rob(self, view: RayJobView, owner: Owner) -> None:
        if not _robs(view, owner):
            return
        if view.owner in (None, owner.name):
            raise ConcurrentChangeError(
                f"RayJob {view.name} is followed by try {view.owner_try} of this task, and this is try "
                f"{owner.try_number}: the task was cleared or retried meanwhile. If it was not, because its Dag run is "
                "a new one of the same name, delete the RayJob"
            )
        raise ConcurrentChangeError(
            f"RayJob {view.name} is followed by another task, {view.owner} (Dag, task, Dag run, map index), which has "
            "the same run_key; wait until it is over, delete the RayJob if nobody follows it any more, or give this "
            "task a run_key of its own"
        )

    async def _not_later_than(self, deadline: float, whose: str, pods: list[Any]) -> None:
        if time.monotonic() < deadline:
            await asyncio.sleep(self._look)
            return
        names = ", ".join(pod["metadata"]["name"] for pod in pods) or "none, but the RayJob is still there"
        raise ExternalSystemError(
            f"what {whose} has started does not go away (pods: {names}); see whether their nodes answer and whether a "
            "finalizer holds them. Nothing new was started beside them."
        )


def _robs(view: RayJobView, owner: Owner) -> bool:
    """Whether who touches a RayJob would take it from a later try, or from another task while it is not over."""
    if view.owner not in (None, owner.name):
        return not view.over
    return view.owner_try is not None and view.owner_try > owner.try_number


def _pod_group(view: RayJobView) -> str:
    return f"ray-{view.name}-pg"
