"""What the loop has done, month by month, and in which order it may go on.

A model that is retrained month after month is a history: the challenger of July is judged against the champion that
June left behind. So a month runs after the one before it, and only the newest month may run again.

``{root}/ledger/YYYY-MM.json`` is a finished month; ``{root}/ledger/started/YYYY-MM.json`` keeps what a month found
when it started first, so that a run that is cleared, or that died after its promotion, judges the same champion.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from airflow_mlops import storage
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.windows import Window


def month_of(window: Window) -> str:
    """``YYYY-MM`` of a window that is one calendar month in UTC.

    :raises InvalidInputError: it is not
    """
    start = window.start
    following = dt.datetime(start.year + start.month // 12, start.month % 12 + 1, 1, tzinfo=dt.timezone.utc)
    if start != start.replace(day=1, hour=0, minute=0, second=0, microsecond=0) or window.end != following:
        raise InvalidInputError(
            f"the window {window} is not one calendar month; this Dag works month by month, for example "
            "window_start=2013-04-01 and window_end=2013-05-01"
        )
    return f"{start:%Y-%m}"


def months_between(first: str, last: str) -> list[str]:
    """``YYYY-MM`` from ``first`` to ``last``, both included."""
    begin, end = (int(month[:4]) * 12 + int(month[5:]) - 1 for month in (first, last))
    return [f"{number // 12:04d}-{number % 12 + 1:02d}" for number in range(begin, end + 1)]


def finished_months(root: str) -> list[str]:
    """The months on record, oldest first."""
    names = storage.list_files(storage.join(root, "ledger"), ".json")
    return [name.rsplit("/", 1)[-1].removesuffix(".json") for name in names]


def begin(root: str, month: str, champion: str | None) -> str | None:
    """Check that it is this month's turn, and return the version of the champion that served during it.

    :param root: the project's folder
    :param month: ``YYYY-MM``
    :param champion: version that the champion's alias names now, None before the first training
    :raises InvalidInputError: a later month is on record, or the month before is not
    """
    done = finished_months(root)
    if done and done[-1] > month:
        raise InvalidInputError(
            f"{month} comes before {done[-1]}, which the loop has already learned from; running it now would judge it "
            f"against a champion of its future. Only {done[-1]} may run again. To start over, remove the project "
            f"folder {root} and the registered model, then run the months in order."
        )
    if done and month not in done and months_between(done[-1], month)[1:-1]:
        missing = ", ".join(months_between(done[-1], month)[1:-1])
        raise InvalidInputError(
            f"{month} cannot run yet: {missing} has not run, and each month is judged against the champion that the "
            f"month before left behind. Run {missing} first, then clear this run (a backfill in order does both)."
        )
    started = storage.join(root, "ledger", "started", f"{month}.json")
    if storage.exists(started):
        return storage.read_json(started)["champion"]
    storage.write_json(started, {"champion": champion})
    return champion


def finish(root: str, month: str, entry: dict[str, Any]) -> str:
    """Put ``month`` on record and return the entry's URI."""
    return storage.write_json(storage.join(root, "ledger", f"{month}.json"), {"month": month, **entry})
