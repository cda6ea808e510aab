"""The rivals' rules, each on series made by hand, and their error rates where those are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.rivals import (
    DECREASE,
    EITHER,
    HIGH,
    INCREASE,
    LOW,
    NO_DATA,
    PASS,
    Decision,
    argo,
    classify,
    flagger,
    kayenta,
    score,
    shift,
)

NAN = math.nan
LEVEL = [float(value) for value in range(100, 130)]


def shifted(by, values=LEVEL):
    return [value + by for value in values]


def test_the_shift_and_its_interval_are_those_of_the_textbook():
    low, estimate, high = shift(LEVEL, shifted(20))
    assert estimate == 20 and low < 20 < high
    # 30 and 30 values without noise but their own: 900 pairs, 292 of them outside on either side.
    assert (low, high) == (14, 26)
    narrower = shift(LEVEL, shifted(20), confidence=0.8)
    assert low < narrower[0] and narrower[2] < high


@pytest.mark.parametrize(
    ("by", "direction", "label"),
    [
        (20, EITHER, HIGH),
        (20, INCREASE, HIGH),
        (20, DECREASE, PASS),
        (-20, EITHER, LOW),
        (-20, INCREASE, PASS),
        (-20, DECREASE, LOW),
        (4, EITHER, PASS),
        (0, EITHER, PASS),
    ],
)
def test_kayenta_labels_a_metric_by_its_shift_and_direction(by, direction, label):
    assert classify(LEVEL, shifted(by), direction) == label


def test_kayenta_needs_the_interval_to_clear_a_quarter_of_the_estimate():
    # The interval of a shift by 8 starts at 2: above nothing, but not above a quarter of 8.
    assert shift(LEVEL, shifted(8))[0] == 2
    assert classify(LEVEL, shifted(8)) == PASS
    assert classify(LEVEL, shifted(8), tolerance=0.2) == HIGH


def test_kayenta_needs_the_effect_too():
    assert classify(LEVEL, shifted(20), allowed_ratio=1.1) == HIGH
    assert classify(LEVEL, shifted(20), allowed_ratio=1.2) == PASS
    assert classify(shifted(20), LEVEL, allowed_ratio=1.1) == LOW
    assert classify(shifted(20), LEVEL, allowed_ratio=1.2) == PASS


def test_kayenta_leaves_out_missing_points_or_takes_them_for_zero():
    assert classify([NAN, *LEVEL], [*shifted(20), NAN]) == HIGH
    assert classify(LEVEL, [NAN] * 30) == NO_DATA
    assert classify(LEVEL, []) == NO_DATA
    assert classify([NAN] * 30, [NAN] * 30, replace_missing=True) == PASS
    assert classify(LEVEL, [], replace_missing=True) == PASS
    assert classify(LEVEL, [NAN] * 30, INCREASE, replace_missing=True) == PASS


def test_kayentas_score_is_the_mean_of_its_groups_and_full_for_one_without_data():
    assert score({"a": PASS, "b": HIGH, "c": LOW, "d": PASS}) == 50
    assert score({"a": PASS, "b": HIGH, "c": NO_DATA}) == 50
    assert score({"a": NO_DATA, "b": NO_DATA}) == 100
    assert score({"a": HIGH, "b": NO_DATA}, {"a": "one", "b": "two"}) == 50


def test_kayenta_ends_early_at_the_marginal_score_and_needs_the_passing_one_at_the_end():
    names = "abcd"
    good, bad = {name: LEVEL * 2 for name in names}, {name: shifted(20, LEVEL * 2) for name in names}
    either = dict.fromkeys(names, EITHER)
    assert kayenta(good, good, either) == Decision(True, 60)
    assert kayenta(good, bad, either) == Decision(False, 30)
    one = {**good, "a": bad["a"]}
    assert kayenta(good, one, either) == Decision(False, 30)
    assert kayenta(good, one, either, marginal=70) == Decision(False, 60)
    assert kayenta(good, one, either, marginal=70, passing=75) == Decision(True, 60)


def test_kayenta_fails_without_data_in_half_the_metrics_but_passes_them_when_told_to_replace():
    names = "abcd"
    good, none = {name: LEVEL for name in names}, {name: [NAN] * 30 for name in names}
    either = dict.fromkeys(names, EITHER)
    assert kayenta(good, {**good, "a": none["a"]}, either) == Decision(True, 30)
    assert kayenta(good, {**good, "a": none["a"], "b": none["b"]}, either) == Decision(False, 30)
    assert kayenta(none, none, either) == Decision(False, 30)
    assert kayenta(none, none, either, replace_missing=True) == Decision(True, 30)


def test_argo_fails_at_the_fourth_failure_whenever_it_comes():
    assert argo([0.999, 0.98] * 3 + [0.99] * 100) == Decision(True, 106)
    assert argo([0.999, 0.98] * 4) == Decision(False, 8)
    assert argo([NAN] * 4) == Decision(False, 4)


def test_argo_ends_with_the_fifth_error_in_a_row():
    assert argo([None] * 4 + [1.0] + [None] * 4) == Decision(True, 9)
    assert argo([1.0] + [None] * 5) == Decision(False, 6)


def test_argo_is_successful_without_a_measurement():
    assert argo([]) == Decision(True, 0)


def test_flagger_adds_up_failed_checks_and_takes_no_data_for_one():
    assert flagger([0.98] * 9 + [1.0] * 100) == Decision(True, 109)
    assert flagger(([0.98] + [1.0] * 9) * 10) == Decision(False, 91)
    assert flagger([None] * 10) == Decision(False, 10)
    assert flagger([NAN] * 10) == Decision(False, 10)


def checks(rng, requests, share):
    return (1 - rng.binomial(requests, share, 60) / requests).tolist()


@pytest.mark.parametrize(
    ("requests", "share", "argo_rate", "flagger_rate"),
    [(50, 0.005, 1.0, 0.88), (100, 0.005, 0.8, 0.04), (500, 0.005, 0.24, 0.0), (2000, 0.008, None, 0.25)],
)
def test_their_rates_of_rolling_back_over_an_hour_are_the_known_ones(requests, share, argo_rate, flagger_rate):
    rng = np.random.default_rng(1)
    runs = [checks(rng, requests, share) for _ in range(1000)]
    assert flagger_rate == pytest.approx(np.mean([not flagger(run).promoted for run in runs]), abs=0.05)
    if argo_rate is not None:
        assert argo_rate == pytest.approx(np.mean([not argo(run).promoted for run in runs]), abs=0.05)


@pytest.mark.parametrize(("correlation", "rate"), [(0.0, 0.009), (0.5, 0.23), (0.8, 0.68)])
def test_kayentas_rate_of_flagging_equal_arms_in_any_of_eleven_looks_is_the_known_one(correlation, rate):
    rng = np.random.default_rng(2)
    flagged = 0
    for _ in range(200):
        arms = []
        for _ in range(2):
            noise = rng.normal(size=60)
            for i in range(1, 60):
                noise[i] = correlation * noise[i - 1] + math.sqrt(1 - correlation**2) * noise[i]
            arms.append((1 + 0.1 * noise).tolist())
        flagged += any(classify(arms[0][:end], arms[1][:end]) != PASS for end in range(10, 61, 5))
    assert rate == pytest.approx(flagged / 200, abs=0.08)
