from __future__ import annotations

import datetime as dt
from types import SimpleNamespace

import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.windows import Window, parse_instant, resolve_window

UTC = dt.timezone.utc
MAY, JUNE = dt.datetime(2013, 5, 1, tzinfo=UTC), dt.datetime(2013, 6, 1, tzinfo=UTC)


def test_given_ends_win_over_the_data_interval():
    window = resolve_window({"data_interval_start": MAY, "data_interval_end": JUNE}, "2013-01-01", "2013-02-01")
    assert window.to_json() == {"start": "2013-01-01T00:00:00+00:00", "end": "2013-02-01T00:00:00+00:00"}


@pytest.mark.parametrize("blank", [None, "", "None"])
def test_blank_parameters_fall_back_to_the_data_interval(blank):
    assert resolve_window({"data_interval_start": MAY, "data_interval_end": JUNE}, blank, blank) == Window(MAY, JUNE)


def test_an_asset_event_carries_the_window():
    event = SimpleNamespace(extra={"from_trigger": True, "payload": {"window": Window(MAY, JUNE).to_json()}})
    assert resolve_window({"triggering_asset_events": {"drift": [event]}}) == Window(MAY, JUNE)


def test_an_empty_interval_is_refused_and_the_cron_trap_is_named():
    with pytest.raises(InvalidInputError, match="CronDataIntervalTimetable"):
        resolve_window({"data_interval_start": MAY, "data_interval_end": MAY})


def test_one_end_alone_is_refused():
    with pytest.raises(InvalidInputError, match="give both"):
        resolve_window({"data_interval_start": MAY, "data_interval_end": JUNE}, start="2013-01-01")


def test_no_window_at_all_is_refused():
    with pytest.raises(InvalidInputError, match="window_start and window_end"):
        resolve_window({"data_interval_start": None})


def test_times_are_read_in_any_zone_and_kept_in_utc():
    assert parse_instant("2013-05-01T02:00:00+02:00") == MAY
    assert parse_instant(dt.datetime(2013, 5, 1)) == MAY
    with pytest.raises(InvalidInputError, match="ISO 8601"):
        parse_instant("1st of May")
