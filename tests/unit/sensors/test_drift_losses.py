"""The losses over all windows as the sensor keeps them: late labels, overlaps, replays, champions that come back."""

from __future__ import annotations

import datetime as dt
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.drift import LossReference, LossTest
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.sensors._drift_losses import Predictions, losses_over_windows
from airflow_mlops.windows import Window

START = dt.datetime(2013, 4, 1, tzinfo=dt.timezone.utc)
DAY = dt.timedelta(days=1)


@pytest.fixture
def rows():
    """A month of predictions, 40 a day."""
    rng = np.random.default_rng(5)
    p = rng.uniform(0.1, 0.9, 30 * 40)
    return pd.DataFrame(
        {
            "event_timestamp": pd.Timestamp(START) + pd.to_timedelta(np.arange(len(p)) * 36, "min"),
            "label": (rng.uniform(size=len(p)) < p).astype("int8"),
            "champion": p,
        }
    )


@pytest.fixture
def reference(rows):
    return LossReference.of(rows["label"], rows["champion"], rows["event_timestamp"].dt.date)


@pytest.fixture
def check(tmp_path, rows, reference):
    """Judges a window; ``back`` days of rows before it are in the predictions, labels are ``late`` days late."""

    def made(start, length=1.0, *, back=99.0, late=0.0, version="1", delay=None, bias=0.0, **fields):
        window = Window(START + start * DAY, START + (start + length) * DAY)
        times = rows["event_timestamp"]
        shown = rows[(times >= window.start - back * DAY) & (times < window.end + 5 * DAY)].copy()
        shown["label"] = shown["label"].astype("Int8").where(shown["event_timestamp"] < window.end - late * DAY)
        shown["champion"] = (shown["champion"] + bias).clip(0.01, 0.99)
        uri = str(tmp_path / "predictions.parquet")
        shown.to_parquet(uri)
        predictions = Predictions(uri, "label", "champion")
        given = {"label_delay": f"{late if delay is None else delay}d", **fields}
        read = predictions.read(window.start, window.end)
        champion = SimpleNamespace(name="m", version=version)
        return losses_over_windows({}, champion, window, reference, predictions, read, given, str(tmp_path / "state"))

    return made


def expected(rows, reference, days):
    """The verdict on the first ``days`` at once."""
    frame = rows[rows["event_timestamp"] < START + days * DAY]
    p = np.where(frame["label"] == 1, frame["champion"], 1 - frame["champion"])
    return LossTest(reference.log_loss).update(
        frame["event_timestamp"], -np.log(p), matured_until=START + days * DAY, batch="all"
    )[0]


def test_late_labels_are_counted_when_they_have_matured(check, rows, reference, tmp_path):
    for day in range(12):
        verdict = check(day, late=3)
        assert check(day, late=3) == verdict, "judged again, from what was before"
        want = expected(rows, reference, max(day - 2, 0))
        assert (verdict.looks, verdict.mean, verdict.evidence, verdict.skipped) == (
            want.looks, want.mean, want.evidence, 0
        )  # fmt: skip
        assert verdict.waiting == min(day + 1, 3)
    assert (tmp_path / "state" / "m-1.losses.json").stat().st_size < 16_000


def test_predictions_of_the_window_alone_cannot_serve_late_labels_and_say_so(check):
    check(0, late=3, back=0)
    verdict = check(1, late=3, back=0)
    assert verdict.verdict == "not_enough_data" and verdict.reasons[0] == (
        "1 cluster(s) before 2013-04-02T00:00:00+00:00 wait for labels, and predictions_uri does not have them any "
        "more: labels that come after their window was checked need one that goes back to 2013-04-01T00:00:00+00:00"
    )
    for day in range(2, 6):
        verdict = check(day, late=3, back=0)
    assert (verdict.verdict, verdict.looks, verdict.skipped) == ("not_enough_data", 0, 3)
    assert "goes back to 2013-04-03" in verdict.reasons[0]


def test_overlapping_windows_count_a_row_once(check, rows, reference):
    for day in range(8):
        verdict = check(day, 7, back=0)
    want = expected(rows, reference, 14)
    assert (verdict.looks, verdict.mean, verdict.evidence) == (want.looks, want.mean, want.evidence)


def test_parts_of_days_make_days(check, rows, reference):
    for part in range(12):
        verdict = check(part / 4, 0.25, back=0)
    assert (verdict.looks, verdict.mean) == (3, expected(rows, reference, 3).mean)


def test_days_of_a_window_that_was_missed_are_counted_by_the_next(check, rows, reference):
    check(0)
    verdict = check(4)
    assert (verdict.looks, verdict.evidence) == (5, expected(rows, reference, 5).evidence)
    assert check(2) == verdict, "an older one adds nothing"


def test_days_before_the_first_window_are_another_champions(check):
    assert check(5).looks == 1


def test_a_version_that_serves_again_does_not_answer_for_the_other(check):
    first = [check(day, late=1) for day in range(4)][-1]
    assert first.looks == 3
    for day in range(4, 8):
        check(day, late=1, version="2", bias=0.5)
    assert check(8, late=1).looks == 4, "the day that waited, and none of the other's four"
    assert check(9, late=1).looks == 5


@pytest.mark.parametrize(("back", "looks", "skipped"), [(1.5, 0, 4), (2.0, 4, 0), (2.5, 4, 0)])
def test_no_day_is_judged_by_a_part_of_it(check, rows, reference, back, looks, skipped):
    """Predictions that begin within a day that waits have fewer rows of it than there were."""
    verdict = [check(day, back=back, late=2) for day in range(6)][-1]
    assert (verdict.looks, verdict.skipped) == (looks, skipped)
    assert verdict.mean == (expected(rows, reference, 4).mean if looks else None)


def test_a_negative_delay_is_refused(check):
    with pytest.raises(InvalidInputError, match="label_delay is '-1d'"):
        check(0, delay=-1)
    with pytest.raises(InvalidInputError, match="expected a span of time such as '3d'"):
        check(0, label_delay=-60)


def test_the_state_is_json_and_small(check, tmp_path):
    check(0, 30, late=29)
    text = (tmp_path / "state" / "m-1.losses.json").read_text()
    assert len(text) < 20_000 and json.loads(text)["before"] is None


@pytest.mark.parametrize(
    "changed", [{"alpha": 0.05}, {"epsilon": 0.1}, {"correlation": 0.0}, {"days": 2}, {"zone": "Asia/Tokyo"}]
)
def test_other_settings_start_anew_and_say_so(check, changed):
    for day in range(5):
        old = check(day)
    anew = check(5, **changed)
    assert anew.looks <= 1 < old.looks and anew.reasons[0] == (
        f"begun anew with this window, since its settings have changed: {next(iter(changed))}"
    )
    assert check(5, **changed) == anew, "judged again"
    assert check(6, **changed).looks <= 2 and "anew" not in str(check(6, **changed).reasons)


def test_settings_that_were_put_back_go_on_where_they_were(check):
    before = [check(day) for day in range(3)][-1]
    assert check(3, alpha=0.05).looks == 1
    assert check(3).looks == before.looks + 1, "the same window, with the settings before it"


def test_equal_settings_as_text_go_on(check):
    check(0, alpha=0.05, days=1)
    assert check(1, alpha="0.05", days="1").looks == 2
