"""The sequential loss test: its error rate over a thousand looks, its power, late labels, and replays."""

from __future__ import annotations

import datetime as dt
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from airflow_mlops.drift.betting import AT_LIMIT, LEVELS, Capital
from airflow_mlops.drift.harm import Estimate, log_losses
from airflow_mlops.drift.sequential import LossTest
from airflow_mlops.exceptions import DataError, InvalidInputError

START = pd.Timestamp("2013-01-01", tz="UTC")
REFERENCE = Estimate(0.40, 0.012, 60)
LIMIT, DAY_SD = 0.42, 0.1


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def day_means(rng, runs, looks, mean, *, spread=0.12, memory=0.0):
    """Log-normal means of days, shape (runs, looks); ``memory`` is the autocorrelation of their logarithms."""
    noise = rng.normal(size=(runs, looks))
    for look in range(1, looks) if memory else ():
        noise[:, look] = memory * noise[:, look - 1] + math.sqrt(1 - memory**2) * noise[:, look]
    sigma = math.sqrt(math.log(1 + (spread / mean) ** 2))
    return np.exp(math.log(mean) - sigma**2 / 2 + sigma * noise)


def highest(means, limit=LIMIT, reference=0.40, correlation=0.5):
    """The highest capital against ``limit`` after each look, in logs, shape (runs, looks)."""
    capital = Capital.start(reference, DAY_SD**2, correlation, means.shape[:1])
    found = []
    for column in means.T:
        capital = capital.bet(column, limit * LEVELS, 0.0, DAY_SD / 2, DAY_SD**2, correlation)
        found.append(capital.best[:, AT_LIMIT])
    return np.stack(found, axis=1)


def data(rng, days, mean=0.4, rows=20, start=START, shock=0.05):
    """Times and losses of ``rows`` rows a day, gamma losses about a mean that differs by day."""
    level = rng.normal(mean, shock, days).clip(0.05).repeat(rows)
    times = start + pd.to_timedelta(np.repeat(np.arange(days), rows) * 86_400 + np.tile(np.arange(rows), days), "s")
    return pd.Series(times), rng.gamma(2.0, level / 2)


def run(test, times, losses, batches=1, matured_until=None):
    """The verdict and the test after the rows came in ``batches`` parts."""
    verdict = None
    for number, index in enumerate(np.array_split(np.arange(len(times)), batches)):
        verdict, test = test.update(
            times.iloc[index],
            losses[index],
            matured_until=matured_until or times.iloc[index].max() + pd.Timedelta("1D"),
            batch=str(number),
        )
    return verdict, test


def most(alpha, runs):
    """What a share of ``runs`` exceeds with chance 1 in 1,000 only if its expectation is ``alpha``."""
    return stats.binom.ppf(0.999, runs, alpha) / runs


@pytest.mark.parametrize("kind", ["skewed", "rare high", "rare low"])
def test_the_error_rate_holds_over_a_thousand_looks_at_the_edge_of_harm(rng, kind):
    """Every look's expected loss is the limit itself: the worst case of the null, over clusters of any shape."""
    runs, looks = 600, 1000
    if kind == "skewed":
        means = day_means(rng, runs, looks, LIMIT)
    elif kind == "rare high":
        means = np.where(rng.uniform(size=(runs, looks)) < 0.02, 0.3 + 0.12 / 0.02, 0.3)
    else:
        means = np.where(rng.uniform(size=(runs, looks)) < 0.02, 0.0, LIMIT / 0.98)
    best = highest(means)[:, -1]
    for alpha in (0.2, 0.05, 0.01):
        assert (best >= math.log(1 / alpha)).mean() <= most(alpha, runs)


def test_a_test_that_looks_ahead_or_forgets_the_limit_would_be_caught(rng):
    """The simulation can fail: against a limit a little below the true loss, alarms are far above the bound."""
    best = highest(day_means(rng, 300, 1000, LIMIT), limit=LIMIT * 0.94)[:, -1]
    assert (best >= math.log(20)).mean() > 3 * most(0.05, 300)


