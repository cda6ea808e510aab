"""Which code: the git revision of a folder, whether it was changed since, and the source of a training loop."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from airflow_mlops import environment
from airflow_mlops.exceptions import InvalidInputError


def code_state(path: str | None = None, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The git state of the repository that ``path`` is in; what cannot be known is None.

    A checkout wins. Without one, as in most images, the revision is that in ``MLOPS_GIT_REVISION`` (with ``-dirty`` at
    its end for a changed one), which whoever builds the image sets.

    :return: ``revision`` (40 hex digits), ``dirty`` (a tracked file differs from the revision, or one that git does not
        ignore is not tracked), ``changed`` (up to 20 such paths), ``repository`` (the remote's URL without user and
        password), ``source`` (``"git"``, ``"environment"`` or None)
    """
    found = _checkout(path) if path else None
    if found is not None:
        return found
    given = environ.get(environment.REVISION) or ""
    revision = given.removesuffix("-dirty") or None
    return {
        "revision": revision,
        "dirty": given.endswith("-dirty") if revision else None,
        "changed": [],
        "repository": None,
        "source": "environment" if revision else None,
    }


def _checkout(path: str) -> dict[str, Any] | None:
    try:
        from dulwich import porcelain
        from dulwich.errors import NotGitRepository
        from dulwich.repo import Repo
    except ImportError:  # comes with DVC
        return None
    try:
        repo = Repo.discover(os.path.abspath(path))
    except NotGitRepository:
        return None
    with repo:
        try:
            revision = repo.head().decode()
        except KeyError:  # no commit yet
            return None
        status = porcelain.status(repo, untracked_files="normal")
        staged = [name for names in status.staged.values() for name in names]
        changed = {_text(name) for name in [*staged, *status.unstaged, *status.untracked]}
        remote = None
        with suppress(KeyError):
            remote = _public(_text(repo.get_config_stack().get((b"remote", b"origin"), b"url")))
    return {
        "revision": revision,
        "dirty": bool(changed),
        "changed": sorted(changed)[:20],
        "repository": remote,
        "source": "git",
    }


def entry_source(entry: str | None) -> dict[str, Any]:
    """Hash of the file that defines ``package.module:function``, without importing the module itself.

    :return: ``entry``, ``entry_sha256``; the hash is None where the module is not installed here
    """
    digest = None
    if entry and ":" in entry and "://" not in entry:
        with suppress(ImportError, ValueError, AttributeError, OSError):
            spec = importlib.util.find_spec(entry.partition(":")[0])
            if spec is not None and spec.origin is not None:
                digest = sha256_of(spec.origin)
    return {"entry": entry, "entry_sha256": digest}


def sha256_of(path: str) -> str:
    """Hash of a local file's bytes, read in parts."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def file_hashes(folder: str) -> list[dict[str, Any]]:
    """``path``, ``sha256`` and ``size`` in bytes of every file below a local folder, in order of their paths.

    :raises InvalidInputError: the folder holds no file
    """
    paths = sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)
    if not paths:
        raise InvalidInputError(f"{folder} holds no file; expected the folder of a model")
    return [
        {
            "path": os.path.relpath(path, folder).replace(os.sep, "/"),
            "sha256": sha256_of(path),
            "size": os.path.getsize(path),
        }
        for path in paths
    ]


def _text(name: Any) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def _public(url: str) -> str:
    """A remote's URL without user and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else url
