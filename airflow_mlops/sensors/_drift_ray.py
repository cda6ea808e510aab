"""A window's profile from a job on a Ray cluster."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from airflow_mlops import storage
from airflow_mlops.exceptions import DataError, ExternalSystemError, InvalidInputError

if TYPE_CHECKING:
    from airflow_mlops.drift import Profile

OPTIONS = ("num_cpus", "runtime_env", "poll_interval")
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def profile_by_job(
    log: Any, ray_conn_id: str, uri: str, columns: Sequence[str], categorical: Sequence[str], output: str,
    options: Mapping[str, Any],
) -> Profile:  # fmt: skip
    """Profile ``uri`` on the cluster of a ``ray`` connection, by Ray Data.

    The job's name follows from what is asked for, so that a try after a lost worker goes on with the job of the one
    before. A task that is killed, or runs out of time, stops its job. What an earlier job has left is not taken for
    this one's.

    :param output: where the job leaves the profile; workers of Ray and of Airflow must both reach it, and ``uri``
    :param options: ``num_cpus`` of each of its tasks, the job's ``runtime_env``, ``poll_interval`` in seconds
    :raises DataError: the data cannot be profiled
    :raises ExternalSystemError: the job failed, or the cluster does not answer
    """
    from airflow_mlops.drift import Profile
    from airflow_mlops.hooks.ray import RayJobsHook

    if unknown := sorted(set(options) - set(OPTIONS)):
        raise InvalidInputError(f"unknown engine_options: {', '.join(unknown)}; for ray there are {', '.join(OPTIONS)}")
    hook = RayJobsHook(ray_conn_id)
    spec: dict[str, Any] = {"uri": uri, "columns": list(columns), "categorical": list(categorical), "output": output}
    spec["num_cpus"] = float(options.get("num_cpus", 1))
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    name = _current(hook, f"mlops-drift-{digest}")
    entrypoint = f"python -m airflow_mlops.drift {shlex.quote(json.dumps({**spec, 'job': name}))}"
    if hook.submit(name, entrypoint, runtime_env=dict(options.get("runtime_env") or {})):
        log.info("submitted %s", name)
    try:
        while (job := hook.look(name)).status not in _ENDED:
            if job.status == "LOST":
                raise ExternalSystemError(f"the cluster no longer knows the job {name}; was it restarted?")
            time.sleep(float(options.get("poll_interval", 2)))
    except ExternalSystemError:
        raise
    except BaseException:
        with suppress(Exception):
            hook.stop(name)
        raise
    if job.status != "SUCCEEDED":
        raise ExternalSystemError(f"the job {name} has {job.status}: {job.message}\n{_end_of_log(hook, name)}")
    found: dict[str, Any] = {}
    with suppress(FileNotFoundError):
        found = storage.read_json(output)
    if found.get("job") != name:
        raise ExternalSystemError(
            f"the job {name} left nothing that can be seen at {output}; report_dir must be storage that Ray's workers "
            "and Airflow's share"
        )
    if "error" in found:
        raise DataError(found["error"])
    return Profile.from_json(found["profile"])


def _current(hook: Any, base: str) -> str:
    """The name of the job that still runs, else of the next one."""
    number = 0
    while hook.look(f"{base}-{number}").status in _ENDED:
        number += 1
    return f"{base}-{number}"


def _end_of_log(hook: Any, name: str) -> str:
    with suppress(ExternalSystemError):
        return "\n".join(hook.logs(name).splitlines()[-20:])
    return ""