@pytest.mark.parametrize("memory", [0.5, 0.7])
def test_days_that_hang_together_keep_the_error_rate_near_its_bound(rng, memory):
    """Not covered by the bound, so measured: bad weather that lasts, at the edge of harm, a thousand looks."""
    runs = 600
    means = day_means(rng, runs, 1000, LIMIT, memory=memory)
    best = highest(means, correlation=memory)[:, -1]
    assert (best >= math.log(100)).mean() <= most(0.02, runs)
    assert (best >= math.log(10)).mean() <= most(0.12, runs)
    assert (highest(means[:200], correlation=0.0)[:, -1] >= math.log(10)).mean() > 0.3


def test_days_that_hang_together_alarm_hardly_ever_without_a_rise(rng):
    best = highest(day_means(rng, 400, 1000, 0.40, memory=0.5))[:, -1]
    assert (best >= math.log(100)).mean() <= 0.01


@pytest.mark.parametrize(
    ("before", "loss", "within", "share"),
    [(0, 0.55, 75, 0.95), (300, 0.55, 65, 0.95), (300, 0.47, 200, 0.95), (0, 0.80, 30, 0.95), (300, 0.80, 40, 0.95)],
)
def test_real_harm_is_found_at_once_or_after_a_good_year(rng, before, loss, within, share):
    means = np.concatenate([day_means(rng, 200, before, 0.40, spread=0.1), day_means(rng, 200, within, loss)], axis=1)
    best = highest(means)
    assert (best[:, -1] >= math.log(100)).mean() >= share
    if before:
        assert (best[:, before - 1] >= math.log(100)).mean() <= 0.01


def test_the_whole_test_keeps_its_rate_with_a_reference_that_is_itself_measured(rng):
    """10 days of reference, new in every run; the limit is at the truth but for the reference's own error."""
    runs, alarms, bold = 60, 0, 0
    for _ in range(runs):
        seen = day_means(rng, 1, 10, 0.40)[0]
        reference = Estimate(float(seen.mean()), float(seen.std(ddof=1) / math.sqrt(10)), 10)
        times = pd.Series(pd.date_range(START, periods=80, freq="D"))
        means = day_means(rng, 1, 80, 0.40)[0]
        alarms += run(LossTest(reference, epsilon=0.0, alpha=0.1, correlation=0.0), times, means)[0].harmful
        bold += run(LossTest(reference, epsilon=0.0, alpha=0.1, correlation=0.0, reference_share=0), times, means)[
            0
        ].harmful
    assert alarms / runs <= most(0.1, runs)
    assert bold / runs > most(0.1, runs)


def test_the_rows_of_a_day_count_once_however_they_hang_together(rng):
    """A thousand copies of every row are no more evidence than one."""
    times, losses = data(rng, 60, 0.6)
    once = run(LossTest(REFERENCE), times, losses)[0]
    copies = run(LossTest(REFERENCE), times.repeat(50), losses.repeat(50))[0]
    assert copies == replace(once, evidence=copies.evidence, mean=copies.mean)
    assert (copies.evidence, copies.mean) == pytest.approx((once.evidence, once.mean), rel=1e-9)


def test_harm_is_shown_with_its_day_and_its_size_and_stays(rng):
    times, losses = data(rng, 100, 0.8)
    verdict, test = run(LossTest(REFERENCE), times, losses)
    assert verdict.verdict == "harm" and verdict.harmful and verdict.evidence >= verdict.needed == 200
    assert verdict.limit < verdict.low < 0.85 and verdict.mean == pytest.approx(0.8, abs=0.05)
    assert verdict.since and "2013-01-05" < verdict.since < "2013-02-15" and verdict.since in verdict.reasons[0]
    good = data(rng, 100, 0.2, start=START + pd.Timedelta("100D"))
    later, _ = test.update(*good, matured_until=good[0].max() + pd.Timedelta("1D"), batch="good")
    assert later.harmful and later.since == verdict.since and later.evidence >= verdict.evidence


