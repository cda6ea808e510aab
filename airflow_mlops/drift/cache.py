"""Profiles kept under a hash of the data they are of, so that unchanged data are not profiled again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from airflow_mlops import storage
from airflow_mlops.drift.profile import VERSION, Profile
from airflow_mlops.drift.sources import PARQUET, form_of, list_uris, reading
from airflow_mlops.exceptions import InvalidInputError

_BLOCK = 1 << 22


def profile_of(
    uri: str | Sequence[str],
    cache_dir: str,
    *,
    columns: Sequence[str] | None = None,
    categorical: Sequence[str] = (),
    label: str | None = None,
    threads: int = 1,
) -> Profile:
    """The profile of files, from ``cache_dir`` if their bytes were profiled before, else made and left there.

    A profile appears there at once or not at all, whenever its writer is killed; one that is damaged is made again.

    :param uri: as :meth:`Profile.of` takes it: files, a directory or a glob, or several of them
    :param cache_dir: a folder or URI
    :param columns: as in :meth:`Profile.of`
    :param categorical: the same
    :param label: the same
    :param threads: the same; also files hashed at the same time
    :raises DataError: as :meth:`Profile.of`
    """
    question = [VERSION, None if columns is None else sorted(columns), sorted(categorical), label]
    place = storage.join(cache_dir, f"{data_key(uri, question, threads=threads)}.json")
    if storage.exists(place):
        try:
            kept = Profile.from_json(storage.read_json(place))
            names = list(kept.columns) if columns is None else list(columns)
            return Profile(kept.rows, {name: kept.columns[name] for name in names})
        except (InvalidInputError, ValueError):
            pass  # damaged: made again below
    profile = Profile.of(uri, columns=columns, categorical=categorical, label=label, threads=threads)
    storage.write_json(place, profile.to_json())
    return profile


def data_key(uri: str | Sequence[str], question: object = None, *, threads: int = 1) -> str:
    """A hash of the bytes of all files at ``uri``, of how each is read, and of ``question`` (JSON).

    Their names and order do not matter, but for the ending that says what they are: the same bytes as CSV and as TSV
    are other data.

    :raises DataError: no file there, or one that cannot be read
    """
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        digests = sorted(pool.map(_file_digest, list_uris(uri)))
    return hashlib.sha256(json.dumps([digests, question]).encode()).hexdigest()


def _file_digest(uri: str) -> str:
    """A hash of a file's bytes and of how they are read."""
    import fsspec

    digest = hashlib.blake2b(digest_size=32)
    if (form := form_of(uri)) != PARQUET:
        digest.update(json.dumps(form).encode() + b"\0")
    with reading(uri), fsspec.open(uri, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
