"""What the loop has done, month by month, and in which order it may go on.

A model that is retrained month after month is a history: the challenger of July is judged against the champion that
June left behind. So a month runs after the one before it, and only the newest month may run again.

``{root}/ledger/YYYY-MM.json`` is a finished month; ``{root}/ledger/started/YYYY-MM.json`` keeps what a month found
when it started first, so that a run that is cleared, or that died after its promotion, judges the same champion.
"""

from __future__ import annotations

from typing import Any

from airflow_mlops import storage
from airflow_mlops.examples.flights.months import months_between
from airflow_mlops.exceptions import InvalidInputError


def finished_months(root: str) -> list[str]:
    """The months on record, oldest first."""
    return _months_in(storage.join(root, "ledger"))


def _months_in(folder: str) -> list[str]:
    return [name.rsplit("/", 1)[-1].removesuffix(".json") for name in storage.list_files(folder, ".json")]


def begin(root: str, month: str, champion: str | None) -> str | None:
    """Check that it is this month's turn, and return the version of the champion that served during it.

    :param root: the project's folder
    :param month: ``YYYY-MM``
    :param champion: version that the champion's alias names now, None before the first training
    :raises InvalidInputError: a later month is on record, or the month before is not, or did not come to its end
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
    folder = storage.join(root, "ledger", "started")
    if open_ := [earlier for earlier in _months_in(folder) if earlier < month and earlier not in done]:
        # It may have trained and promoted already: what it leaves behind is not known yet.
        raise InvalidInputError(
            f"{month} cannot run yet: {open_[-1]} was begun and has not come to its end. Clear its failed tasks, let "
            f"it finish, then clear this run; or, to give it up, delete {folder}/{open_[-1]}.json."
        )
    started = storage.join(folder, f"{month}.json")
    if storage.exists(started):
        return storage.read_json(started)["champion"]
    storage.write_json(started, {"champion": champion})
    return champion


def finish(root: str, month: str, entry: dict[str, Any]) -> str:
    """Put ``month`` on record and return the entry's URI."""
    return storage.write_json(storage.join(root, "ledger", f"{month}.json"), {"month": month, **entry})
