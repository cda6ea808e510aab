"""What every operator, sensor and hook of the shell shares."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from airflow.sdk.bases.xcom import BaseXCom
from airflow.sdk.exceptions import AirflowFailException

from airflow_mlops.exceptions import InvalidInputError, MlopsError

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator, Context


@contextmanager
def permanent_errors_fail() -> Iterator[None]:
    """Turn an error that no retry can mend into one that Airflow does not retry.

    :raises AirflowFailException: for a :class:`MlopsError` with ``retryable = False``, same message
    """
    try:
        yield
    except MlopsError as error:
        if error.retryable:
            raise
        raise AirflowFailException(str(error)) from error


def push_result(operator: BaseOperator, context: Context, result: Mapping[str, Any]) -> None:
    """Push ``result`` as Airflow does for what ``execute`` returns: before an exception that returns nothing.

    A task that skips or fails on a verdict leaves that verdict to the tasks after it, whole and key by key.
    """
    if not operator.do_xcom_push:
        return
    if operator.multiple_outputs:
        for key, value in result.items():
            context["ti"].xcom_push(key=key, value=value)
    context["ti"].xcom_push(key=BaseXCom.XCOM_RETURN_KEY, value=result)


def is_blank(value: Any) -> bool:
    """Whether a templated argument came out empty; a missing XCom renders as ``None``."""
    return value is None or str(value).strip() in ("", "None")


def require(**arguments: Any) -> None:
    """Check that templated arguments came out with a value.

    :raises InvalidInputError: one is blank; names it
    """
    if blank := [name for name, value in arguments.items() if is_blank(value)]:
        found = ", ".join(f"{name}={arguments[name]!r}" for name in blank)
        raise InvalidInputError(f"needed and empty after templating: {found}. Give a value, or mend the template.")


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


def log_table(header: list[str], rows: list[list[Any]]) -> str:
    """``rows`` under ``header`` as aligned text for a task log."""
    cells = [[str(value) for value in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(value.ljust(width) for value, width in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
