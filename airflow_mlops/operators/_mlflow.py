"""What the operators that talk to MLflow share: templated arguments, the identity of a task, the hook."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.hooks.mlflow import MlflowHook

if TYPE_CHECKING:
    from airflow.sdk import Context


def is_blank(value: Any) -> bool:
    """Whether a templated argument came out empty; a missing XCom renders as ``None``."""
    return value is None or str(value).strip() in ("", "None")


def task_key(context: Context) -> str:
    """What stays the same over the tries of one task and differs between all others."""
    ti = context["ti"]
    return "/".join([ti.dag_id, ti.run_id, ti.task_id, str(getattr(ti, "map_index", -1))])


def as_mapping(value: Any, name: str) -> dict[str, Any]:
    """A templated mapping: given as one, or as the text that Jinja makes of one.

    :raises InvalidInputError: it is something else
    """
    return _literal(value, name, Mapping, dict)


def as_names(value: Any, name: str) -> list[str]:
    """A templated list of names: given as one, or as the text that Jinja makes of one.

    :raises InvalidInputError: it is something else
    """
    return _literal(value, name, Sequence, list)


def _literal(value: Any, name: str, kind: type, make: type) -> Any:
    if is_blank(value):
        return make()
    if isinstance(value, str):
        for parse in (json.loads, ast.literal_eval):
            with suppress(SyntaxError, ValueError):
                value = parse(value)
                break
    if isinstance(value, str) or not isinstance(value, kind):
        raise InvalidInputError(f"{name} is {value!r:.200}; expected a {make.__name__}, or its text")
    return make(value)


class MlflowBaseOperator(BaseOperator):
    """An operator that talks to one MLflow."""

    def __init__(
        self, *, mlflow_conn_id: str = MlflowHook.default_conn_name, tracking_uri: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**{"multiple_outputs": True, **kwargs})
        self.mlflow_conn_id = mlflow_conn_id
        self.tracking_uri = tracking_uri

    @cached_property
    def hook(self) -> MlflowHook:
        """The hook of this task's MLflow."""
        uri = None if is_blank(self.tracking_uri) else self.tracking_uri
        return MlflowHook(self.mlflow_conn_id, tracking_uri=uri)
