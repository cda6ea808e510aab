"""What the operators that talk to MLflow share: the identity of a task, the hook."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from airflow_mlops.hooks.mlflow import MlflowHook
from airflow_mlops.shell import is_blank

if TYPE_CHECKING:
    from airflow.sdk import Context


def task_key(context: Context) -> str:
    """What stays the same over the tries of one task and differs between all others."""
    ti = context["ti"]
    return "/".join([ti.dag_id, ti.run_id, ti.task_id, str(getattr(ti, "map_index", -1))])


class MlflowBaseOperator(BaseOperator):
    """An operator that talks to one MLflow.

    :param mlflow_conn_id: connection of type ``mlflow``
    :param tracking_uri: overrides the connection's
    :param signing_conn_id: connection of type ``model_signing``, to sign what is registered and to load only versions
        with a signature that it vouches for; None: signatures are neither made nor asked for
    :param allow_pickle: this model may be a pickle: it is then scanned, and loaded in a sandbox only
    """

    model_name: Any

    def __init__(
        self,
        *,
        mlflow_conn_id: str = MlflowHook.default_conn_name,
        tracking_uri: str | None = None,
        signing_conn_id: str | None = None,
        allow_pickle: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"multiple_outputs": True, **kwargs})
        self.mlflow_conn_id = mlflow_conn_id
        self.tracking_uri = tracking_uri
        self.signing_conn_id = signing_conn_id
        self.allow_pickle = allow_pickle

    @cached_property
    def hook(self) -> MlflowHook:
        """The hook of this task's MLflow."""
        uri = None if is_blank(self.tracking_uri) else self.tracking_uri
        return MlflowHook(
            self.mlflow_conn_id,
            tracking_uri=uri,
            signing_conn_id=self.signing_conn_id,
            allow_pickle=self.allow_pickle is True,
        )

    def _verify(self, version: str) -> None:
        """Check the signature of a version of ``model_name``, where one is asked for."""
        if not is_blank(self.signing_conn_id):
            self.hook.models.open(f"models:/{self.model_name}/{version}")
