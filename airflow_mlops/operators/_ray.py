"""Where the attempts of :class:`airflow_mlops.operators.ray.RayTrainOperator` run, and how far a try has come."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from airflow_mlops.exceptions import ExternalSystemError, MlopsError
from airflow_mlops.hooks.ray import LOG_TAIL, RayJobsHook
from airflow_mlops.training.decide import ACTIVE, FINAL, Observation, Patience
from airflow_mlops.training.spec import TrainingSpec, submission_id_of


@dataclass(frozen=True)
class Progress:
    """How far one try of the task has come; it travels with the trigger, for a resumed task is a new object.

    :param spec: the attempt that is followed
    :param restarts: attempts of this try that were replaced
    :param adopted: whether an earlier try started the attempt
    :param deadline: Unix time at which ``execution_timeout`` is over, None without
    """

    spec: TrainingSpec
    restarts: int = 0
    adopted: bool = False
    deadline: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain types, for :meth:`from_json`."""
        return {**vars(self), "spec": self.spec.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Progress:
        """The progress behind ``to_json()``."""
        return cls(**{**value, "spec": TrainingSpec.from_json(value["spec"])})


class Runner(Protocol):
    """Where attempts run: starts, follows and stops them; decides nothing."""

    def start(self, spec: TrainingSpec, spec_uri: str) -> bool:
        """Start an attempt, or adopt the one of that name; False if that one is over already."""

    def wait(self, spec: TrainingSpec) -> Observation:
        """Wait until the attempt is over, lost or out of reach."""

    def stop(self, spec: TrainingSpec) -> None:
        """End the attempt and return when it has ended."""

    def tail(self, spec: TrainingSpec) -> str:
        """The end of the driver's log."""


class JobsRunner:
    """Attempts as jobs of a Ray cluster.

    :param hook: the cluster
    :param python: Python on the cluster; None: ``python``, or this interpreter if the cluster is on this machine
    :param runtime_env: Ray runtime environment of the job
    :param poll_interval: seconds between two looks
    :param unreachable_timeout: seconds that the dashboard may be away
    :param stop_timeout: seconds that a stopped job has to end
    :param metadata: shown in Ray's dashboard
    """

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
    ) -> None:
        self.hook = hook
        self._python, self._runtime_env, self._metadata = python, dict(runtime_env or {}), dict(metadata)
        self._poll_interval, self._unreachable_timeout = poll_interval, unreachable_timeout
        self._stop_timeout = stop_timeout

    def start(self, spec: TrainingSpec, spec_uri: str) -> bool:
        """Submit the attempt's driver; a job of its name is adopted, False if that is over already."""
        threads = int((spec.resources_per_worker or {}).get("CPU", 1)) or 1
        env_vars = {
            # Ray kills a stopped job after 3 s unless told otherwise.
            "RAY_JOB_STOP_WAIT_TIME_S": str(int(self._stop_timeout)),
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            # A process less where nobody preempts the machine.
            **({"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"} if self._on_this_machine else {}),
            **self._runtime_env.get("env_vars", {}),
        }
        created = self.hook.submit(
            submission_id_of(spec),
            f"exec {shlex.quote(self._interpreter())} -m airflow_mlops.training --spec {shlex.quote(spec_uri)}",
            runtime_env={**self._runtime_env, "env_vars": env_vars},
            metadata={**self._metadata, "run_key": spec.run_key, "attempt": str(spec.attempt)},
        )
        return created or self.peek(spec).status not in FINAL

    def peek(self, spec: TrainingSpec) -> Observation:
        """How the attempt is now."""
        return self.hook.observe(submission_id_of(spec))

    def wait(self, spec: TrainingSpec) -> Observation:
        """Look until the attempt is over, lost or out of reach."""
        patience = Patience(self._unreachable_timeout)
        while True:
            seen: Observation | None
            try:
                seen = self.peek(spec)
                patience.answered()
            except ExternalSystemError as error:
                seen = patience.silent(time.monotonic(), str(error))
            if seen is not None and seen.status in FINAL:
                return seen
            time.sleep(self._poll_interval)

    def stop(self, spec: TrainingSpec) -> None:
        """Stop the job and wait until it has ended.

        :raises ExternalSystemError: it has not within the stop timeout and 15 s
        """
        self.hook.stop(submission_id_of(spec))
        deadline = time.monotonic() + self._stop_timeout + 15
        while self.peek(spec).status in ACTIVE:
            if time.monotonic() > deadline:
                raise ExternalSystemError(f"Ray job {submission_id_of(spec)} was asked to stop and still runs")
            time.sleep(0.5)

    def tail(self, spec: TrainingSpec) -> str:
        """The end of the job's log, or why it cannot be had."""
        try:
            return "\n".join(self.hook.logs(submission_id_of(spec)).splitlines()[-LOG_TAIL:])
        except MlopsError as error:
            return f"(the job's log cannot be read: {error})"

    @property
    def _on_this_machine(self) -> bool:
        return urlsplit(self.hook.endpoint.address).hostname in ("127.0.0.1", "localhost", "::1")

    def _interpreter(self) -> str:
        return self._python or (sys.executable if self._on_this_machine else "python")
