"""Where the hysteresis of a :class:`airflow_mlops.sensors.drift.DriftSensor` is kept between runs."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from airflow_mlops import storage
from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError

if TYPE_CHECKING:
    from airflow_mlops.drift.hysteresis import Decision, Hysteresis

Step = Callable[[Mapping[str, Any] | None], tuple[Any, dict[str, Any]]]
_TRIES = 20


def decide(
    context: Mapping[str, Any],
    limits: Hysteresis,
    model_name: str,
    folder: str,
    score: float | None,
    at: dt.datetime,
    subject: str | None,
) -> Decision:
    """What ``limits`` make of a window's evidence, kept for the next one; see :func:`change`.

    :param folder: of the file
    """
    name = re.sub(r"[^\w.+-]", "_", model_name)
    return change(
        context,
        f"mlops_drift_hysteresis.{name}",
        storage.join(folder, f"{name}.hysteresis.json"),
        lambda state: limits.decide(state, score, at, subject),
    )


def why_held(held: Decision) -> str:
    """Why evidence that asks for a training does not get one, in words."""
    until = f", until {held.until}" if held.until else ""
    why = held.reason or f"the evidence, {held.score:.3g} times what is tolerated, is below the level to arm"
    return f"retraining held back{until}: {why}"


def change(context: Mapping[str, Any], key: str, uri: str, step: Step) -> Any:
    """Replace a state by what ``step`` makes of it; return its answer.

    The state is in the store of the task's asset where it has exactly one among its inlets and outlets, else in a file.

    :param context: Airflow's task context
    :param key: of the state in the asset's store
    :param uri: of the file
    :param step: takes the state, None at first; returns an answer and the new state. May be called again
    """
    store = context.get("asset_state_store")
    try:
        before = None if store is None else store.get(key)
    except ValueError:
        # Several assets, or none that is concrete: which one keeps the state would be a guess.
        store = None
    if store is None:
        return change_file(uri, step)
    answer, after = step(before)
    if after != before:
        store.set(key, after)
    return answer


def change_file(uri: str, step: Step) -> Any:
    """Replace the JSON at ``uri`` by what ``step`` makes of it, if nobody else did in between; return its answer.

    On a local disk this is exact; on an object store the look before the write leaves a gap of one request.

    :raises ExternalSystemError: others were faster each time, or it cannot be written
    :raises InvalidInputError: there is something else than JSON
    """
    for _ in range(_TRIES):
        content = _read(uri)
        try:
            before = None if content is None else json.loads(content)
        except ValueError as error:
            raise InvalidInputError(f"{uri} is no JSON ({error}); delete it to start anew") from error
        answer, after = step(before)
        if after == before or _swap(uri, content, json.dumps(after, sort_keys=True, indent=1).encode()):
            return answer
    raise ExternalSystemError(f"{uri} was changed by others {_TRIES} times in a row; let fewer runs share it")


def _read(uri: str) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        return None


def _swap(uri: str, expected: bytes | None, content: bytes) -> bool:
    """Write ``content`` if ``uri`` still holds ``expected``."""
    if not storage.is_local(uri):
        if _read(uri) != expected:
            return False
        storage.write_bytes(uri, content)
        return True
    import fcntl

    path = storage.local_path(uri)
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = open(f"{path}.lock", "a")  # noqa: SIM115
    except OSError as error:
        raise ExternalSystemError(f"cannot write beside {path}: {error.strerror or error}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if _read(uri) != expected:
            return False
        storage.write_bytes(uri, content)
        return True
