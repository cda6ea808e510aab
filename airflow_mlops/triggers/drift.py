"""Triggers around drift: waiting for a window's data, and telling Airflow of a verdict. Neither computes drift."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseEventTrigger, BaseTrigger, TriggerEvent

from airflow_mlops import storage
from airflow_mlops.exceptions import ExternalSystemError

REPORT_SUFFIX = ".drift.json"
_DATA = (".parquet", ".pq", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
_CURSOR = "mlops_drift_reports"
# The triggerer hands events to the database about once a second; a cursor saved sooner could lose one in a crash.
_FLUSH_SECONDS = 2.0


def data_ready(uri: str) -> bool:
    """Whether there are data at ``uri``: a file, a directory with Parquet or CSV, or a glob with a match."""
    fs, path = storage.fresh_filesystem(uri)
    with storage.remote_errors(uri):
        if any(mark in path for mark in "*?["):
            return bool(fs.glob(path))
        if fs.isdir(path):
            files = (name[len(path) :].split("/") for name in fs.find(path) if name.lower().endswith(_DATA))
            # What jobs hide behind a dot or an underscore is not there yet.
            return any(not any(part[:1] in "._" for part in parts if part) for parts in files)
        return bool(fs.exists(path))


class DataReadyTrigger(BaseTrigger):
    """Waits until there are data at a place; used by :class:`airflow_mlops.sensors.drift.DriftSensor`.

    :param uri: file, directory or glob; path or URI
    :param poll_interval: seconds between two looks
    :param delay: seconds before the first look
    """

    def __init__(self, uri: str, poll_interval: float = 60.0, delay: float = 0.0) -> None:
        super().__init__()
        self.uri = uri
        self.poll_interval = poll_interval
        self.delay = delay

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """The class path and the arguments to make it again."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {"uri": self.uri, "poll_interval": self.poll_interval, "delay": self.delay},
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Fire once, with ``{"status": "ready", "uri": ...}``."""
        await asyncio.sleep(self.delay)
        while not await self._ready():
            await asyncio.sleep(self.poll_interval)
        yield TriggerEvent({"status": "ready", "uri": self.uri})

    async def _ready(self) -> bool:
        try:
            return await asyncio.to_thread(data_ready, self.uri)
        except (OSError, ExternalSystemError) as error:
            self.log.warning("cannot look at %s: %s; trying again in %s s", self.uri, error, self.poll_interval)
            return False


class DriftEventTrigger(BaseEventTrigger):
    """For an ``AssetWatcher``: one event for each new report of a :class:`DriftSensor` that asks for retraining.

    The event's payload is ``{"window", "verdict", "report_uri", "model"}``. A report that is written again with
    another content is new; one written again with the same content is not. Which reports were told is kept in the
    asset's state store, so that a restarted triggerer neither repeats nor loses one; at the very first start, and
    where there is no such store (two assets watched by one trigger: give each its own ``name``), only reports
    written from then on count. After a crash in the two seconds around an event, that event can come twice.

    :param report_dir: the sensors' ``report_dir``, a folder or URI, searched with its subfolders
    :param model_name: only reports on this registered model
    :param poll_interval: seconds between two looks
    :param name: distinguishes triggers that would otherwise be equal, and so be run as one
    """

    def __init__(
        self,
        report_dir: str,
        model_name: str | None = None,
        poll_interval: float = 30.0,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.report_dir = report_dir
        self.model_name = model_name
        self.poll_interval = poll_interval
        self.name = name

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """The class path and the arguments to make it again; nothing of what was seen."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "report_dir": self.report_dir,
                "model_name": self.model_name,
                "poll_interval": self.poll_interval,
                "name": self.name,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Fire for each new report, for ever."""
        store, told = await self._load()
        looked: dict[str, tuple[Any, dict[str, Any] | None]] = {}
        while True:
            found = await self._scan(looked)
            if found is not None:
                if told is None:
                    told = {name: report["digest"] for name, report in found.items()}
                    await self._save(store, told)
                for name, report in sorted(found.items(), key=_by_window):
                    if told.get(name) != report["digest"]:
                        yield TriggerEvent(report["payload"])
                        await asyncio.sleep(_FLUSH_SECONDS)
                        told[name] = report["digest"]
                        await self._save(store, told)
                # What was deleted is forgotten, so that the cursor stays as small as the folder.
                told = {name: digest for name, digest in told.items() if name in found}
            await asyncio.sleep(self.poll_interval)

    async def _load(self) -> tuple[Any, dict[str, str] | None]:
        """The state store, or None where there is none, and the reports told, or None at the very first start."""
        store = self.asset_state_store
        if store is None:
            return None, None
        try:
            value = await store.aget(_CURSOR)
        except ValueError as error:
            self.log.warning("no state store for the cursor (%s): reports written while this is down are missed", error)
            return None, None
        return store, {name: str(digest) for name, digest in value.items()} if isinstance(value, dict) else None

    async def _save(self, store: Any, told: dict[str, str]) -> None:
        if store is not None:
            await store.aset(_CURSOR, dict(told))

    async def _scan(self, looked: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
        """The reports that ask for retraining by name, or None when the folder cannot be read now."""
        try:
            return await asyncio.to_thread(_reports, self.report_dir, self.model_name, looked)
        except FileNotFoundError:
            return {}
        except (OSError, ExternalSystemError) as error:
            self.log.warning("cannot look at %s: %s; trying again in %s s", self.report_dir, error, self.poll_interval)
            return None


def _by_window(item: tuple[str, dict[str, Any]]) -> tuple[str, str]:
    return str((item[1]["payload"]["window"] or {}).get("start", "")), item[0]


def _reports(report_dir: str, model_name: str | None, looked: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Reports that ask for retraining; ``looked`` remembers unchanged files, so that they are not read again."""
    fs, root = storage.fresh_filesystem(report_dir)
    with storage.remote_errors(report_dir):
        files = fs.find(root, detail=True) if fs.exists(root) else {}
    found = {}
    for path, info in files.items():
        if not path.endswith(REPORT_SUFFIX):
            continue
        mark = [str(info.get(key)) for key in ("size", "mtime", "ino", "ETag", "LastModified", "updated")]
        if path not in looked or looked[path][0] != mark:
            uri = path if storage.is_local(report_dir) else fs.unstrip_protocol(path)
            looked[path] = (mark, _read(storage.read_bytes(uri), uri))
        report = looked[path][1]
        if report and (model_name is None or report["payload"]["model"] == model_name):
            found[path.removeprefix(root).lstrip("/")] = report
    return found


def _read(content: bytes, uri: str) -> dict[str, Any] | None:
    """The event a report asks for, or None when it asks for none or is no report."""
    try:
        report = json.loads(content)
        if report["retrain"] is not True:
            return None
        payload = {
            "window": report["window"],
            "verdict": report["verdict"],
            "report_uri": uri,
            "model": report["model"]["name"],
        }
    except (ValueError, KeyError, TypeError):
        return None
    return {"digest": hashlib.sha256(content).hexdigest()[:16], "payload": payload}
