"""Attempts of :class:`airflow_mlops.operators.ray.RayTrainOperator` as RayJobs, each on a Ray cluster of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import InvalidInputError, MlopsError
from airflow_mlops.hooks.kuberay import RayJobHook
from airflow_mlops.operators._ray import Progress
from airflow_mlops.training.callables import check_callables
from airflow_mlops.training.cluster import KubeCluster, check_storage, fitted, warnings
from airflow_mlops.training.decide import FINAL, Observation
from airflow_mlops.training.fence import signs_of_life
from airflow_mlops.training.limits import Breach, Limits, Times, attempt_seconds
from airflow_mlops.training.manifest import Owner, render_rayjob
from airflow_mlops.training.rayjob import observe
from airflow_mlops.training.spec import TrainingSpec, submission_id_of
from airflow_mlops.triggers.kuberay import LOG_TAIL, PODS_GO, RayJobResourceTrigger

if TYPE_CHECKING:
    from airflow_mlops.triggers._training import LimitWatch

log = logging.getLogger(__name__)

#: Seconds by which the cluster's own deadlines lie behind the task's, which names the cause and is kept first.
MARGIN = 120.0


class KubeRayRunner:
    """Attempts as RayJobs.

    Everything is asked for in a thread with an event loop of its own, so that a signal handler can stop an attempt
    while the task waits for it.

    :param connection: arguments of the hook
    :param cluster: what each attempt's cluster looks like
    :param owner: the task
    :param limits: of the training
    :param poll_interval: seconds after which it looks where nothing is told
    :param unreachable_timeout: seconds that the API server may be away
    :param cancel_on_kill: whether who waits in the triggerer deletes the RayJob for a user
    :param logs: ``"off"``, ``"tail"`` or ``"live"``
    :param on_line: takes a line of the driver's log
    :param multiple_outputs: whether each key of the result is pushed from the triggerer, too
    :param keep_on_failure: leave the pods of a failed attempt to their TTL
    :param fence_timeout: seconds that an earlier attempt's pods have to go
    """

    remote = True

    def __init__(
        self,
        *,
        connection: Mapping[str, Any],
        cluster: KubeCluster,
        owner: Owner,
        limits: Limits,
        poll_interval: float,
        unreachable_timeout: float,
        cancel_on_kill: bool,
        logs: str,
        on_line: Callable[[str], None],
        multiple_outputs: bool,
        keep_on_failure: bool,
        fence_timeout: float,
    ) -> None:
        self._connection, self._cluster, self._owner, self._limits = dict(connection), cluster, owner, limits
        self._poll_interval, self._unreachable_timeout = poll_interval, unreachable_timeout
        self._cancel_on_kill, self._multiple_outputs = cancel_on_kill, multiple_outputs
        self._logs, self._on_line = logs, on_line
        self._keep, self._fence_timeout = keep_on_failure, max(fence_timeout, PODS_GO)
        # Connections are looked up here, in the thread that runs the task.
        self._hook = RayJobHook(**self._connection)
        self._hook.namespace_of()

    def fitted(self, spec: TrainingSpec) -> TrainingSpec:
        """The spec as the driver on such a cluster needs it, once all that can be checked beforehand is.

        :raises InvalidInputError: the attempt could not run
        """
        check_callables(spec, self._cluster.runtime_env)
        fit = fitted(spec, self._cluster)
        check_storage(fit, self._cluster)
        render_rayjob(fit, self._cluster, name=submission_id_of(fit), owner=self._owner, spec_uri=fit.file("spec.json"))
        for warning in warnings(fit, self._cluster):
            log.warning("%s", warning)
        return fit

    def start(self, spec: TrainingSpec, spec_uri: str, times: Times) -> bool:
        """Create the attempt's RayJob, or take over the one of that name; False if that one is over or going."""
        left = attempt_seconds(self._limits, times, time.time())
        startup = self._limits.startup_timeout
        manifest = render_rayjob(
            spec,
            self._cluster,
            name=submission_id_of(spec),
            owner=self._owner,
            spec_uri=spec_uri,
            deadline_seconds=None if left is None else left + MARGIN,
            startup_seconds=None if startup is None else startup + MARGIN,
        )
        started = self._run(lambda hook: hook.start(spec, manifest, self._owner, self._fence_timeout))
        # One that was just created may have failed already, and whoever follows it finds out why.
        return started == "created" or (started == "adopted" and self.peek(spec).status not in FINAL)

    def adopt(self, spec: TrainingSpec) -> bool:
        """Take over the attempt of an earlier try; False if it is gone or about to go."""
        return self._run(lambda hook: hook.adopt(spec, self._owner))

    def peek(self, spec: TrainingSpec) -> Observation:
        """How the attempt is now."""
        view = self._run(lambda hook: hook.view(spec))
        seen = observe(view, now=0.0)
        if seen.status == "SUBMITTER_LOST":
            return signs_of_life(spec, time.time(), seen.message)
        return seen

    def trigger(self, progress: Progress, *, finish: bool) -> RayJobResourceTrigger:
        """What waits for the attempt without a worker."""
        return RayJobResourceTrigger(
            connection=self._connection,
            owner=asdict(self._owner),
            poll_interval=self._poll_interval,
            unreachable_timeout=self._unreachable_timeout,
            cancel_on_kill=self._cancel_on_kill,
            state=progress.to_json(),
            gang=None if self._cluster.gang is None else asdict(self._cluster.gang),
            deadline=progress.deadline,
            logs=self._logs,
            limits=self._limits.to_json(),
            times=progress.times.to_json(),
            finish_in_triggerer=finish,
            multiple_outputs=self._multiple_outputs,
        )

    def wait_within(self, spec: TrainingSpec, watch: LimitWatch) -> Observation | Breach:
        """Wait until the attempt is over, lost, out of reach, or has broken a limit and is gone."""
        trigger = self.trigger(Progress(spec, watch.times), finish=False)
        trigger.use(self._hook_of_its_own, self._on_line)
        payload = _in_thread(trigger.ended()).payload
        if payload.get("times"):
            watch.times = Times.from_json(payload["times"])
        if "error" in payload:
            raise InvalidInputError(payload["error"])
        if "breach" not in payload:
            return Observation(**payload["seen"])
        if payload["seen"]["status"] == "UNREACHABLE":
            self.stop(spec)
        return Breach(**payload["breach"])

    def stop(self, spec: TrainingSpec) -> None:
        """Delete the attempt's RayJob and return when all its pods are gone."""
        self._run(lambda hook: hook.end(spec, self._owner, PODS_GO))

    def cancel(self, spec: TrainingSpec) -> None:
        """Delete the attempt's RayJob, unless a later try has taken it over, and wait for nothing."""
        self._run(lambda hook: hook.cancel(spec, self._owner))

    def close(self, spec: TrainingSpec, failed: bool) -> None:
        """Delete what nobody needs any more; its GPUs are free at once, not when the RayJob's TTL is over."""
        try:
            # What is kept to be looked at has ended; nothing is kept running.
            if failed and self._keep and self.peek(spec).status in FINAL:
                return
            self.cancel(spec)
        except MlopsError as error:
            log.warning("RayJob %s stays until its TTL is over: %s", submission_id_of(spec), error)

    def tail(self, spec: TrainingSpec) -> str:
        """The end of the driver's log, or why it cannot be had."""
        try:
            text = self._run(lambda hook: hook.tail(spec, LOG_TAIL))
        except MlopsError as error:
            return f"(the log cannot be read: {error})"
        return text or "(no pod has the driver's log)"

    def show_tail(self, spec: TrainingSpec) -> None:
        """Pass on the end of the driver's log, if that is how it is to be shown."""
        if self._logs == "tail":
            for line in self.tail(spec).splitlines():
                self._on_line(line)

    def link(self, spec: TrainingSpec) -> dict[str, Any]:
        """What the extra links are made of."""
        namespace = self._hook.namespace_of()
        return {"dashboard_url": None, "namespace": namespace, "submission_id": submission_id_of(spec)}

    def _hook_of_its_own(self) -> RayJobHook:
        hook = RayJobHook(**self._connection)
        hook.__dict__.update(conn_extras=self._hook.conn_extras)
        return hook

    def _run(self, ask: Callable[[RayJobHook], Coroutine[Any, Any, Any]]) -> Any:
        async def asked() -> Any:
            async with self._hook_of_its_own() as hook:
                return await ask(hook)

        return _in_thread(asked())


def _in_thread(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The coroutine's result, from a loop of its own: the caller may be a signal handler inside another loop.

    Whoever is interrupted while it waits leaves the thread behind, which does not keep the process alive.
    """
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(asyncio.run(coroutine))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="kuberay", daemon=True).start()
    return future.result()
