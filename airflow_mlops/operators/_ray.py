"""Where the attempts of :class:`airflow_mlops.operators.ray.RayTrainOperator` run, and how far a try has come."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from airflow_mlops.exceptions import ExternalSystemError, MlopsError
from airflow_mlops.hooks.ray import LOG_TAIL, AccessRefusedError, RayJobsHook
from airflow_mlops.training.callables import check_callables
from airflow_mlops.training.decide import ACTIVE, FINAL, Observation, Patience
from airflow_mlops.training.launch import driver_command, driver_env
from airflow_mlops.training.limits import Breach, Limits, Times
from airflow_mlops.training.local import LocalRunner
from airflow_mlops.training.spec import TrainingSpec, submission_id_of

if TYPE_CHECKING:
    from airflow.triggers.base import BaseTrigger

    from airflow_mlops.triggers._training import LimitWatch
    from airflow_mlops.triggers.ray import RayJobTrigger

#: Seconds between two looks whether a job whose log is live is over.
LOG_LOOK = 0.2


@dataclass(frozen=True)
class Progress:
    """How far one try of the task has come; it travels with the trigger, for a resumed task is a new object.

    :param spec: the attempt that is followed
    :param times: when it began, and what the run has consumed
    :param restarts: attempts of this try that were replaced
    :param adopted: whether an earlier try started the attempt
    :param deadline: Unix time at which ``execution_timeout`` is over, None without
    """

    spec: TrainingSpec
    times: Times
    restarts: int = 0
    adopted: bool = False
    deadline: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain types, for :meth:`from_json`."""
        return {**vars(self), "spec": self.spec.to_json(), "times": self.times.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Progress:
        """The progress behind ``to_json()``."""
        spec, times = TrainingSpec.from_json(value["spec"]), Times.from_json(value["times"])
        return cls(**{**value, "spec": spec, "times": times})


class Runner(Protocol):
    """Where attempts run: starts, follows and stops them; decides nothing."""

    @property
    def remote(self) -> bool:
        """Whether an attempt outlives the task, so that it can be adopted, and waited for in the triggerer."""

    def fitted(self, spec: TrainingSpec) -> TrainingSpec:
        """The spec as the driver there needs it, once all that can be checked beforehand is."""

    def start(self, spec: TrainingSpec, spec_uri: str, times: Times) -> bool:
        """Start an attempt, or adopt the one of that name; False if that one is over already."""

    def adopt(self, spec: TrainingSpec) -> bool:
        """Take over the attempt of an earlier try; False if it is about to go."""

    def peek(self, spec: TrainingSpec) -> Observation:
        """How the attempt is now."""

    def trigger(self, progress: Progress, *, finish: bool) -> BaseTrigger:
        """What waits for the attempt without a worker; ``finish``: and ends the task if it has succeeded."""

    def wait_within(self, spec: TrainingSpec, watch: LimitWatch) -> Observation | Breach:
        """Wait until the attempt is over, lost, out of reach, or has broken a limit and was stopped."""

    def stop(self, spec: TrainingSpec) -> None:
        """End the attempt and return when it has ended."""

    def cancel(self, spec: TrainingSpec) -> None:
        """End the attempt for a user, if it is still this try's."""

    def close(self, spec: TrainingSpec, failed: bool) -> None:
        """Give back what the attempt holds though it is over."""

    def tail(self, spec: TrainingSpec) -> str:
        """The end of the driver's log."""

    def show_tail(self, spec: TrainingSpec) -> None:
        """Pass on the end of the driver's log, if that is how it is to be shown."""

    def link(self, spec: TrainingSpec) -> dict[str, Any]:
        """What the extra links are made of."""


class LocalAttempts(LocalRunner):
    """Attempts as child processes of this worker, of which nothing outlives the task."""

    remote = False

    def fitted(self, spec: TrainingSpec) -> TrainingSpec:
        """The spec as it is: a Ray of the driver's own is made to measure."""
        return spec

    def start(self, spec: TrainingSpec, spec_uri: str, times: Times | None = None) -> bool:
        """Start the driver; True, for its name is new."""
        return super().start(spec, spec_uri)

    def adopt(self, spec: TrainingSpec) -> bool:
        """False: there is nothing of an earlier try."""
        return False

    def peek(self, spec: TrainingSpec) -> Observation:
        """LOST: there is nothing of an earlier try."""
        return Observation("LOST")

    def trigger(self, progress: Progress, *, finish: bool) -> BaseTrigger:
        """None: a child process needs its worker."""
        raise NotImplementedError("a local attempt is waited for in its worker")

    def wait_within(self, spec: TrainingSpec, watch: LimitWatch) -> Observation | Breach:
        """Wait for the driver to end, or end it for a limit."""
        broken: list[Breach] = []

        def give_up() -> bool:
            broken.extend(filter(None, [watch.check("RUNNING")]))
            return bool(broken)

        seen = self.wait(spec, give_up)
        return broken[0] if broken else seen

    def cancel(self, spec: TrainingSpec) -> None:
        """End the driver."""
        self.stop(spec)

    def close(self, spec: TrainingSpec, failed: bool) -> None:
        """Nothing is held."""

    def show_tail(self, spec: TrainingSpec) -> None:
        """Every line was shown when it was written."""

    def link(self, spec: TrainingSpec) -> dict[str, Any]:
        """There is no dashboard."""
        return {"dashboard_url": None}


class JobsRunner:
    """Attempts as jobs of a Ray cluster.

    :param hook: the cluster
    :param python: Python on the cluster; None: ``python``, or this interpreter if the cluster is on this machine
    :param runtime_env: Ray runtime environment of the job
    :param poll_interval: seconds between two looks
    :param unreachable_timeout: seconds that the dashboard may be away
    :param stop_timeout: seconds that a stopped job has to commit a checkpoint and end
    :param metadata: shown in Ray's dashboard
    :param logs: of the driver's log ``"off"``: nothing, ``"tail"``: the end when the job is over, or ``"live"``: every
        line as it is written
    :param on_line: takes a line of the driver's log, from another thread where the log is live
    :param resources: what the driver reserves: ``entrypoint_num_cpus``, ``entrypoint_num_gpus``,
        ``entrypoint_memory``, ``entrypoint_resources``, ``entrypoint_label_selector``; any lets it leave the head node
    :param limits: of the training, for those who wait in the triggerer
    :param cancel_on_kill: whether they stop the job for a user
    :param multiple_outputs: whether they push each key of the result
    """

    remote = True

    def __init__(
        self,
        hook: RayJobsHook,
        *,
        python: str | None,
        runtime_env: Mapping[str, Any] | None,
        poll_interval: float,
        unreachable_timeout: float,
        stop_timeout: float,
        metadata: Mapping[str, str],
        logs: str = "off",
        on_line: Callable[[str], None] = print,
        resources: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        cancel_on_kill: bool = True,
        multiple_outputs: bool = True,
    ) -> None:
        self.hook = hook
        self._limits, self._cancel_on_kill, self._multiple_outputs = limits, cancel_on_kill, multiple_outputs
        self._python, self._runtime_env, self._metadata = python, dict(runtime_env or {}), dict(metadata)
        self._poll_interval, self._unreachable_timeout = poll_interval, unreachable_timeout
        self._stop_timeout, self._resources = stop_timeout, dict(resources or {})
        self._logs, self._on_line = logs, on_line

    def fitted(self, spec: TrainingSpec) -> TrainingSpec:
        """The spec as it is: what the cluster offers is seen by the driver."""
        check_callables(spec, self._runtime_env)
        return spec

    def start(self, spec: TrainingSpec, spec_uri: str, times: Times | None = None) -> bool:
        """Submit the attempt's driver; a job of its name is adopted, False if that is over already."""
        env_vars = {
            **driver_env(spec, self._stop_timeout),
            # A process less where nobody preempts the machine.
            **({"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"} if self.hook.endpoint.on_this_machine else {}),
            **self._runtime_env.get("env_vars", {}),
        }
        created = self.hook.submit(
            submission_id_of(spec),
            driver_command(spec_uri, self._python or self.hook.python),
            runtime_env={**self._runtime_env, "env_vars": env_vars},
            metadata={**self._metadata, "run_key": spec.run_key, "attempt": str(spec.attempt)},
            **self._resources,
        )
        return created or self.peek(spec).status not in FINAL

    def adopt(self, spec: TrainingSpec) -> bool:
        """True: a job belongs to whoever asks for it by its name."""
        return True

    def peek(self, spec: TrainingSpec) -> Observation:
        """How the attempt is now."""
        return self.hook.observe(submission_id_of(spec))

    def trigger(self, progress: Progress, *, finish: bool) -> RayJobTrigger:
        """What waits for the job without a worker."""
        from airflow_mlops.triggers.ray import RayJobTrigger

        return RayJobTrigger(
            submission_id=submission_id_of(progress.spec),
            ray_conn_id=self.hook.ray_conn_id,
            address=self.hook.address,
            poll_interval=self._poll_interval,
            unreachable_timeout=self._unreachable_timeout,
            cancel_on_kill=self._cancel_on_kill,
            deadline=progress.deadline,
            state=progress.to_json(),
            logs=self._logs,
            limits=None if self._limits is None else self._limits.to_json(),
            times=progress.times.to_json(),
            stop_timeout=self._stop_timeout,
            finish_in_triggerer=finish,
            multiple_outputs=self._multiple_outputs,
        )

    def wait_within(self, spec: TrainingSpec, watch: LimitWatch) -> Observation | Breach:
        """Look until the attempt is over, lost or out of reach, or a limit is broken and it has been stopped.

        :param watch: the limits, and how far the training is
        :raises ExternalSystemError: the attempt has broken a limit and does not end
        """
        with self._live_log(spec):
            end = self._until_over(spec, watch)
            if isinstance(end, Breach):
                self.stop(spec)
        self.show_tail(spec)
        return end

    def _until_over(self, spec: TrainingSpec, watch: LimitWatch) -> Observation | Breach:
        patience, admitted = Patience(self._unreachable_timeout), False
        while True:
            seen: Observation | None = None
            status: str | None = None
            try:
                seen = self.peek(spec)
                status, admitted = seen.status, True
                patience.answered()
            except (ExternalSystemError, AccessRefusedError) as error:
                # A token that was accepted before may be about to be rotated.
                if isinstance(error, AccessRefusedError) and not admitted:
                    raise
                seen = patience.silent(time.monotonic(), str(error))
            if seen is not None and seen.status in FINAL:
                return seen
            if (broken := watch.check(status)) is not None:
                return broken
            time.sleep(self._poll_interval)

    def stop(self, spec: TrainingSpec) -> None:
        """Stop the job and wait until it has ended, for its driver may commit a checkpoint first.

        :raises ExternalSystemError: it has not within the stop timeout and 15 s
        """
        name, deadline, asked = submission_id_of(spec), time.monotonic() + self._stop_timeout + 15, False
        while True:
            why = "still runs"
            try:
                if not asked:
                    self.hook.stop(name)
                    asked = True
                if self.peek(spec).status not in ACTIVE:
                    return
            except ExternalSystemError as error:
                why = str(error)
            if time.monotonic() > deadline:
                raise ExternalSystemError(f"Ray job {name} was asked to stop and has not been seen to end: {why}")
            time.sleep(min(0.5, self._poll_interval))

    def cancel(self, spec: TrainingSpec) -> None:
        """Stop the job."""
        self.stop(spec)

    def close(self, spec: TrainingSpec, failed: bool) -> None:
        """Nothing is held: a job that is over holds nothing of its cluster."""

    def link(self, spec: TrainingSpec) -> dict[str, Any]:
        """Where the dashboard is."""
        return {"dashboard_url": self.hook.endpoint.address}

    def tail(self, spec: TrainingSpec) -> str:
        """The end of the job's log, or why it cannot be had."""
        try:
            return "\n".join(self.hook.logs(submission_id_of(spec)).splitlines()[-LOG_TAIL:])
        except MlopsError as error:
            return f"(the job's log cannot be read: {error})"

    def show_tail(self, spec: TrainingSpec) -> None:
        """Pass on the end of the job's log, if that is how it is to be shown."""
        if self._logs == "tail":
            for line in self.tail(spec).splitlines():
                self._on_line(line)

    @contextmanager
    def _live_log(self, spec: TrainingSpec) -> Iterator[None]:
        """Pass the log on from a thread while the block lasts, and its rest at the end."""
        if self._logs != "live":
            yield
            return
        from airflow_mlops.triggers._training import DRAIN, LogRelay, ended_with

        # Connections are looked up in the thread that runs the task.
        hook = RayJobsHook(endpoint=self.hook.endpoint)
        relay = LogRelay(spec, self._on_line)
        over = threading.Event()
        patience = DRAIN

        async def follow() -> None:
            lines = asyncio.create_task(
                relay.follow(lambda place: hook.alog_lines(submission_id_of(spec), int(place or 0)))
            )
            waited = 0.0
            while not lines.done() and waited < patience:
                await asyncio.wait({lines}, timeout=LOG_LOOK)
                waited += LOG_LOOK if over.is_set() else 0.0
            lines.cancel()
            (end,) = await asyncio.gather(lines, return_exceptions=True)
            if isinstance(end, Exception):
                self._on_line(ended_with(end))

        thread = threading.Thread(target=lambda: asyncio.run(follow()), name="driver-log", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            patience = 0.0  # whoever ends the task is not kept waiting for a log
            raise
        finally:
            over.set()
            thread.join()
