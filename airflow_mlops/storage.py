"""Small files at a URI: a local path, ``file://``, ``s3://`` or whatever else fsspec has a filesystem for.

Writes replace the whole object at once (local: a temporary file and a rename), so that a reader sees the old
content or the new and a killed writer leaves nothing half-written.
"""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

from airflow_mlops.exceptions import ExternalSystemError


def is_local(uri: str) -> bool:
    """Whether ``uri`` names a file of this machine."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> str:
    """The path behind a local ``uri``."""
    return uri.removeprefix("file://")


def join(uri: str, *parts: str) -> str:
    """``uri`` with ``parts`` appended, one slash between each."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def _filesystem(uri: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(uri)


def _fresh_filesystem(uri: str) -> tuple[Any, str]:
    fs, path = _filesystem(uri)
    # A listing remembered from before would hide what other processes have written since.
    fs.invalidate_cache()
    return fs, path


def exists(uri: str) -> bool:
    """Whether something is stored at ``uri``."""
    if is_local(uri):
        return os.path.exists(local_path(uri))
    fs, path = _fresh_filesystem(uri)
    return fs.exists(path)


def read_bytes(uri: str) -> bytes:
    """The content at ``uri``; :class:`FileNotFoundError` when there is none."""
    if is_local(uri):
        with open(local_path(uri), "rb") as file:
            return file.read()
    fs, path = _filesystem(uri)
    return fs.cat_file(path)


def write_bytes(uri: str, content: bytes) -> str:
    """Replace the content at ``uri`` and return ``uri``.

    :raises ExternalSystemError: the disk is full or the place cannot be written to; names the place
    """
    if not is_local(uri):
        fs, path = _filesystem(uri)
        fs.pipe_file(path, content)
        return uri
    path = local_path(uri)
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".tmp-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ExternalSystemError(
            f"cannot write {path}: {error.strerror or error}. Free space or change the permissions there, then retry."
        ) from error
    return uri


def read_json(uri: str) -> Any:
    """The JSON value at ``uri``; :class:`FileNotFoundError` when there is none."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> str:
    """Replace ``uri`` by ``value`` as JSON, keys sorted so that equal values are equal bytes; return ``uri``."""
    return write_bytes(uri, json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode())


def list_files(folder: str, suffix: str = "") -> list[str]:
    """The URIs of the files directly in ``folder`` whose names end in ``suffix``, sorted; none if it does not exist."""
    if is_local(folder):
        path = local_path(folder)
        names = os.listdir(path) if os.path.isdir(path) else []
        names = [name for name in names if os.path.isfile(os.path.join(path, name)) and not name.startswith(".tmp-")]
    else:
        fs, path = _fresh_filesystem(folder)
        entries = fs.ls(path, detail=True) if fs.exists(path) else []
        names = [entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file"]
    return [join(folder, name) for name in sorted(names) if name.endswith(suffix)]