def test_the_lower_bound_lies_below_the_true_loss(rng):
    """It is at or above the truth in at most alpha of runs, at any look, here after the last."""
    above = shown = 0
    for _ in range(40):
        times, losses = data(rng, 100, 0.6, rows=2, shock=0.1)
        verdict, _ = run(LossTest(REFERENCE, alpha=0.05), times, losses)
        above += verdict.low >= 0.6
        shown += verdict.low > verdict.limit
    assert above <= stats.binom.ppf(0.999, 40, 0.05) and shown >= 35


def test_no_rise_is_stable_and_says_how_often_it_looked(rng):
    verdict, test = run(LossTest(REFERENCE), *data(rng, 90))
    assert (verdict.verdict, verdict.looks, verdict.since) == ("stable", 90, None)
    assert "no loss above 0.4519 shown in 90 looks" in verdict.reasons
    assert verdict.limit == test.limit == pytest.approx(0.42 + 0.012 * stats.t.isf(0.005, 59))
    assert verdict.evidence < 10 and verdict.autocorrelation < 0.3


def test_a_replay_and_any_split_and_order_give_the_same_test_bit_for_bit(rng):
    times, losses = data(rng, 40, 0.55)
    hour = pd.to_timedelta(rng.integers(0, 24, len(times)), "h")
    times = times + hour
    end = times.max() + pd.Timedelta("10D")
    whole, test = run(LossTest(REFERENCE), times, losses, matured_until=end)
    shuffled = rng.permutation(len(times))
    parts = np.array_split(shuffled, 7)
    pieces = LossTest(REFERENCE)
    for number in [3, 0, 6, 1, 5, 2, 4, 3]:
        index = parts[number]
        _, pieces = pieces.update(times.iloc[index], losses[index], matured_until=START, batch=f"part {number}")
        pieces = LossTest.from_json(json.loads(json.dumps(pieces.to_json(), allow_nan=False)))
    verdict, pieces = pieces.update(times[:0], losses[:0], matured_until=end, batch="none")
    assert whole.looks > 35 and verdict == whole and pieces.to_json() == test.to_json()
    again, same = test.update(times, losses, matured_until=end, batch="0")
    assert same.to_json() == test.to_json() and again == replace(whole, late_rows=len(times))


def test_daily_updates_through_json_equal_one_update_at_the_end(rng):
    times, losses = data(rng, 50, 0.55)
    whole, test = run(LossTest(REFERENCE), times, losses)
    daily = LossTest(REFERENCE)
    for day in range(50):
        mine = slice(day * 20, day * 20 + 20)
        _, daily = daily.update(
            times[mine], losses[mine], matured_until=START + pd.Timedelta(days=day + 1), batch=str(day)
        )
        text = json.dumps(daily.to_json(), allow_nan=False)
        assert len(text) < 8_000
        daily = LossTest.from_json(json.loads(text))
    verdict, daily = daily.update(times[:0], losses[:0], matured_until=times.max() + pd.Timedelta("1D"), batch="end")
    assert verdict == whole
    assert daily.to_json() == test.to_json()


def test_rows_wait_until_their_labels_have_matured(rng):
    times, losses = data(rng, 3, 0.5)
    verdict, test = LossTest(REFERENCE).update(
        times, losses, matured_until=START + pd.Timedelta("1D23h59min"), batch="a"
    )
    assert (verdict.looks, verdict.waiting) == (1, 2)
    # The second day gets rows before it matures, the first when it is too late.
    more = pd.Series([START, START + pd.Timedelta("1D5h"), START + pd.Timedelta("1D6h")])
    verdict, test = test.update(more, [9.0, 4.0, np.nan], matured_until=START + pd.Timedelta("2D"), batch="b")
    assert (verdict.looks, verdict.waiting, verdict.late_rows) == (2, 1, 1)
    assert verdict.mean == pytest.approx((losses[:20].mean() + (losses[20:40].sum() + 4.0) / 21) / 2)
    # A maturity that goes back changes nothing.
    verdict, test = test.update(times[:20], losses[:20], matured_until=START, batch="a")
    assert (verdict.looks, verdict.late_rows) == (2, 20)
    assert test.state.matured_until == "2013-01-03T00:00:00+00:00"


