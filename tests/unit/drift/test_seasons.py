"""Which columns the calendar moves: found where it does, with the error rate stated, and what a year cannot tell."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.drift import DriftPolicy, Profile, compare
from airflow_mlops.drift.seasons import calendar_bound, same_season, split_period
from airflow_mlops.exceptions import DataError, InvalidInputError

MONTHS = [f"{year}-{month:02d}" for year in (2012, 2013) for month in range(1, 13)]


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def year_round(period: str) -> float:
    return float(np.sin(2 * np.pi * int(period[-2:]) / 12))


def frames(rng, periods=MONTHS, rows=700) -> dict[str, Profile]:
    """Months of weather, of a season in names, and of columns that move otherwise or not at all."""
    wander, result = 0.0, {}
    for place, period in enumerate(periods):
        wander = 0.7 * wander + rng.normal(0, 1)
        warm = (1 + year_round(period)) / 2
        result[period] = Profile.of(
            pd.DataFrame(
                {
                    "temp": 10 * year_round(period) + rng.normal(0, 1) + rng.normal(0, 4, rows),
                    "clothes": rng.choice(["coat", "shirt"], rows, p=[1 - 0.9 * warm, 0.9 * warm]),
                    "shock": rng.normal(0, 1) + rng.normal(size=rows),
                    "wander": wander + rng.normal(size=rows),
                    "trend": 0.15 * place + rng.normal(size=rows),
                    "still": rng.normal(size=rows),
                    "weekday": rng.choice(list("1234567"), rows),
                    "rare": np.where(np.arange(rows) < 100, 1.0, np.nan),
                    "when": pd.Timestamp("2013-01-01"),
                }
            )
        )
    return result


def test_the_columns_that_the_calendar_moves_are_found_and_no_others(rng):
    profiles = frames(rng)
    found = {column.name: column for column in calendar_bound(profiles)}
    assert set(found) == {"temp", "clothes"}
    temp = found["temp"]
    assert temp.evidence == "season" and temp.adjusted_p <= 0.05
    assert temp.within < 0.3 < 0.8 < temp.between < temp.largest
    assert "between different seasons" in temp.reason
    json.dumps([column.to_json() for column in found.values()], allow_nan=False)
    assert list(found.values()) == calendar_bound(dict(reversed(profiles.items())))
    assert [c.name for c in calendar_bound(profiles, columns=["temp", "still"])] == ["temp"]
    assert calendar_bound(profiles, min_effect=5.0) == [] == calendar_bound(profiles, min_explained=0.999)


def test_of_one_year_it_says_that_a_trend_looks_the_same(rng):
    found = {column.name: column for column in calendar_bound(frames(rng, MONTHS[:12]))}
    assert {"temp", "clothes", "trend"} <= set(found) and not {"still", "weekday", "rare", "when"} & set(found)
    assert {column.evidence for column in found.values()} == {"season or trend"}
    assert found["trend"].within is None and "one year cannot tell a season from a trend" in found["trend"].reason


def test_columns_without_a_season_are_seldom_returned(rng):
    """Months that jump about, and months that wander."""
    returned = []
    for _ in range(2):
        steps = rng.normal(size=(24, 30))
        steps[:, 15:] = np.cumsum(steps[:, 15:], axis=0) * 0.5
        profiles = {
            period: Profile.of(
                pd.DataFrame(
                    np.round(move + rng.normal(size=(200, 30)), 1), columns=[f"x{i}" for i in range(len(move))]
                )
            )
            for period, move in zip(MONTHS, steps)
        }
        returned += [column.name for column in calendar_bound(profiles, min_rows=200)]
    assert returned == []


def test_one_year_without_movement_returns_nothing(rng):
    for _ in range(5):
        profiles = {
            period: Profile.of(pd.DataFrame(rng.normal(size=(500, 20)), columns=[f"x{i}" for i in range(20)]))
            for period in MONTHS[:6]
        }
        assert calendar_bound(profiles, min_effect=0.0, fdr=0.01) == []


def test_a_season_at_another_time_of_another_year_is_none(rng):
    """The same twelve months, each of them later in the second year: alike, and not by the calendar."""
    profiles = {}
    for place, period in enumerate(MONTHS):
        late = period if place < 12 else f"2013-{(place - 1) % 12 + 1:02d}"
        profiles[period] = Profile.of(pd.DataFrame({"temp": 3 * year_round(late) + rng.normal(size=600)}))
    assert calendar_bound(profiles, min_explained=0.0) == []


def test_the_same_season_of_the_other_years(rng):
    profiles = frames(rng)
    july = same_season(profiles, "2013-07")
    assert july is not None and july.digest == profiles["2012-07"].digest
    both = same_season(profiles, "2014-07")
    assert both is not None and both.rows == 1_400
    assert same_season({"2013-07": profiles["2013-07"]}, "2013-07") is None
    assert same_season(profiles, "2014-W30") is None
    halves = {"3/7": profiles["2013-07"], "2/7": profiles["2012-07"]}
    seventh = same_season(halves, "3/7", split=lambda period: (period[0], period[2]))
    assert seventh is not None and seventh.digest == profiles["2012-07"].digest


def test_july_against_july_is_no_drift(rng):
    profiles = frames(rng)
    winter = profiles["2012-01"].merge(profiles["2012-02"]).merge(profiles["2012-12"])
    policy = DriftPolicy(min_effect=0.2)
    names = ("temp", "clothes", "still")

    def part(profile: Profile) -> Profile:
        return Profile(profile.rows, {name: profile.columns[name] for name in names})

    july, before = part(profiles["2013-07"]), same_season(profiles, "2013-07")
    assert set(compare(part(winter), july, policy).drifted) == {"temp", "clothes"}
    report = compare(part(winter), july, policy, season=before)
    assert report.verdict == "stable" and report.kinds == {"data": "stable", "quality": "stable"}
    found = {column.name: column for column in report.columns}
    assert {found[name].status for name in ("temp", "clothes")} == {"calendar"}
    assert found["temp"].kind == "calendar" and found["temp"].season_effect < 0.2 < found["temp"].effect
    assert "as in the same season of another year" in found["temp"].reason
    assert any("drifted with the calendar, not counted: temp, clothes" in reason for reason in report.reasons)


def test_a_july_like_no_other_has_drifted_all_the_same(rng):
    cold, warm, hot = (
        Profile.of(pd.DataFrame({"temp": mean + rng.normal(0, 4, 2_000), "still": rng.normal(size=2_000)}))
        for mean in (0.0, 10.0, 18.0)
    )
    report = compare(cold, hot, season=warm)
    assert report.drifted == ["temp"]
    assert "from the same season of another year too" in report.columns[0].reason
    assert report.columns[0].season_effect == pytest.approx(2.0, abs=0.1)
    few = Profile.of(pd.DataFrame({"temp": 18.0 + rng.normal(0, 4, 100)}))
    for lacking in (few, Profile(few.rows, {"other": few.columns["temp"]})):
        report = compare(cold, hot, season=lacking)
        assert report.drifted == ["temp"] and "the season's profile cannot tell" in report.columns[0].reason


def test_what_cannot_be_judged_is_an_error(rng):
    profiles = frames(rng, MONTHS[:4])
    with pytest.raises(DataError, match=r"2 period\(s\)"):
        calendar_bound({period: profiles[period] for period in MONTHS[:2]})
    with pytest.raises(DataError, match=r"column\(s\) tmep asked for"):
        calendar_bound(profiles, columns=["tmep"])
    with pytest.raises(DataError, match="no season comes in two of the years"):
        calendar_bound({f"{2010 + place}-{place:02d}": profiles[period] for place, period in enumerate(MONTHS[:4])})
    with pytest.raises(InvalidInputError, match="period 'July' has no year and season"):
        calendar_bound({"July": profiles[MONTHS[0]], **profiles})
    assert split_period("2013-W30") == ("2013", "W30")
    assert calendar_bound(profiles, columns=["rare", "when"]) == []
