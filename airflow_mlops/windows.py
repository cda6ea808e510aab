"""The window of data that a task works on: ``[start, end)``, resolved at run time.

Asset-triggered and manual runs of Airflow 3 can have no data interval, and a cron string as ``schedule`` gives
an empty one, so the window is looked for in a fixed order and an empty one is refused.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from airflow_mlops.exceptions import InvalidInputError


@dataclass(frozen=True)
class Window:
    """A half-open interval of event time, timezone-aware, in UTC.

    :param start: first instant in the window
    :param end: first instant after it
    """

    start: dt.datetime
    end: dt.datetime

    def __post_init__(self) -> None:
        if self.end <= self.start:
            raise InvalidInputError(
                f"the window [{self.start.isoformat()}, {self.end.isoformat()}) is empty: its end must come after its "
                "start. A plain cron string as schedule gives empty intervals in Airflow 3; use "
                "CronDataIntervalTimetable, or give start and end."
            )

    def to_json(self) -> dict[str, str]:
        """``{"start": ..., "end": ...}`` in ISO 8601."""
        return {"start": self.start.isoformat(), "end": self.end.isoformat()}

    def __str__(self) -> str:
        return f"[{self.start:%Y-%m-%d %H:%M}, {self.end:%Y-%m-%d %H:%M})"


def parse_instant(value: str | dt.datetime, name: str = "instant") -> dt.datetime:
    """An ISO 8601 string or datetime as UTC; a date means midnight, a naive value is taken as UTC.

    :raises InvalidInputError: ``value`` is not a date or time
    """
    if not isinstance(value, dt.datetime):
        try:
            value = dt.datetime.fromisoformat(str(value).strip())
        except ValueError:
            raise InvalidInputError(
                f"{name} is {value!r}; expected a date or time in ISO 8601, for example 2013-04-01 or "
                "2013-04-01T00:00:00+00:00"
            ) from None
    return value.replace(tzinfo=dt.timezone.utc) if value.tzinfo is None else value.astimezone(dt.timezone.utc)


def resolve_window(context: Mapping[str, Any], start: Any = None, end: Any = None) -> Window:
    """The window a task works on: given, else the data interval, else the asset event that started the run.

    :param context: Airflow's task context
    :param start: first instant, ISO 8601 or datetime; an empty string counts as not given
    :param end: first instant after the window
    :raises InvalidInputError: only one of the two is given, nothing gives a window, or it is empty
    """
    start, end = (None if value in (None, "", "None") else value for value in (start, end))
    if start is not None and end is not None:
        return Window(parse_instant(start, "window start"), parse_instant(end, "window end"))
    if start is not None or end is not None:
        raise InvalidInputError(
            f"only one end of the window is given (start={start!r}, end={end!r}); give both or none"
        )
    first, last = context.get("data_interval_start"), context.get("data_interval_end")
    if first is not None and last is not None:
        return Window(parse_instant(first), parse_instant(last))
    for events in (context.get("triggering_asset_events") or {}).values():
        for event in events:
            extra = getattr(event, "extra", None) or {}
            window = (extra.get("payload") or extra).get("window")
            if window:
                return Window(parse_instant(window["start"]), parse_instant(window["end"]))
    raise InvalidInputError(
        "this run has no data interval and no asset event with a window; give window_start and window_end "
        "(for example in the trigger form) or schedule the Dag with a data-interval timetable"
    )