def test_a_batch_that_is_given_again_replaces_itself():
    times, test = pd.Series([START, START]), LossTest(REFERENCE)
    for losses in ([np.nan, np.nan], [0.5, np.nan], [0.5, 0.7]):
        _, test = test.update(times, losses, matured_until=START, batch="first day")
    verdict, _ = test.update(times[:0], [], matured_until=START + pd.Timedelta("1D"), batch="")
    assert verdict.mean == pytest.approx(0.6) and verdict.skipped == 0
    # What it no longer has is forgotten.
    _, test = LossTest(REFERENCE).update([START], [0.5], matured_until=START, batch="a")
    _, test = test.update([START + pd.Timedelta("1D")], [0.5], matured_until=START, batch="a")
    assert list(test.state.waiting) == ["2013-01-02"]


def test_rows_read_again_count_once_whatever_the_spans(rng):
    """Days, hours, sliding weeks and all since the first open day make the same test of the same rows."""
    times, losses = data(rng, 12, 0.55, rows=24)
    times = times.dt.floor("D") + pd.to_timedelta(np.tile(np.arange(24), 12), "h")
    whole, test = run(LossTest(REFERENCE, days=2), times, losses)

    def replay(step, length=None, delay="0h"):
        made, verdict = LossTest(REFERENCE, days=2), None
        for end in pd.date_range(START + pd.Timedelta(step), START + pd.Timedelta("13D"), freq=step):
            since = (made.open_from or START) if length is None else end - pd.Timedelta(length)
            inside = (times >= since) & (times < end)
            shown = np.where(times < end - pd.Timedelta(delay), losses, np.nan)
            verdict, made = made.update_from(
                times[inside], shown[inside], since=since, until=end, matured_until=end - pd.Timedelta(delay)
            )
            made = LossTest.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False)))
        return verdict, made

    for step, length in [("1D", "1D"), ("6h", "6h"), ("1D", "7D"), ("6h", "30h"), ("1D", None), ("5h", "5h")]:
        verdict, made = replay(step, length)
        assert verdict == whole and made.state.capital.to_json() == test.state.capital.to_json(), (step, length)
        assert made.state.rows == 12 * 24
    verdict, made = replay("1D", delay="1D")
    assert verdict == whole, "labels a day late are found by reading from the first open day on"
    verdict, made = replay("1D", "1D", delay="1D")
    assert verdict.verdict == "not_enough_data" and verdict.skipped == 6


def test_a_reading_with_fewer_rows_of_a_day_does_not_replace_it():
    times, test, end = pd.Series([START] * 3), LossTest(REFERENCE), START + pd.Timedelta("1D")
    _, test = test.update_from(times, [0.5, 0.6, 0.7], since=START, until=end, matured_until=START)
    _, test = test.update_from(times[:1], [9.0], since=START, until=end, matured_until=START)
    assert test.unlabelled(end) == 0 and test.open_from == START
    verdict, test = test.update_from(times, [1.5, 1.6, 1.7], since=START, until=end, matured_until=end)
    assert (verdict.looks, verdict.mean, test.open_from) == (1, pytest.approx(1.6), end)
    verdict, _ = test.update_from(times, [0.5, 0.6, 0.7], since=START, until=end, matured_until=end)
    assert (verdict.looks, verdict.late_rows) == (1, 0), "a day that was judged is final"


def test_days_without_their_labels_are_left_out_and_too_many_are_never_stable(rng):
    times, losses = data(rng, 10)
    losses[: 6 * 20 : 2] = np.nan
    verdict, _ = run(LossTest(REFERENCE), times, losses)
    assert (verdict.verdict, verdict.looks, verdict.skipped) == ("not_enough_data", 4, 6)
    assert "6 clusters matured with fewer than 80%" in verdict.reasons[0]
    empty, _ = LossTest(REFERENCE).update([], [], matured_until=START, batch="a")
    assert empty.verdict == "not_enough_data" and empty.mean is None and "no cluster" in empty.reasons[0]
    json.dumps(empty.to_json(), allow_nan=False)


