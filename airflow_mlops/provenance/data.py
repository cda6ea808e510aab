"""Whether the data that a model was trained on are still what its record says."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from airflow_mlops import storage
from airflow_mlops.exceptions import DataError, InvalidInputError
from airflow_mlops.provenance.record import ModelRecord


@dataclass(frozen=True)
class DataFinding:
    """One dataset of a record, looked at again.

    :param what: ``training_set`` or ``snapshot``
    :param where: path or URI
    :param status: ``same``; ``grown``: only files were added; ``changed``; ``gone``; ``unknown``: the record or this
        machine does not say
    :param recorded: hash in the record
    :param found: hash now, None where there is none
    :param changed: files of the snapshot with another content, up to 20; empty where only the whole is known
    :param removed: files that are gone, up to 20
    :param added: files that were not there, up to 20
    """

    what: str
    where: str | None
    status: str
    recorded: str | None
    found: str | None
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def intact(self) -> bool:
        """Whether everything the model learned from is still there, unchanged."""
        return self.status in ("same", "grown")

    def __str__(self) -> str:
        parts = [f"{name} {list(files)}" for name in ("changed", "removed", "added") if (files := getattr(self, name))]
        detail = f": {'; '.join(parts)}" if parts else ""
        return f"{self.what} {self.where} is {self.status} (recorded {self.recorded}, now {self.found}){detail}"


def check_data(record: ModelRecord) -> list[DataFinding]:
    """Hash the training set and, where it lies on this machine, the snapshot's folder, and compare with the record."""
    return [_training_set(record), _snapshot(record)]


def require_data(record: ModelRecord) -> None:
    """Refuse data that are not what the model was trained on.

    :raises DataError: what changed, and where
    """
    if wrong := [str(finding) for finding in check_data(record) if not finding.intact]:
        raise DataError(
            f"the data of {record.model} version {record.version} are not what it was trained on: {'; '.join(wrong)}. "
            f"Restore the snapshot {record.get('data.snapshot.md5')} from {record.get('data.snapshot.remote')}."
        )


def _training_set(record: ModelRecord) -> DataFinding:
    uri, recorded = record.get("data.training_set.uri"), record.get("data.training_set.sha256")
    if not uri or not recorded:
        return DataFinding("training_set", uri, "unknown", recorded, None)
    try:
        found = hashlib.sha256(storage.read_bytes(uri)).hexdigest()
    except FileNotFoundError:
        return DataFinding("training_set", uri, "gone", recorded, None)
    return DataFinding("training_set", uri, "same" if found == recorded else "changed", recorded, found)


def _snapshot(record: ModelRecord) -> DataFinding:
    path, recorded = record.get("data.snapshot.path"), record.get("data.snapshot.md5")
    if not path or not recorded or not storage.is_local(path):
        return DataFinding("snapshot", path, "unknown", recorded, None)
    if not os.path.exists(path):
        return DataFinding("snapshot", path, "gone", recorded, None)
    found, files = dvc_hash(path)
    if found == recorded:
        return DataFinding("snapshot", path, "same", recorded, found)
    before = _listing(record.get("data.snapshot.uri"))
    if before is None or files is None:
        return DataFinding("snapshot", path, "changed", recorded, found)
    changed = sorted(name for name in before.keys() & files.keys() if before[name] != files[name])
    removed, added = sorted(before.keys() - files.keys()), sorted(files.keys() - before.keys())
    status = "changed" if changed or removed else "grown"
    return DataFinding(
        "snapshot", path, status, recorded, found, tuple(changed[:20]), tuple(removed[:20]), tuple(added[:20])
    )


def dvc_hash(path: str) -> tuple[str, dict[str, str] | None]:
    """DVC's hash of a local file or folder, as ``dvc add`` gives it, and of a folder the hash of each file.

    :raises InvalidInputError: DVC is not installed
    """
    try:
        from dvc_data.hashfile.build import build
        from dvc_data.hashfile.db import HashFileDB
        from dvc_objects.fs import LocalFileSystem
    except ImportError as error:
        raise InvalidInputError(f"hashing {path} as DVC does needs dvc-data ({error}); pip install dvc-data") from error
    filesystem = LocalFileSystem()
    with tempfile.TemporaryDirectory(prefix="dvc-") as folder:
        store = HashFileDB(filesystem, folder)
        made: Any = build(store, os.path.abspath(storage.local_path(path)), filesystem, "md5", dry_run=True)
        found = made[2]
        digest = str(found.hash_info.value)
        if not found.hash_info.isdir:
            return digest, None
        return digest, {"/".join(key): str(entry.value) for key, _, entry in found}


def _listing(uri: str | None) -> dict[str, str] | None:
    """The files of a folder in a DVC remote by their hashes; None where its listing cannot be read."""
    if not uri or not uri.endswith(".dir"):
        return None
    try:
        return _files(json.loads(storage.read_bytes(uri)))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _files(listing: list[Mapping[str, Any]]) -> dict[str, str]:
    return {str(entry["relpath"]): str(entry["md5"]) for entry in listing}
