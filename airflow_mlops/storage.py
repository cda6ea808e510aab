"""Small files at a URI: a local path, ``file://``, ``s3://`` or whatever else fsspec has a filesystem for.

Writes replace the whole object at once (local: a temporary file and a rename), so that a reader sees the old
content or the new and a killed writer leaves nothing half-written.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError, MlopsError

#: A scheme that needs no host, as of ``models:/name/3``; a drive of Windows has one letter.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def is_local(uri: str) -> bool:
    """Whether ``uri`` names a file of this machine; ``models:/...`` and ``mlflow-artifacts:/...`` do not."""
    return uri.startswith("file:/") or ("://" not in uri and not _SCHEME.match(uri))


def local_path(uri: str) -> str:
    """The path behind a local ``uri``."""
    return uri.removeprefix("file:" if uri.startswith("file:/") and not uri.startswith("file://") else "file://")


def join(uri: str, *parts: str) -> str:
    """``uri`` with ``parts`` appended, one slash between each."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


@contextmanager
def remote_errors(uri: str) -> Iterator[None]:
    """Errors of the store behind ``uri`` as errors of this package; that nothing is there, and local ones, stay.

    Every store has its own, of which few are :class:`OSError`.

    :raises ExternalSystemError: the store cannot be reached, or refuses
    """
    try:
        yield
    except (FileNotFoundError, MlopsError):
        raise
    except Exception as error:
        if is_local(uri):
            raise
        raise ExternalSystemError(
            f"{uri} cannot be reached ({type(error).__name__}: {error}); check the address of the store, the "
            "credentials and their permissions, for S3 in the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...)"
        ) from error


def filesystem(uri: str) -> tuple[Any, str]:
    """The filesystem of ``uri``, of fsspec, and the path there.

    :raises InvalidInputError: there is none of this protocol, or its package is not installed
    """
    import fsspec

    if not is_local(uri) and "://" not in uri:
        # To fsspec it is a path, below whatever folder the process is in.
        raise InvalidInputError(
            f"{uri} is an address that only MLflow can resolve; expected a path, or a URI such as s3://bucket/key"
        )
    try:
        return fsspec.core.url_to_fs(local_path(uri) if is_local(uri) else uri)
    except (ImportError, ValueError) as error:
        raise InvalidInputError(
            f"{uri} cannot be opened: {error}; expected a path, or a URI such as s3://bucket/key, which needs: "
            "pip install 'airflow-mlops[s3]'"
        ) from error


def fresh_filesystem(uri: str) -> tuple[Any, str]:
    """As :func:`filesystem`, with no memory of what was there before, which hides what others have written since."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    return fs, path


def exists(uri: str) -> bool:
    """Whether something is stored at ``uri``."""
    if is_local(uri):
        return os.path.exists(local_path(uri))
    fs, path = fresh_filesystem(uri)
    with remote_errors(uri):
        return fs.exists(path)


def read_bytes(uri: str) -> bytes:
    """The content at ``uri``; :class:`FileNotFoundError` when there is none.

    :raises ExternalSystemError: the store cannot be reached, as of all that reads or writes another than the local one
    """
    if is_local(uri):
        with open(local_path(uri), "rb") as file:
            return file.read()
    fs, path = filesystem(uri)
    with remote_errors(uri):
        return fs.cat_file(path)


def write_bytes(uri: str, content: bytes) -> str:
    """Replace the content at ``uri`` and return ``uri``.

    :raises ExternalSystemError: the disk is full, the place cannot be written to or reached; names the place
    """
    if not is_local(uri):
        fs, path = filesystem(uri)
        with remote_errors(uri):
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
        fs, path = fresh_filesystem(folder)
        with remote_errors(folder):
            entries = fs.ls(path, detail=True) if fs.exists(path) else []
        names = [entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file"]
    return [join(folder, name) for name in sorted(names) if name.endswith(suffix)]