def test_clusters_follow_the_zone_and_the_number_of_days():
    times = pd.Series(pd.to_datetime(["2013-03-10T04:59Z", "2013-03-10T05:00Z", "2013-03-11T03:59Z"]))
    test = LossTest(REFERENCE, zone="America/New_York")
    verdict, _ = test.update(times, [0.1, 0.2, 0.4], matured_until=pd.Timestamp("2013-03-11T03:59Z"), batch="a")
    assert (verdict.looks, verdict.waiting, verdict.mean) == (1, 1, pytest.approx(0.1))
    # The tenth of March has 23 hours there.
    verdict, _ = test.update(times, [0.1, 0.2, 0.4], matured_until=pd.Timestamp("2013-03-11T04:00Z"), batch="a")
    assert (verdict.looks, verdict.mean) == (2, pytest.approx(0.2))
    days = pd.Series(pd.date_range("2013-01-03", periods=14, tz="UTC"))
    verdict, _ = run(replace(test, days=7, zone="UTC"), days, np.arange(14.0) / 20)
    assert (verdict.looks, verdict.waiting) == (2, 0) and verdict.mean == pytest.approx(0.325)
    verdict, _ = run(replace(test, days=7, zone="UTC"), days[:-1], np.arange(13.0) / 20)
    assert (verdict.looks, verdict.waiting) == (1, 1)


def test_losses_beyond_the_bound_are_clipped_and_a_wrong_floor_is_said():
    times = pd.Series(START + pd.to_timedelta(np.arange(4), "D"))
    verdict, _ = run(LossTest(REFERENCE, bound=2.0), times, np.array([np.inf, 3.0, 2.0, 0.0]))
    assert verdict.mean == pytest.approx(1.5)
    verdict, _ = run(LossTest(REFERENCE, floor=0.2), times, np.array([0.1, 0.4, 0.4, 0.4]))
    assert (
        verdict.verdict == "not_enough_data" and "1 clusters had a mean loss below the floor 0.2" in verdict.reasons[0]
    )


def test_a_loss_far_below_a_wrong_floor_counts_as_the_floor():
    times = pd.Series(START + pd.to_timedelta(np.arange(30), "D"))
    losses = np.where(np.arange(30) == 20, 0.0, 0.6)
    below = run(LossTest(REFERENCE, floor=0.375), times, losses)[0]
    at = run(LossTest(REFERENCE, floor=0.375), times, np.maximum(losses, 0.375))[0]
    assert below.evidence == at.evidence > 10 and below.reasons != at.reasons


def test_a_higher_floor_finds_strong_harm_sooner(rng):
    times, losses = data(rng, 60, 0.65)
    assert (
        run(LossTest(REFERENCE, floor=0.2), times, losses)[0].since < run(LossTest(REFERENCE), times, losses)[0].since
    )


def test_excess_losses_can_be_bet_on_from_their_floor(rng):
    """Log loss less the entropy of the forecast is never below -0.2785, so a model off its calibration is found."""
    p = np.linspace(0, 1, 100_001)
    both = [np.subtract(*log_losses(np.full(len(p), label), p)) for label in (0.0, 1.0)]
    assert -0.2786 < np.min(both) < -0.2784
    p = rng.uniform(0.02, 0.4, 100 * 200)
    label = (rng.uniform(size=len(p)) < np.minimum(2 * p, 1)).astype(float)
    excess = np.subtract(*log_losses(label, p))
    times = pd.Series(START + pd.to_timedelta(np.arange(100).repeat(200), "D"))
    verdict, _ = run(LossTest(Estimate(0.0, 0.005, 60), floor=-0.2786), times, excess)
    assert verdict.harmful


def test_certain_losses_without_spread_are_judged():
    times = pd.Series(START + pd.to_timedelta(np.arange(60), "D"))
    exact = LossTest(Estimate(0.4, 0.0, 1))
    assert exact.needed == 100 and exact.limit == pytest.approx(0.42)
    assert run(exact, times, np.full(60, 0.42))[0].verdict == "stable"
    assert run(exact, times, np.full(60, 0.6))[0].verdict == "harm"


