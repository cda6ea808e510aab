"""A DVC remote: content-addressed copies of files and folders, without a git checkout."""

from __future__ import annotations

import configparser
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_mlops.exceptions import ConcurrentChangeError, DataError, ExternalSystemError, InvalidInputError

if TYPE_CHECKING:
    from dvc.repo import Repo

REMOTE = "pinned"


@dataclass(frozen=True)
class Snapshot:
    """Exact bytes in a DVC remote.

    :param path: what was pinned, on the worker
    :param md5: DVC's hash, ending in ``.dir`` for a folder: the one ``dvc add`` gives
    :param nfiles: number of files
    :param size: bytes
    :param remote: URL of the remote
    :param uri: where in the remote the file, or the folder's list of files, lies
    """

    path: str
    md5: str
    nfiles: int
    size: int
    remote: str
    uri: str

    def to_json(self) -> dict[str, Any]:
        """Plain Python values."""
        return asdict(self)


class DvcHook(BaseHook):
    """A DVC remote, a folder or an object store such as ``s3://bucket/prefix``.

    The URL is ``remote_url``, else the connection's extra ``url``, else its host. For S3 the connection's login and
    password are the access key, and extras ``endpointurl``, ``region``, ``session_token`` and ``profile`` are DVC's own
    settings; without them boto3's usual chain is used. Every call works in a scratch DVC repository of its own, which
    only holds settings: DVC's lock never makes two tasks wait for each other.

    :param dvc_conn_id: the Airflow connection; ``dvc_remote_default`` need not exist
    :param remote_url: overrides the connection's URL
    """

    conn_name_attr = "dvc_conn_id"
    default_conn_name = "dvc_remote_default"
    conn_type = "dvc_remote"
    hook_name = "DVC remote"

    def __init__(self, dvc_conn_id: str = default_conn_name, remote_url: str | None = None) -> None:
        super().__init__()
        self.dvc_conn_id = dvc_conn_id
        self._remote_url = remote_url

    @cached_property
    def _connection(self) -> Any | None:
        try:
            return self.get_connection(self.dvc_conn_id)
        except AirflowNotFoundException:
            if self.dvc_conn_id == self.default_conn_name:
                return None
            raise InvalidInputError(
                f"there is no connection {self.dvc_conn_id!r}; create it with type dvc_remote, or give remote_url"
            ) from None

    @cached_property
    def remote_url(self) -> str:
        """The remote's URL.

        :raises InvalidInputError: nothing names one
        """
        connection = self._connection
        url = self._remote_url or (connection and (connection.extra_dejson.get("url") or connection.host))
        if not url:
            raise InvalidInputError(
                f"no DVC remote: give remote_url (a folder or s3://bucket/prefix), or set extra url in the connection "
                f"{self.dvc_conn_id!r}"
            )
        return url if "://" in url else str(Path(url).expanduser().absolute())

    def _settings(self) -> dict[str, str]:
        settings = {"url": self.remote_url}
        connection = self._connection
        if connection is None or not self.remote_url.startswith("s3://"):
            return settings
        extra = connection.extra_dejson
        names = ("endpointurl", "region", "session_token", "profile")
        settings |= {name: str(extra[name]) for name in names if extra.get(name)}
        if connection.login:
            settings |= {"access_key_id": connection.login, "secret_access_key": connection.password or ""}
        return settings

    @contextmanager
    def _scratch(self, parent: str | None = None, **settings: str) -> Iterator[Repo]:
        from dvc.repo import Repo

        folder = tempfile.mkdtemp(prefix=".dvc-scratch-", dir=parent)
        try:
            config = configparser.ConfigParser(interpolation=None)
            config["core"] = {"remote": REMOTE, "no_scm": "true", "analytics": "false", "check_update": "false"}
            config[f"'remote \"{REMOTE}\"'"] = self._settings() | settings
            # Both caches inside, so that nothing of this try is left or shared.
            config["cache"] = {"dir": os.path.join(folder, "cache")}
            os.makedirs(os.path.join(folder, ".dvc", "tmp"))
            with open(os.path.join(folder, ".dvc", "config"), "w", opener=_private) as file:
                config.write(file)
            repo = Repo(folder, config={"core": {"site_cache_dir": os.path.join(folder, "site")}})
            try:
                yield repo
            finally:
                repo.close()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def snapshot(self, path: str) -> Snapshot:
        """Pin the bytes of a local file or folder in the remote; content it already has is not sent again.

        :raises InvalidInputError: nothing is at ``path``
        :raises DataError: the folder has no file, or a file in it cannot be read
        :raises ConcurrentChangeError: a file changed meanwhile; nothing wrong is left in the remote
        :raises ExternalSystemError: the remote cannot be written to, or a disk is full
        """
        path = str(Path(path.removeprefix("file://")).expanduser().absolute())
        if not os.path.exists(path):
            raise InvalidInputError(f"nothing is at {path}; expected a file or folder on this worker")
        before = _state(path)
        if not before:
            raise DataError(f"{path} holds no file; there is nothing to pin. Land the data before this task runs.")
        with self._scratch() as repo, self._errors_named(path):
            meta, obj, odb = self._send(repo, path)
            after = _state(path)
            if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
                self._drop_wrong(odb, obj)
                raise ConcurrentChangeError(
                    f"{changed[:3]} of {path} changed while it was read, so no snapshot was made. Write new data to "
                    "another name and rename it when it is complete, or run this task after the writer has finished."
                )
            md5 = str(obj.hash_info.value)
            uri = str(odb.fs.unstrip_protocol(odb.oid_to_path(md5)))
        return Snapshot(path, md5, meta.nfiles or 1, meta.size or 0, self.remote_url, uri)

    def _send(self, repo: Repo, path: str) -> tuple[Any, Any, Any]:
        from dvc.fs import LocalFileSystem
        from dvc_data.hashfile.build import build
        from dvc_data.hashfile.transfer import transfer

        odb = repo.cloud.get_remote_odb(REMOTE)
        # DVC's staging area only refers to the files, so nothing is copied but to the remote.
        staging, meta, obj = build(repo.cache.local, path, LocalFileSystem(), "md5")
        result = transfer(staging, odb, {obj.hash_info}, shallow=False, hardlink=False)
        if result.failed:
            # The list of a folder's files fails with any of them.
            files = sum(not one.isdir for one in result.failed)
            raise ExternalSystemError(
                f"DVC remote {self.remote_url}: {files} of {meta.nfiles or 1} files of {path} were not written; the "
                "log above names them. Check its free space and permissions and retry: what was sent is not sent again."
            )
        return meta, obj, odb

    @staticmethod
    def _drop_wrong(odb: Any, obj: Any) -> None:
        """Remove objects whose bytes are not those their name promises: a file changed between hash and copy."""
        from dvc_objects.errors import ObjectFormatError

        entries = [entry.value for _, _, entry in obj] if obj.hash_info.isdir else []
        for oid in [*entries, obj.hash_info.value]:
            with suppress(ObjectFormatError, FileNotFoundError):
                # A copy already marked as protected would pass unread.
                with suppress(OSError, NotImplementedError):
                    os.chmod(odb.oid_to_path(oid), 0o644)
                odb.check(oid, check_hash=True)

    @contextmanager
    def _errors_named(self, path: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError
        from dvc.exceptions import DvcException

        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                reason = "the disk is full; free space there"
            elif error.errno == errno.EROFS:
                reason = "it is read-only; mount it for writing, or name another remote"
            elif isinstance(error, PermissionError):
                reason = "no permission; let the worker's user or role read the data and write to the remote"
            else:
                reason = f"{error}; check that the remote exists and can be reached from this worker"
            raise ExternalSystemError(f"DVC remote {self.remote_url}, {path}: {reason} ({error})") from error
        except (DvcException, BotoCoreError, ClientError) as error:
            raise ExternalSystemError(f"DVC remote {self.remote_url}, {path}: {error}") from error

    def restore(self, md5: str, dest: str) -> str:
        """Bring back what :meth:`snapshot` pinned; every file's hash is checked, and ``dest`` appears at once.

        :param md5: of the snapshot
        :param dest: local path that must not exist yet
        :raises InvalidInputError: something is at ``dest``, or the remote does not have all of ``md5``
        """
        target = Path(dest).expanduser().absolute()
        if target.exists():
            raise InvalidInputError(f"{target} exists already; restore to a path that does not")
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._scratch(str(target.parent), verify="true") as repo, self._errors_named(str(target)):
            from dvc.exceptions import CheckoutError

            out = os.path.join(repo.root_dir, "out")
            with open(os.path.join(repo.root_dir, "out.dvc"), "w") as file:
                file.write(f"outs:\n- md5: {md5}\n  path: out\n  hash: md5\n")
            try:
                repo.pull()
            except CheckoutError as error:
                raise InvalidInputError(
                    f"the DVC remote {self.remote_url} does not hold all of {md5}, or a copy in it is damaged: {error}"
                ) from error
            os.replace(out, target)
        return str(target)

    def test_connection(self) -> tuple[bool, str]:
        """Whether the remote can be reached with these settings."""
        try:
            with self._scratch() as repo:
                odb = repo.cloud.get_remote_odb(REMOTE)
                odb.fs.exists(odb.path)
            return True, f"{self.remote_url} can be reached"
        except Exception as error:
            return False, str(error)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _state(path: str) -> Mapping[str, tuple[int, int, int]]:
    """Inode, size and time of change of every file below ``path``."""

    def one(name: str) -> tuple[int, int, int]:
        found = os.stat(name)
        return found.st_ino, found.st_size, found.st_mtime_ns

    if os.path.isfile(path):
        return {os.path.basename(path): one(path)}
    files = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return {os.path.relpath(name, path): one(name) for name in files}
