"""Calendar months, written ``YYYY-MM``: the loop's unit of time."""

from __future__ import annotations

import datetime as dt

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.windows import Window


def window_of(month: str) -> Window:
    """The window of ``month`` in UTC."""
    year, number = (int(part) for part in month.split("-"))
    following = (year + number // 12, number % 12 + 1)
    return Window(
        dt.datetime(year, number, 1, tzinfo=dt.timezone.utc), dt.datetime(*following, 1, tzinfo=dt.timezone.utc)
    )


def month_of(window: Window) -> str:
    """The month that ``window`` is, in UTC.

    :raises InvalidInputError: it is not one calendar month
    """
    month = f"{window.start:%Y-%m}"
    if window != window_of(month):
        raise InvalidInputError(
            f"the window {window} is not one calendar month; this Dag works month by month, for example "
            "window_start=2013-04-01 and window_end=2013-05-01"
        )
    return month


def months_between(first: str, last: str) -> list[str]:
    """The months from ``first`` to ``last``, both included; none when ``last`` comes before."""
    begin, end = (int(month[:4]) * 12 + int(month[5:]) - 1 for month in (first, last))
    return [f"{number // 12:04d}-{number % 12 + 1:02d}" for number in range(begin, end + 1)]


def months_before(month: str, count: int, first: str) -> list[str]:
    """Up to ``count`` months that precede ``month``, oldest first, none before ``first``."""
    return months_between(first, month)[:-1][-count:] if count else []
