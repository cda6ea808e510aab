"""A command as the training: the driver runs it in place of a Ray Train loop, under the same fence and result.

The command finds in its environment

- ``MLOPS_RESULT``: a file it may write before it ends, JSON with any of ``metrics`` (an object), ``checkpoint_uri`` and
  ``model_uri`` (an MLflow model directory);
- ``MLOPS_CONFIG``: the run's config, JSON; ``MLOPS_NUM_WORKERS``: ``4`` or ``2,4``; ``MLOPS_ATTEMPT``: 1, 2, ...;
- ``MLOPS_RUN_DIR``, and as its two parts ``MLOPS_STORAGE_PATH`` and ``MLOPS_RUN_KEY``: with these as ``storage_path``
  and ``name`` of its ``RunConfig`` a command that uses Ray Train resumes by itself;
- ``MLOPS_CHECKPOINT``: the last checkpoint committed there, empty before the first.

With ``stall_timeout`` a command must show that it moves: by Ray Train's checkpoints as above, or by writing any file
directly into ``MLOPS_RUN_DIR``.

Exit code 0 is success. Being killed by a signal, or exit code 75 (``EX_TEMPFAIL`` of sysexits.h), is blamed on the
machine, anything else on the command. A stop sends SIGTERM to the command and all it has started.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from airflow_mlops.exceptions import InvalidInputError, TrainingError
from airflow_mlops.training.result import finite
from airflow_mlops.training.runs import committed_checkpoint
from airflow_mlops.training.spec import TrainingSpec

log = logging.getLogger(__name__)

EX_TEMPFAIL = 75
#: Signals by which a machine ends a process; others are of the process's own making.
MACHINE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
#: Of the time before the driver is killed, seconds that it keeps to write its own result.
RESERVE = 3.0
RESULT_KEYS = ("metrics", "checkpoint_uri", "model_uri")
_WATCHER = "import os,sys; sys.stdin.buffer.read(); os.killpg(int(sys.argv[1]), 9)"


class CommandLost(Exception):
    """The command was ended by its machine, or says that the machine is to blame."""


def run_command(spec: TrainingSpec) -> dict[str, Any]:
    """Run ``spec.entrypoint`` to its end; returns ``{"metrics", "checkpoint_uri", "model_uri"}``.

    :raises TrainingError: it failed
    :raises CommandLost: it was killed, or asked to be run again
    :raises InvalidInputError: what it wrote to ``MLOPS_RESULT`` is not what is expected
    :raises KeyboardInterrupt: it was stopped, and has ended
    """
    assert spec.entrypoint is not None
    with tempfile.TemporaryDirectory(prefix="mlops-") as folder:
        path = os.path.join(folder, "result.json")
        process = subprocess.Popen(
            ["/bin/sh", "-c", spec.entrypoint], env={**os.environ, **_environment(spec, path)}, start_new_session=True
        )
        watcher = _watch(process.pid)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut off what the command writes
            log.warning("stopping the command")
            _stop(process, max(spec.stop_timeout - RESERVE, 1.0))
            raise
        finally:
            # What it has left running would be nobody's.
            _signal_group(process.pid, signal.SIGKILL)
            watcher.kill()
            watcher.wait()
        _check(code)
        reported = read_reported(path)
    checkpoint = reported.get("checkpoint_uri") or committed_checkpoint(spec)
    return {
        "metrics": finite(reported.get("metrics") or {}),
        "checkpoint_uri": checkpoint,
        "model_uri": reported.get("model_uri"),
    }


def read_reported(path: str) -> Mapping[str, Any]:
    """What the command wrote to ``path``, checked; nothing if it wrote nothing.

    :raises InvalidInputError: says what is wrong with it
    """
    try:
        with open(path, "rb") as file:
            value = json.load(file)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InvalidInputError(f"the command wrote no JSON to MLOPS_RESULT: {error}") from error
    wanted = 'a JSON object with any of "metrics", "checkpoint_uri" and "model_uri"'
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"the command wrote a {type(value).__name__} to MLOPS_RESULT; expected {wanted}")
    if unknown := sorted(set(value) - set(RESULT_KEYS)):
        raise InvalidInputError(f"the command wrote {unknown[0]!r} to MLOPS_RESULT; expected {wanted}")
    if not isinstance(value.get("metrics") or {}, Mapping):
        raise InvalidInputError("the command wrote metrics to MLOPS_RESULT that are not an object of names and numbers")
    for name in ("checkpoint_uri", "model_uri"):
        if value.get(name) is not None and not isinstance(value[name], str):
            raise InvalidInputError(f"the command wrote {name} {value[name]!r} to MLOPS_RESULT; expected a URI")
    return value


def _environment(spec: TrainingSpec, path: str) -> dict[str, str]:
    workers = str(spec.num_workers) if isinstance(spec.num_workers, int) else f"{spec.min_workers},{spec.max_workers}"
    return {
        "MLOPS_RESULT": path,
        "MLOPS_CONFIG": json.dumps(dict(spec.config)),
        "MLOPS_NUM_WORKERS": workers,
        "MLOPS_ATTEMPT": str(spec.attempt),
        "MLOPS_RUN_DIR": spec.run_dir,
        "MLOPS_STORAGE_PATH": spec.storage_path,
        "MLOPS_RUN_KEY": spec.run_key,
        "MLOPS_CHECKPOINT": committed_checkpoint(spec) or "",
    }


def _watch(group: int) -> subprocess.Popen[bytes]:
    """A process that kills the group as soon as this one is gone, however it ends: else the command would train on,
    unseen by the next attempt."""
    command = [sys.executable, "-S", "-c", _WATCHER, str(group)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)


def _stop(process: subprocess.Popen[bytes], grace: float) -> None:
    _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    # The shell ends at once: what it has started is still writing its checkpoint.
    while _alive(process.pid):
        if time.monotonic() >= deadline:
            log.warning("the command has not ended within %.0f s of SIGTERM and is killed", grace)
            break
        time.sleep(0.1)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _alive(group: int) -> bool:
    import psutil

    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except (psutil.Error, OSError):
            continue
    return False


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


def _check(code: int) -> None:
    if code == 0:
        return
    number = -code if code < 0 else code - 128  # a shell reports the signal that ended its child as 128 and more
    if number in set(MACHINE):
        raise CommandLost(f"the command was ended by {signal.Signals(number).name}, though nobody asked for a stop")
    if code == EX_TEMPFAIL:
        raise CommandLost(f"the command ended with {EX_TEMPFAIL}, a temporary failure")
    raise TrainingError(f"the command ended with exit code {code}; its own output above says why")
