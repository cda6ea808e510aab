"""The run directory as the memory of a run: which attempt is the last one, and what may be reused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from airflow_mlops import storage
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.fence import read_owner
from airflow_mlops.training.result import TrainingResult, read_result
from airflow_mlops.training.spec import TrainingSpec

#: Which tries of which task trained with ``fresh`` here.
_OPENED = "opened.json"


@dataclass(frozen=True)
class Plan:
    """How to go on in a run directory.

    :param finished: the result to return as it is, if the run is finished
    :param previous: number of the last attempt that was begun, 0 if none; it may still be running
    :param adoptable: whether that attempt trains what is wanted now, so that it may be followed
    :param wipe: why what is there must be removed before training, None to keep and resume from it
    """

    finished: TrainingResult | None
    previous: int
    adoptable: bool
    wipe: str | None


def open_run(spec: TrainingSpec, fresh: bool = False, opened_by: str | None = None) -> Plan:
    """Look into the run directory.

    A finished run of the same train_fn, trainer and config is returned; with ``fresh`` it is trained again, unless an
    earlier try of ``opened_by`` has trained it. An unfinished one is resumed, ``fresh`` or not, or a retry would throw
    away what the first try has trained.

    :param opened_by: names the task and its tries up to the next time it is cleared; with ``fresh`` it is written down,
        here or, where the run must be removed first, by :func:`wipe_run`; None: not known, each try counts by itself
    :raises InvalidInputError: a file in the run directory is not what it should be
    """
    plan = _plan(spec, fresh and (opened_by is None or _opened_by(spec) != opened_by))
    if fresh and opened_by is not None and plan.wipe is None:
        storage.write_json(spec.file(_OPENED), {"opened_by": opened_by})
    return plan


def _plan(spec: TrainingSpec, fresh: bool) -> Plan:
    result, last = read_result(spec), _last_attempt(spec)
    previous = int(last.get("attempt", 0))
    same = last.get("fingerprint") == spec.fingerprint
    finished = result is not None and result.succeeded
    if finished and result is not None and result.fingerprint == spec.fingerprint and not fresh:
        return Plan(result, previous, False, None)
    if previous and not same:
        wipe = "it holds a run of another train_fn, trainer, config or exporter"
    elif finished:
        wipe = "the run is finished and is to be trained again" if fresh else "its result belongs to another config"
    else:
        wipe = None
    return Plan(None, previous, bool(previous) and wipe is None, wipe)


def begin_attempt(spec: TrainingSpec, *, began: float | None = None, run_began: float | None = None) -> str:
    """Write down attempt ``spec.attempt`` before anything is started for it; returns the URI of its spec.

    :param began: Unix time at which the attempt begins
    :param run_began: Unix time at which its task began training, earlier attempts of the task included
    """
    uri = storage.write_json(spec.file(f"spec-a{spec.attempt}.json"), spec.to_json())
    entry = {
        "attempt": spec.attempt,
        "fingerprint": spec.fingerprint,
        "began": began,
        "run_began": run_began if run_began is not None else began,
        # The attempt's own driver will go on counting from here.
        "gpu_seconds": _told(spec),
    }
    storage.write_json(spec.file("attempt.json"), entry)
    return uri


def told_before(spec: TrainingSpec) -> float | None:
    """GPU-seconds that earlier drivers of the run had told of when attempt ``spec.attempt`` began; None if not known.

    :raises InvalidInputError: the file that says so is damaged
    """
    last = _last_attempt(spec)
    return last.get("gpu_seconds") if last.get("attempt") == spec.attempt else None


def began_at(spec: TrainingSpec) -> tuple[float, float] | None:
    """Unix times at which attempt ``spec.attempt`` and the run of its task began, for who adopts it; None if not known.

    :raises InvalidInputError: the file that says so is damaged
    """
    last = _last_attempt(spec)
    began, run_began = last.get("began"), last.get("run_began")
    if last.get("attempt") != spec.attempt or began is None or run_began is None:
        return None
    return float(began), float(run_began)


def last_progress(spec: TrainingSpec) -> float | None:
    """Unix time, by the storage's clock, at which the run last committed something; None before that.

    Ray Train replaces a snapshot directly in a run's directory with every checkpoint, and each trial of a search has a
    directory of its own and a record of its end. What lies in other folders may be half-written.

    :raises InvalidInputError: the storage does not say when a file was written
    """
    import fsspec

    fs, path = fsspec.core.url_to_fs(spec.run_dir)
    fs.invalidate_cache()
    trials = storage.join(path, "trials")
    folders = [path, storage.join(path, "_mlops", "trials")]
    folders += [entry["name"] for entry in _entries(fs, trials) if entry["type"] == "directory"]
    files = [entry for folder in folders for entry in _entries(fs, folder) if entry["type"] == "file"]
    return max((_modified(fs, entry) for entry in files), default=None)


def _entries(fs: Any, folder: str) -> list[Mapping[str, Any]]:
    try:
        return fs.ls(folder, detail=True)
    except FileNotFoundError:
        return []


def _modified(fs: Any, entry: Mapping[str, Any]) -> float:
    # Each filesystem has a name of its own for it.
    names = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
    value = next((entry[name] for name in names if entry.get(name) is not None), None)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
    if not isinstance(value, int | float):
        raise InvalidInputError(
            f"{type(fs).__name__} does not say when {entry['name']} was written, so whether training still moves "
            "cannot be seen; set stall_timeout to None, or use another storage_path"
        )
    return float(value)


def wipe_run(spec: TrainingSpec, opened_by: str | None = None) -> None:
    """Remove checkpoints, model and results of the run directory, keeping the count of attempts.

    The names of attempts must not be given out twice: a Ray cluster remembers them.

    :param opened_by: for whom, see :func:`open_run`
    """
    import fsspec

    fs, path = fsspec.core.url_to_fs(spec.run_dir)
    if fs.exists(path):
        keep, result = (fsspec.core.url_to_fs(spec.file(name))[1] for name in ("attempt.json", "result.json"))
        own = fs.ls(storage.join(path, "_mlops"), detail=False) if fs.exists(storage.join(path, "_mlops")) else []
        there = [entry for entry in fs.ls(path, detail=False) if not entry.rstrip("/").endswith("/_mlops")]
        # The result last: while it is there a wipe that was cut short is done again.
        for entry in sorted((*there, *own), key=lambda entry: entry == result):
            if entry != keep:
                fs.rm(entry, recursive=True)
    if opened_by is not None:
        storage.write_json(spec.file(_OPENED), {"opened_by": opened_by})


def _opened_by(spec: TrainingSpec) -> str | None:
    try:
        return storage.read_json(spec.file(_OPENED)).get("opened_by")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise InvalidInputError(f"{spec.file(_OPENED)} is damaged ({error}). {_REMEDY}") from error


def committed_checkpoint(spec: TrainingSpec) -> str | None:
    """URI of the last committed checkpoint, as Ray Train's snapshot names it; None before the first.

    The newest directory is no evidence: an attempt that was killed can leave one that was not committed.

    :raises InvalidInputError: the snapshot is damaged, or names a checkpoint that is gone
    """
    uri = storage.join(spec.run_dir, "checkpoint_manager_snapshot.json")
    try:
        latest = storage.read_json(uri).get("latest_checkpoint_result")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise InvalidInputError(f"{uri} is damaged ({error}). {_REMEDY}") from error
    if not latest:
        return None
    checkpoint = storage.join(spec.run_dir, latest["checkpoint_dir_name"])
    if not storage.exists(checkpoint):
        raise InvalidInputError(f"the checkpoint {checkpoint} named by the run's snapshot is gone. {_REMEDY}")
    return checkpoint


def _told(spec: TrainingSpec) -> float | None:
    try:
        owner = read_owner(spec)
    except (ValueError, TypeError, KeyError):  # damaged: no reason not to train
        return None
    return owner.usage.gpu_seconds if owner is not None else 0.0


_REMEDY = "Remove the run directory to train from the start, or restore it; a new run_key also starts afresh."


def _last_attempt(spec: TrainingSpec) -> Mapping[str, Any]:
    uri = spec.file("attempt.json")
    try:
        value = storage.read_json(uri)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InvalidInputError(f"{uri} is damaged ({error}). {_REMEDY}") from error
    return value
