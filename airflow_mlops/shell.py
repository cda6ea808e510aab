"""What every operator, sensor and hook of the shell shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from airflow.sdk.exceptions import AirflowFailException

from airflow_mlops.exceptions import MlopsError


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


def log_table(header: list[str], rows: list[list[Any]]) -> str:
    """``rows`` under ``header`` as aligned text for a task log."""
    cells = [[str(value) for value in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(value.ljust(width) for value, width in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
