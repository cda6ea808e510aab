"""A window's profile from a job on a Ray cluster."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from airflow_mlops import storage
from airflow_mlops.exceptions import DataError, ExternalSystemError, InvalidInputError
from airflow_mlops.training.decide import Patience

if TYPE_CHECKING:
    from airflow_mlops.drift import Profile
    from airflow_mlops.hooks.ray import Job

OPTIONS = ("num_cpus", "runtime_env", "python", "poll_interval")
#: Seconds that the dashboard may be away.
UNREACHABLE_TIMEOUT = 300.0
_LOG_LINES = 30
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class ProfileJob:
    """Profiles data on the cluster of a ``ray`` connection, by Ray Data.

    The job's name follows from what is asked for, so that a try after a lost worker goes on with the job of the one
    before. A task that is killed, or runs out of time, stops its job. What an earlier job has left is not taken for
    this one's.

    :param log: of the task
    :param ray_conn_id: connection of type ``ray``
    :param options: ``num_cpus`` of each of its tasks, the job's ``runtime_env``, ``python``, the cluster's interpreter
        (this one if the cluster is on this machine, else ``python``), ``poll_interval`` in seconds
    :raises InvalidInputError: an option that there is not, or that is no number
    """

    def __init__(self, log: Any, ray_conn_id: str, options: Mapping[str, Any]) -> None:
        from airflow_mlops.hooks.ray import RayJobsHook

        check_options(options)
        self._log, self._hook, self._options = log, RayJobsHook(ray_conn_id), options
        self._name: str | None = None
        self._killed = False

    def profile(self, uri: str, columns: Sequence[str], categorical: Sequence[str], output: str) -> Profile:
        """The profile of ``uri``, bit for bit that of one process.

        :param output: where the job leaves the profile; workers of Ray and of Airflow must both reach it, and ``uri``
        :raises DataError: the data cannot be profiled
        :raises ExternalSystemError: the job failed, or the cluster does not answer
        """
        from airflow_mlops.drift import Profile

        spec: dict[str, Any] = {"uri": _absolute(uri), "columns": list(columns), "categorical": list(categorical)}
        spec |= {"output": _absolute(output), "num_cpus": float(self._options.get("num_cpus", 1))}
        try:
            job = self._run(spec)
        except ExternalSystemError:
            raise
        except BaseException:
            self.stop()
            raise
        name = job.submission_id
        if job.status != "SUCCEEDED":
            raise ExternalSystemError(f"the job {name} has {job.status}: {self._why(job)}")
        found: dict[str, Any] = {}
        with suppress(FileNotFoundError):
            found = storage.read_json(output)
        if found.get("job") != name:
            raise ExternalSystemError(
                f"the job {name} left nothing that can be seen at {output}; report_dir must be storage that Ray's "
                "workers and Airflow's share"
            )
        if "error" in found:
            raise DataError(
                f"{found['error']} (So says the job {name} on Ray, whose workers must reach the same storage as "
                "Airflow's.)"
            )
        profile = Profile.from_json(found["profile"])
        return Profile(profile.rows, {name: profile.columns[name] for name in columns})

    def stop(self) -> None:
        """Stop the job, as its task is killed."""
        self._killed = True
        if self._name is not None:
            try:
                self._hook.stop(self._name)
            except Exception as error:
                self._log.warning("the job %s is not stopped: %s", self._name, error)

    def _run(self, spec: Mapping[str, Any]) -> Job:
        """The job, over."""
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
        while True:
            name = self._name = _current(self._hook, f"mlops-drift-{digest}")
            arguments = [self._options.get("python") or self._hook.python, "-m", "airflow_mlops.drift"]
            # exec: what Ray stops is the job itself, not a shell around it.
            entrypoint = f"exec {shlex.join([*arguments, json.dumps({**spec, 'job': name})])}"
            ours = self._hook.submit(name, entrypoint, runtime_env=dict(self._options.get("runtime_env") or {}))
            self._log.info("%s %s", "submitted" if ours else "going on with", name)
            if self._killed:  # while it was being submitted, when there was nothing to stop yet
                self.stop()
            job = self._until_over(name)
            if ours or job.status != "STOPPED":
                return job
            self._log.info("%s was stopped, with the task that had submitted it", name)

    def _until_over(self, name: str) -> Job:
        patience = Patience(UNREACHABLE_TIMEOUT)
        while True:
            if self._killed:
                raise ExternalSystemError(f"the job {name} is being stopped, as its task was killed")
            try:
                job = self._hook.look(name)
                patience.answered()
            except ExternalSystemError as error:
                if (over := patience.silent(time.monotonic(), str(error))) is not None:
                    raise ExternalSystemError(over.message) from error
            else:
                if job.status in _ENDED:
                    return job
                if job.status == "LOST":
                    raise ExternalSystemError(f"the cluster no longer knows the job {name}; was it restarted?")
            time.sleep(float(self._options.get("poll_interval", 2)))

    def _why(self, job: Job) -> str:
        """What Ray says of a job that failed, and the end of its log."""
        if job.exit_code is None:
            return job.message
        # The message of a driver that ended by itself is a part of its log.
        with suppress(ExternalSystemError):
            lines = _COLOURS.sub("", self._hook.logs(job.submission_id)).splitlines()[-_LOG_LINES:]
            return "\n".join([f"its driver ended with exit code {job.exit_code}. The end of its log:", *lines])
        return job.message


def check_options(options: Mapping[str, Any]) -> None:
    """:raises InvalidInputError: an option that there is not, or that is no number above 0"""
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise InvalidInputError(f"unknown engine_options: {', '.join(unknown)}; for ray there are {', '.join(OPTIONS)}")
    for name in ("num_cpus", "poll_interval"):
        try:
            positive = float(options.get(name, 1)) > 0
        except (TypeError, ValueError):
            positive = False
        if not positive:
            raise InvalidInputError(f"engine_options: {name} is {options[name]!r}; expected a number above 0")


def _absolute(uri: str) -> str:
    """A local path as it is from any folder: the job runs in another one."""
    return os.path.abspath(storage.local_path(uri)) if storage.is_local(uri) else uri


def _current(hook: Any, base: str) -> str:
    """The name of the job that still runs, else of the next one."""
    number = 0
    while hook.look(f"{base}-{number}").status in _ENDED:
        number += 1
    return f"{base}-{number}"
