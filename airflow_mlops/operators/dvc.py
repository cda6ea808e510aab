"""DVC: pin the exact bytes of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from airflow.sdk import BaseOperator, Context

from airflow_mlops.hooks.dvc import DvcHook
from airflow_mlops.shell import is_blank, permanent_errors_fail, require


class DvcSnapshotOperator(BaseOperator):
    """Copies a file or folder into a DVC remote under the hash of its content; needs no git checkout.

    The same content again sends nothing, and tasks that pin at once do not disturb each other. The hash is the one
    ``dvc add`` gives, so ``dvc pull`` brings the data back; so does :meth:`DvcHook.restore`.

    :param path: file or folder on the worker (templated)
    :param remote_url: a folder or ``s3://bucket/prefix``; wins over the connection (templated)
    :param dvc_conn_id: connection of type ``dvc_remote``; need not exist where ``remote_url`` is given (templated)

    Returns ``{"path", "md5", "nfiles", "size", "remote", "uri"}``, the size in bytes.
    """

    template_fields: Sequence[str] = ("path", "remote_url", "dvc_conn_id")

    def __init__(
        self,
        *,
        path: str,
        remote_url: str | None = None,
        dvc_conn_id: str = DvcHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"multiple_outputs": True, **kwargs})
        self.path = path
        self.remote_url = remote_url
        self.dvc_conn_id = dvc_conn_id

    @cached_property
    def hook(self) -> DvcHook:
        return DvcHook(self.dvc_conn_id, None if is_blank(self.remote_url) else self.remote_url)

    def execute(self, context: Context) -> dict[str, Any]:
        with permanent_errors_fail():
            # An empty path would be the worker's current folder.
            require(path=self.path)
            snapshot = self.hook.snapshot(self.path)
            self.log.info("pinned %d files, %d bytes, as %s", snapshot.nfiles, snapshot.size, snapshot.md5)
            return snapshot.to_json()
