"""Where an audit log lies: a folder or S3. What matters is that of two writers of one name only one succeeds."""

from __future__ import annotations

import datetime as dt
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol
from urllib.parse import urlsplit

from airflow_mlops import storage
from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError


class AuditStore(Protocol):
    """Named small objects, each written once."""

    def create(self, name: str, content: bytes) -> bool:
        """Write ``name`` if there is none yet; False, and nothing written, if there is."""

    def replace(self, name: str, content: bytes) -> None:
        """Write ``name``, whatever was there."""

    def read(self, name: str) -> bytes | None:
        """The content of ``name``; None if there is none."""

    def names(self, folder: str) -> list[str]:
        """The names directly in ``folder``, sorted."""

    def tampered(self, folder: str) -> dict[str, str]:
        """What the store itself remembers of names that were written twice or deleted: name to words."""


def store_of(uri: str, retain_days: int = 0) -> AuditStore:
    """The store behind a folder's path or ``s3://bucket/prefix``.

    :raises InvalidInputError: another kind of store, of which it is not known whether it refuses a second writer
    """
    if storage.is_local(uri):
        return Folder(os.path.abspath(os.path.expanduser(storage.local_path(uri))))
    if urlsplit(uri).scheme in ("s3", "s3a"):
        return S3(uri, retain_days)
    raise InvalidInputError(
        f"the audit log cannot be kept at {uri}: expected a folder, or s3://bucket/prefix, which refuse a second "
        "writer of the same entry"
    )


class Folder:
    """A folder; a hard link to a finished temporary file is what only one writer can make."""

    def __init__(self, path: str) -> None:
        self._path = path

    def create(self, name: str, content: bytes) -> bool:
        """As :class:`AuditStore`; a writer that is killed leaves a temporary file, and no entry."""
        target = os.path.join(self._path, name)
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=os.path.dirname(target), prefix=".tmp-") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o444)
                os.link(file.name, target)
        except FileExistsError:
            return False
        except OSError as error:
            raise ExternalSystemError(
                f"cannot write {target}: {error.strerror or error}; nothing was logged"
            ) from error
        return True

    def replace(self, name: str, content: bytes) -> None:
        """As :class:`AuditStore`."""
        storage.write_bytes(os.path.join(self._path, name), content)

    def read(self, name: str) -> bytes | None:
        """As :class:`AuditStore`."""
        try:
            return storage.read_bytes(os.path.join(self._path, name))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ExternalSystemError(
                f"cannot read {self._path}/{name}: {error.strerror or error}; nothing was logged"
            ) from error

    def names(self, folder: str) -> list[str]:
        """As :class:`AuditStore`."""
        return [uri.rsplit("/", 1)[-1] for uri in storage.list_files(os.path.join(self._path, folder))]

    def tampered(self, folder: str) -> dict[str, str]:
        """Nothing: a folder remembers nothing."""
        return {}


class S3:
    """A prefix of a bucket, through boto3's own settings; conditional writes, and Object Lock where the bucket has it.

    :param uri: ``s3://bucket/prefix``
    :param retain_days: days that nobody may delete or change an entry; 0 for the bucket's own default
    """

    def __init__(self, uri: str, retain_days: int = 0) -> None:
        parts = urlsplit(uri)
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._retain_days = retain_days

    @cached_property
    def _client(self) -> Any:
        import boto3

        return boto3.client("s3")

    @cached_property
    def locks(self) -> bool:
        """Whether the bucket has Object Lock."""
        from botocore.exceptions import ClientError

        with self._reached():
            try:
                answer = self._client.get_object_lock_configuration(Bucket=self._bucket)
            except ClientError as error:
                if error.response["Error"]["Code"] == "ObjectLockConfigurationNotFoundError":
                    return False
                raise
        return answer["ObjectLockConfiguration"].get("ObjectLockEnabled") == "Enabled"

    def create(self, name: str, content: bytes) -> bool:
        """As :class:`AuditStore`."""
        from botocore.exceptions import ClientError

        lock: dict[str, Any] = {}
        if self._retain_days and not self.locks:
            raise InvalidInputError(
                f"entries are to be kept for {self._retain_days} days, and the bucket {self._bucket} has no Object "
                "Lock; use a bucket that was created with it, or set audit_retain_days to 0"
            )
        if self._retain_days:
            until = dt.datetime.now(dt.timezone.utc).replace(microsecond=0) + dt.timedelta(days=self._retain_days)
            lock = {"ObjectLockMode": "COMPLIANCE", "ObjectLockRetainUntilDate": until}
        with self._reached():
            try:
                self._put(name, content, IfNoneMatch="*", **lock)
            except ClientError as error:
                # 409: another conditional write of this name is under way, and may fail.
                if error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
                    return False
                raise
        return True

    def replace(self, name: str, content: bytes) -> None:
        """As :class:`AuditStore`; never locked, for it is only a hint."""
        with self._reached():
            self._put(name, content)

    def _put(self, name: str, content: bytes, **more: Any) -> None:
        self._client.put_object(
            Bucket=self._bucket, Key=self._key(name), Body=content, ContentType="application/json", **more
        )

    def read(self, name: str) -> bytes | None:
        """As :class:`AuditStore`."""
        from botocore.exceptions import ClientError

        with self._reached():
            try:
                content: bytes = self._client.get_object(Bucket=self._bucket, Key=self._key(name))["Body"].read()
            except ClientError as error:
                if error.response["Error"]["Code"] == "NoSuchKey":
                    return None
                raise
        return content

    def names(self, folder: str) -> list[str]:
        """As :class:`AuditStore`."""
        pages = self._pages("list_objects_v2", folder)
        return sorted(one["Key"].rsplit("/", 1)[-1] for page in pages for one in page.get("Contents", ()))

    def tampered(self, folder: str) -> dict[str, str]:
        """Of a bucket with versions: names that have several, or a mark of deletion."""
        versions: dict[str, list[str]] = {}
        deleted: set[str] = set()
        for page in self._pages("list_object_versions", folder):
            for one in page.get("Versions", ()):
                versions.setdefault(one["Key"].rsplit("/", 1)[-1], []).append(one["VersionId"])
            deleted |= {one["Key"].rsplit("/", 1)[-1] for one in page.get("DeleteMarkers", ())}
        # The newest is listed first.
        found = {
            name: f"was written over; the bucket keeps its first content as version {ids[-1]}"
            for name, ids in versions.items()
            if len(ids) > 1
        }
        for name in deleted:
            kept = f"; the bucket keeps its content as version {versions[name][-1]}" if name in versions else ""
            found[name] = f"was deleted{kept}"
        return found

    def _pages(self, call: str, folder: str) -> list[Any]:
        with self._reached():
            pages = list(self._client.get_paginator(call).paginate(Bucket=self._bucket, Prefix=self._key(f"{folder}/")))
        return pages

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Turns what S3 answers, and that it does not answer at all, into this package's error."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError) as error:
            raise ExternalSystemError(
                f"the audit log at s3://{self._bucket}/{self._prefix} cannot be used: {error}; check the bucket, that "
                "it can be reached from here, and that the role may read, list and put there"
            ) from error
