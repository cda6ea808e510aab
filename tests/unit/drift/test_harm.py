"""Harm: the stated error rate under days that hang together, the power, and what is never called stable."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from airflow_mlops.drift import HarmPolicy, HarmReport, LossReference, assess_harm
from airflow_mlops.drift.harm import HarmTest, _holm
from airflow_mlops.exceptions import DataError, InvalidInputError


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def flights(
    rng, days: int, per_day: int = 200, *, base: float = -1.2, day_effect: float = 0.0, bias: float = 0.0, noise=0.0
):
    """Labels, probabilities and days; ``day_effect`` is a shock by day that the model does not know of, ``bias`` and
    ``noise`` are its own errors, in logits."""
    day = np.repeat(np.arange(days), per_day)
    known = base + rng.normal(0, 1, len(day))
    truth = known + rng.normal(0, day_effect, days)[day] if day_effect else known
    label = (rng.uniform(size=len(day)) < 1 / (1 + np.exp(-truth))).astype(float)
    logit = known + bias + (rng.normal(0, noise, len(day)) if noise else 0)
    return label, 1 / (1 + np.exp(-logit)), day


def test_the_error_rate_holds_at_the_edge_of_harm_with_days_that_hang_together(rng):
    """No rise in truth and zero tolerance for one: the worst case of the null. 10 days a side, strong day shocks."""
    policy = HarmPolicy(alpha=0.1, epsilon=0.0, calibration_tolerance=1.0, excess_epsilon=0.0, min_rows=10)
    trials, wrong = 400, 0
    for _ in range(trials):
        reference = LossReference.of(*flights(rng, 10, 50, day_effect=0.6))
        wrong += assess_harm(reference, *flights(rng, 10, 50, day_effect=0.6), policy).verdict == "harm"
    assert wrong / trials <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / trials)


def test_errors_that_ignore_the_days_would_be_far_too_small(rng):
    label, p, day = flights(rng, 20, 200, day_effect=0.8)
    clustered = LossReference.of(label, p, day)
    naive = LossReference.of(label, p, np.arange(len(label)))
    assert clustered.gap.se > 3 * naive.gap.se


def test_the_clustered_standard_error_matches_the_spread_of_means(rng):
    estimates = [LossReference.of(*flights(rng, 25, 40, day_effect=0.5)).log_loss for _ in range(200)]
    assert np.mean([e.se for e in estimates]) == pytest.approx(np.std([e.mean for e in estimates]), rel=0.15)


def test_a_calibration_gap_at_the_tolerance_keeps_the_error_rate(rng):
    gap = np.mean([np.subtract(*flights(rng, 100, 500, bias=-0.3)[:2]).mean() for _ in range(5)])
    policy = HarmPolicy(alpha=0.3, epsilon=9.0, calibration_tolerance=float(gap), excess_epsilon=9.0, min_rows=10)
    reference = LossReference.of(*flights(rng, 10, 50))
    wrong = sum(assess_harm(reference, *flights(rng, 10, 50, bias=-0.3), policy).verdict == "harm" for _ in range(400))
    # One of three tests is at its edge: Holm gives it alpha / 3.
    assert wrong / 400 == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize("bias", [-0.5, 0.5])
def test_a_model_off_its_calibration_is_harmful_in_either_direction(rng, bias):
    reference = LossReference.of(*flights(rng, 14))
    report = assess_harm(reference, *flights(rng, 30, bias=bias))
    assert report.verdict == "harm"
    assert {test.name: test.harmful for test in report.tests}["calibration"]


def test_a_base_rate_that_the_features_predict_is_no_excess_loss(rng):
    """Late flights double and the model says so: the log loss rises, the excess loss does not."""
    reference = LossReference.of(*flights(rng, 30))
    label, p, day = flights(rng, 30, base=-0.2)
    tests = {test.name: test for test in assess_harm(reference, label, p, day).tests}
    assert label.mean() > 1.5 * reference.base_rate
    assert tests["log_loss"].harmful and not tests["excess_loss"].harmful and not tests["calibration"].harmful
    assert abs(tests["excess_loss"].change) < 0.01


def test_a_model_that_lost_its_skill_has_excess_loss(rng):
    reference = LossReference.of(*flights(rng, 30))
    tests = {test.name: test for test in assess_harm(reference, *flights(rng, 30, noise=1.0)).tests}
    assert tests["excess_loss"].harmful and tests["log_loss"].harmful


def test_no_change_is_stable(rng):
    reference = LossReference.of(*flights(rng, 14))
    report = assess_harm(reference, *flights(rng, 30))
    assert report.verdict == "stable" and len(report.tests) == 3 and report.clusters == 30


def test_the_rise_is_judged_by_welchs_test_of_two_few_clusters(rng):
    """Clusters of one size: the mean and its error are those of the clusters' means, so SciPy can be asked."""
    sides = [flights(rng, days, 120, day_effect=effect) for days, effect in ((5, 1.2), (8, 0.1))]
    found = assess_harm(LossReference.of(*sides[0]), *sides[1], HarmPolicy(epsilon=0.0)).tests[0]
    means = []
    for label, p, day in sides:
        loss = -np.where(label == 1, np.log(p), np.log(1 - p))
        means.append(pd.Series(loss).groupby(day).mean())
    exact = stats.ttest_ind(means[1], means[0], equal_var=False, alternative="greater")
    assert found.name == "log_loss"
    assert (found.p_value, found.se) == pytest.approx((exact.pvalue, found.change / exact.statistic), rel=1e-9)