def test_wrong_input_is_an_error():
    test = LossTest(REFERENCE)
    now = START.to_pydatetime()
    with pytest.raises(DataError, match="2 and 1 rows"):
        test.update([START, START], [0.1], matured_until=now, batch="a")
    with pytest.raises(DataError, match="one time zone"):
        test.update([pd.Timestamp("2013-01-01")], [0.1], matured_until=now, batch="a")
    with pytest.raises(DataError, match="1 of 2 rows have no time"):
        test.update([START, pd.NaT], [0.1, 0.1], matured_until=now, batch="a")
    with pytest.raises(DataError, match="minus infinity"):
        test.update([START], [-np.inf], matured_until=now, batch="a")
    with pytest.raises(InvalidInputError, match="expected a datetime with a time zone"):
        test.update([START], [0.1], matured_until=dt.datetime(2013, 1, 1), batch="a")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"correlation": 1.0}, "correlation is 1.0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"epsilon": -0.1}, "epsilon is -0.1"),
        ({"days": 1.5}, "days is 1.5"),
        ({"zone": "Mars/Base"}, "is no time zone"),
        ({"floor": 0.5}, "must lie between floor 0.5 and bound 5"),
        ({"bound": 0.3}, "must lie between floor 0 and bound 0.3"),
        ({"reference": Estimate(0.4, 0.1, 1)}, "expected at least 2"),
        ({"reference": Estimate(math.nan, 0.1, 9)}, "measure it again"),
        ({"reference_share": 1.0}, "reference_share is 1.0"),
    ],
)
def test_parameters_out_of_range_are_refused(wrong, message):
    with pytest.raises(InvalidInputError, match=message):
        replace(LossTest(REFERENCE), **wrong).update([], [], matured_until=START, batch="a")


def test_parameters_may_be_text_as_templates_render_them():
    given = {"alpha": "0.05", "epsilon": "0", "days": "7", "zone": "Europe/Zurich"}
    made = LossTest.from_fields(REFERENCE, given)
    assert made == LossTest(REFERENCE, alpha=0.05, epsilon=0, days=7, zone="Europe/Zurich")
    for wrong in ({"state": {}}, {"reference": 0.4}, {"label_delay": "1d"}):
        with pytest.raises(InvalidInputError, match="unknown field"):
            LossTest.from_fields(REFERENCE, wrong)
    with pytest.raises(InvalidInputError, match="alpha is 'much'"):
        LossTest.from_fields(REFERENCE, {"alpha": "much"})


def test_a_damaged_state_is_refused(rng):
    _, test = run(LossTest(REFERENCE), *data(rng, 10), matured_until=START + pd.Timedelta("8D"))
    value = test.to_json()
    assert LossTest.from_json(value).to_json() == value
    with pytest.raises(InvalidInputError, match="version 2"):
        LossTest.from_json({**value, "loss_test_version": 2})
    for wrong in ([], {}, {"loss_test_version": "1"}):
        with pytest.raises(InvalidInputError, match="not a loss test"):
            LossTest.from_json(wrong)
    capital = value["state"]["capital"]
    for change in (
        {"looks": -1},
        {"looks": 0},
        {"looks": True},
        {"total": math.nan},
        {"capital": None},
        {"capital": {**capital, "logs": capital["logs"][:1]}},
        {"capital": {**capital, "best": [math.inf] * len(LEVELS)}},
        {"capital": {**capital, "variance": 0.0}},
        {"capital": {**capital, "recent": [0.4] * 7}},
        {"matured_until": "2013-01-01"},
        {"since": "yesterday"},
        {"waiting": {"2013-01-09": {"a": [1, 2]}}},
    ):
        with pytest.raises(InvalidInputError, match="damaged"):
            LossTest.from_json({**value, "state": {**value["state"], **change}})
    with pytest.raises(InvalidInputError, match="damaged"):
        LossTest.from_json({**value, "alpha": 3})