def test_forecasts_that_never_vary_are_judged_without_an_error(rng):
    """Every day alike: what does not differ is no harm, what does is certain."""
    label, day = np.tile([0.0, 1.0], 1500), np.repeat(np.arange(10), 300)
    even, off = np.full(3000, 0.5), np.full(3000, 0.44)
    reference = LossReference.of(label, even, day)
    assert assess_harm(reference, label, even, day, HarmPolicy(epsilon=0.0)).verdict == "stable"
    assert {t.p_value for t in assess_harm(reference, label, even, day).tests} == {1.0}
    report = assess_harm(reference, label, off, day)
    assert [t.name for t in report.tests if t.harmful] == ["calibration", "excess_loss"]
    assert [t.p_value for t in report.tests] == pytest.approx([1.0, 0.0, 0.0], abs=1e-9)


def test_a_forecast_that_is_certain_and_wrong_has_a_finite_loss(rng):
    label, p, day = flights(rng, 14)
    certain = np.where(np.arange(len(p)) % 50 == 0, 1 - label, p)
    report = assess_harm(LossReference.of(label, p, day), label, certain, day)
    assert report.verdict == "harm" and all(np.isfinite([t.change, t.se, t.p_value]).all() for t in report.tests)
    LossReference.from_json(LossReference.of(label, certain, day).to_json())


def test_holm_stops_at_the_first_test_that_is_not_met():
    def harmful(*p_values):
        drafts = [HarmTest(str(i), 0, 0, 0, 0, 0, p, 0, False) for i, p in enumerate(p_values)]
        tests = _holm(drafts, 0.06)
        assert sorted(test.threshold for test in tests) == pytest.approx([0.02, 0.03, 0.06])
        assert [test.name for test in tests] == ["0", "1", "2"]
        return [test.harmful for test in tests]

    assert harmful(0.9, 0.025, 0.028) == [False, False, False]
    assert harmful(0.9, 0.02, 0.03) == [False, True, True]
    assert harmful(0.05, 0.03, 0.001) == [True, True, True]
    assert harmful(0.05, 0.031, 0.001) == [False, False, True]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda y, p, d: (y, np.where(d == 3, np.nan, p), d), "200 of 6000 labelled rows have no prediction"),
        (lambda y, p, d: (y, np.full(len(p), np.nan), d), "6000 of 6000 labelled rows have no prediction"),
        (lambda y, p, d: (np.full(len(y), np.nan), p, d), "0 of 6000 rows have a label"),
        (lambda y, p, d: (np.where(d < 15, np.nan, y), p, d), "3000 of 6000 rows have a label, at least 80% needed"),
        (lambda y, p, d: (y[:300], p[:300], d[:300]), "300 labelled rows, at least 500 needed"),
        (lambda y, p, d: (y, p, d // 10), "3 clusters, at least 5 needed"),
        (lambda y, p, d: (y[:0], p[:0], d[:0]), "0 labelled rows"),
    ],
)
def test_what_is_lacking_is_said_and_never_stable(rng, spoil, reason):
    report = assess_harm(LossReference.of(*flights(rng, 14)), *spoil(*flights(rng, 30)))
    assert report.verdict == "not_enough_data" and report.tests == ()
    assert any(reason in text for text in report.reasons)


def test_a_reference_of_too_few_days_is_not_enough(rng):
    report = assess_harm(LossReference.of(*flights(rng, 3)), *flights(rng, 30))
    assert report.verdict == "not_enough_data" and "3 clusters in the reference" in report.reasons[0]


def test_late_labels_and_nullable_types_are_understood(rng):
    label, p, day = flights(rng, 30)
    label[:100] = np.nan
    report = assess_harm(
        LossReference.of(*flights(rng, 14)),
        pd.Series(label).astype("Int8"),
        pd.Series(p, dtype="Float64"),
        pd.Series(pd.Timestamp("2013-04-01") + pd.to_timedelta(day, "D")).dt.date,
    )
    assert report.verdict == "stable" and report.rows == 5_900


def test_wrong_input_is_an_error(rng):
    label, p, day = flights(rng, 10)
    reference = LossReference.of(label, p, day)
    with pytest.raises(DataError, match="probabilities must lie in"):
        assess_harm(reference, label, p * 2, day)
    with pytest.raises(DataError, match="labels must be 0 or 1"):
        assess_harm(reference, label * 2, p, day)
    with pytest.raises(DataError, match="must be of equal length"):
        assess_harm(reference, label, p[:-1], day)
    with pytest.raises(DataError, match="1 rows have no cluster"):
        assess_harm(reference, label, p, np.where(np.arange(len(day)) == 0, np.nan, day))
    with pytest.raises(DataError, match="predictions are missing"):
        LossReference.of(label, np.where(day == 0, np.nan, p), day)
    with pytest.raises(DataError, match="labelled rows and there are none"):
        LossReference.of(label * np.nan, p, day)
    with pytest.raises(DataError, match="one cluster"):
        LossReference.of(label, p, day * 0)


def test_everything_survives_json(rng):
    reference = LossReference.of(*flights(rng, 14))
    value = json.loads(json.dumps(reference.to_json(), allow_nan=False))
    assert LossReference.from_json(value) == reference
    report = assess_harm(reference, *flights(rng, 30, bias=1.0), HarmPolicy(alpha=0.02))
    text = json.dumps(report.to_json(), allow_nan=False)
    assert HarmReport.from_json(json.loads(text)) == report
    with pytest.raises(InvalidInputError, match="version 2"):
        LossReference.from_json({**value, "loss_reference_version": 2})
    gap = value["gap"]
    for wrong in ({}, gap | {"mean": float("nan")}, gap | {"se": -1e-3}, gap | {"clusters": 1}):
        damaged = {**value, "gap": wrong}
        with pytest.raises(InvalidInputError, match="damaged"):
            LossReference.from_json(damaged)
    with pytest.raises(InvalidInputError, match="not a loss reference"):
        LossReference.from_json([])


@pytest.mark.parametrize("value", [{"alpha": 0}, {"alpha": 1}, {"epsilon": -1}, {"min_clusters": 1}, {"slack": 1}])
def test_a_policy_out_of_range_is_refused(value):
    with pytest.raises(InvalidInputError, match="harm policy"):
        HarmPolicy.from_json(value)


def test_numbers_of_a_policy_may_be_text_as_templates_render_them():
    assert HarmPolicy.from_json({"alpha": "0.1", "min_rows": "50"}) == HarmPolicy(alpha=0.1, min_rows=50)


def test_few_days_are_judged_by_students_t(rng):
    reference = LossReference.of(*flights(rng, 60))
    report = assess_harm(reference, *flights(rng, 5), HarmPolicy(calibration_tolerance=0.0))
    gap = next(test for test in report.tests if test.name == "calibration")
    assert gap.p_value == pytest.approx(2 * stats.t.sf(gap.change / gap.se, 4), rel=1e-9)
