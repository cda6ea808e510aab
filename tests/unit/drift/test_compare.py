"""The verdict on drift: right distances, honest error rates, and no break that goes unseen."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.spatial.distance import jensenshannon

from airflow_mlops.drift import DriftPolicy, DriftReport, Profile, compare
from airflow_mlops.drift.compare import adjust
from airflow_mlops.exceptions import DataError, InvalidInputError


@pytest.fixture
def rng():
    return np.random.default_rng(42)


def judge(reference: pd.DataFrame, current: pd.DataFrame, **policy) -> DriftReport:
    return compare(Profile.of(reference), Profile.of(current), DriftPolicy(**policy))


def column(report: DriftReport, name: str):
    return next(entry for entry in report.columns if entry.name == name)


def _draw(rng, name: str, size: int, moved: bool):
    return {
        "normal": lambda: rng.normal(0.4 * moved, 1, size),
        "lognormal": lambda: rng.lognormal(0.5 * moved, 1, size),
        "far from zero": lambda: 1e6 + rng.normal(0.5 * moved, 1, size),
        "integers": lambda: rng.poisson(20 + 3 * moved, size).astype(float),
        "uniform": lambda: rng.uniform(0, 1 + 0.5 * moved, size),
        "two humps": lambda: (
            np.where(rng.uniform(size=size) < 0.3 + 0.3 * moved, -1e-3, 50.0) * rng.normal(1, 0.1, size)
        ),
        "constant to varied": lambda: rng.normal(0, 1, size) if moved else np.full(size, 0.5),
    }[name]()


@pytest.mark.parametrize("name", ["normal", "lognormal", "far from zero", "integers", "uniform", "two humps"])
def test_the_wasserstein_distance_is_that_of_the_rows(rng, name):
    reference, current = _draw(rng, name, 40_000, False), _draw(rng, name, 30_000, True)
    found = column(judge(pd.DataFrame({"x": reference}), pd.DataFrame({"x": current})), "x")
    exact = stats.wasserstein_distance(reference, current) / reference.std()
    assert found.distance == pytest.approx(exact, rel=0.01)
    assert found.effect == pytest.approx(exact, rel=0.02)
    assert found.status == "drift"


def test_the_ks_test_is_that_of_the_rows(rng):
    reference, current = rng.normal(size=4_000), rng.normal(0.05, 1, 3_000)
    found = column(judge(pd.DataFrame({"x": reference}), pd.DataFrame({"x": current})), "x")
    assert np.log(found.p_value) == pytest.approx(np.log(stats.ks_2samp(reference, current).pvalue), rel=0.15)


def test_a_constant_reference_that_starts_to_vary_has_drifted(rng):
    reference, current = (
        pd.DataFrame({"x": _draw(rng, "constant to varied", 5_000, moved)}) for moved in (False, True)
    )
    assert judge(reference, current).verdict == "drift"
    assert judge(reference, reference).verdict == "stable"
    assert judge(reference, reference + 1.0).drifted == ["x"]


def test_the_jensen_shannon_distance_is_that_of_the_rows(rng):
    reference = pd.DataFrame({"c": rng.choice(list("abcd"), 30_000, p=[0.4, 0.3, 0.2, 0.1])})
    current = pd.DataFrame({"c": rng.choice(list("abcd"), 20_000, p=[0.1, 0.2, 0.3, 0.4])})
    shares = [frame["c"].value_counts(normalize=True).sort_index() for frame in (reference, current)]
    found = column(judge(reference, current), "c")
    assert found.distance == pytest.approx(jensenshannon(*shares), rel=1e-9)
    assert found.effect == pytest.approx(found.distance, rel=0.01)
    assert found.status == "drift"


@pytest.mark.parametrize("levels", [2, 50, 500, 3_000])
@pytest.mark.parametrize("size", [600, 5_000])
def test_no_category_column_alarms_without_drift(rng, levels, size):
    weights = rng.dirichlet(np.ones(levels))
    alarms = 0
    for _ in range(15):
        frames = [pd.DataFrame({"c": rng.choice(levels, n, p=weights).astype(str)}) for n in (2 * size, size)]
        alarms += judge(*frames).verdict != "stable"
    assert alarms == 0


def test_debiased_effects_are_near_zero_without_drift_where_raw_ones_are_not(rng):
    frames = [pd.DataFrame({"c": rng.integers(0, 300, 1_000).astype(str), "x": rng.normal(size=1_000)}) for _ in "ab"]
    report = judge(*frames)
    assert column(report, "c").distance > 0.2 and column(report, "c").effect < 0.1
    assert column(report, "x").effect < 0.1


def test_false_alarms_over_correlated_columns_are_rare(rng):
    """20 columns with one common factor, heavy tails among them, 600 rows: at most 1 % of windows may alarm."""
    alarms = 0
    reference = None
    for window in range(101):
        common = rng.normal(size=(600, 1))
        values = 0.7 * common + 0.7 * rng.standard_t(3, size=(600, 20))
        profile = Profile.of(pd.DataFrame(values, columns=[f"x{i}" for i in range(20)]))
        if window == 0:
            reference = profile
        else:
            alarms += compare(reference, profile, DriftPolicy(min_effect=0.0)).verdict == "drift"
    assert alarms <= 2


def test_false_discovery_rate_and_power(rng):
    """10 of 40 columns move by a third of a standard deviation; q = 0.1."""
    false, found, trials = [], 0, 12
    for _ in range(trials):
        reference = rng.normal(size=(1_500, 40))
        current = rng.normal(size=(1_500, 40))
        current[:, :10] += 0.33
        names = [f"x{i}" for i in range(40)]
        report = judge(pd.DataFrame(reference, columns=names), pd.DataFrame(current, columns=names), fdr=0.1)
        drifted = {int(name[1:]) for name in report.drifted}
        false.append(len([i for i in drifted if i >= 10]) / max(len(drifted), 1))
        found += len([i for i in drifted if i < 10])
    assert np.mean(false) <= 0.1
    assert found / (10 * trials) >= 0.9


def test_adjusted_p_values_are_those_of_scipy(rng):
    p = rng.uniform(size=30) ** 3
    np.testing.assert_allclose(adjust(p.tolist()), stats.false_discovery_control(p, method="by"), rtol=1e-12)


def test_a_harmless_shift_of_a_huge_window_is_silent(rng):
    reference, current = (pd.DataFrame({"x": rng.normal(shift, 1, 1_000_000)}) for shift in (0, 0.01))
    report = judge(reference, current)
    assert report.verdict == "stable"
    assert column(report, "x").p_value < 1e-6 and "too small to matter" in column(report, "x").reason


def test_calendar_columns_are_shown_and_never_count(rng):
    reference = pd.DataFrame({"temp": rng.normal(0, 1, 3_000), "month": rng.choice(["1", "2", "3"], 3_000), "x": 0.0})
    current = pd.DataFrame({"temp": rng.normal(3, 1, 3_000), "month": "7", "x": 0.0})
    assert judge(reference, current).verdict == "drift"
    report = judge(reference, current, calendar_columns=("temp", "month"))
    assert report.verdict == "stable" and report.drifted == []
    assert {column(report, name).status for name in ("temp", "month")} == {"calendar"}
    assert any("calendar, not counted: temp, month" in reason or "month, temp" in reason for reason in report.reasons)
    with pytest.raises(InvalidInputError, match="calendar_columns names tmep"):
        judge(reference, current, calendar_columns=("tmep",))
    only = judge(reference[["temp"]], current[["temp"]], calendar_columns=("temp",))
    assert only.verdict == "not_enough_data" and "no column that counts" in only.reasons[-1]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda frame: frame.drop(columns="x"), "missing: the current data lack this column"),
        (lambda frame: frame.assign(x=frame["x"].astype(str)), "type changed: double in the reference"),
        (lambda frame: frame.assign(x=np.nan), "all missing"),
        (lambda frame: frame.assign(x=None), "all missing"),
        (lambda frame: frame.assign(x=np.inf), "all missing"),
        (
            lambda frame: frame.assign(x=frame["x"].mask(frame.index % 5 == 0)),
            "missing values: 0.0% in the reference, 20",
        ),
        (lambda frame: frame.assign(x=frame["x"].mask(frame.index % 5 == 0, np.inf)), "400 of them infinite"),
    ],
)
@pytest.mark.parametrize("calendar", [(), ("x",)])
def test_a_break_of_quality_is_never_stable(rng, spoil, reason, calendar):
    frame = pd.DataFrame({"x": rng.normal(size=2_000), "c": rng.choice(["a", "b"], 2_000), "y": rng.normal(size=2_000)})
    report = judge(frame, spoil(frame), calendar_columns=calendar)
    assert report.verdict == "drift"
    assert any(reason in text for text in report.reasons)
    assert any(reason in text for text in report.breaks.values())


def test_values_in_new_categories_are_drift_however_small_the_distance(rng):
    frame = pd.DataFrame({"c": rng.choice(["a", "b"], 2_000)})
    report = judge(frame, frame.assign(c=np.where(frame.index % 12 == 0, "new", frame["c"])), min_effect=0.5)
    assert report.drifted == ["c"] and "unseen: at least 6" in report.reasons[0]


def test_rotated_identifiers_are_seen_though_only_hashes_are_kept():
    planes, others = (pd.DataFrame({"id": [f"{side}{i}" for i in range(2_000)] * 10}) for side in "ab")
    assert judge(planes, planes).verdict == "stable"
    report = judge(planes, others)
    assert report.verdict == "drift" and "unseen" in column(report, "id").reason


def test_identifiers_that_never_come_twice_are_expected_to_be_new():
    reference, current = (pd.DataFrame({"id": [f"{side}{i}" for i in range(5_000)]}) for side in "ab")
    assert judge(reference, current).verdict == "stable"


def test_a_new_column_is_told_and_harmless(rng):
    frame = pd.DataFrame({"x": rng.normal(size=1_000)})
    report = judge(frame, frame.assign(extra=1.0))
    assert report.verdict == "stable" and report.breaks == {"extra": "new: the reference lacks this column"}
    assert any("new column(s), not in the reference: extra" in reason for reason in report.reasons)


def test_too_few_rows_are_never_stable(rng):
    frame = pd.DataFrame({"x": rng.normal(size=2_000), "rare": np.r_[np.ones(100), np.full(1_900, np.nan)]})
    report = judge(frame, frame[:400])
    assert report.verdict == "not_enough_data" and report.reasons[0] == "400 rows, at least 500 needed"
    report = judge(frame, frame)
    assert report.verdict == "stable" and column(report, "rare").status == "not_enough_data"
    assert any("rare (100 values" in reason for reason in report.reasons)
    assert judge(frame[["rare"]], frame[["rare"]]).verdict == "not_enough_data"


def test_nothing_in_common_is_an_error(rng):
    with pytest.raises(DataError, match="no column in common"):
        judge(pd.DataFrame({"a": [1.0]}), pd.DataFrame({"b": [1.0]}))


def test_the_report_is_the_same_bit_for_bit_and_survives_json(rng):
    frame = pd.DataFrame({"x": rng.normal(size=1_000), "c": rng.choice(["a", "b"], 1_000)})
    moved = frame.assign(x=frame["x"] * 3, extra=1.0, c=frame["c"].mask(frame.index < 300))
    text = json.dumps(judge(frame, moved).to_json(), allow_nan=False)
    assert text == json.dumps(judge(frame, moved).to_json(), allow_nan=False)
    assert json.dumps(DriftReport.from_json(json.loads(text)).to_json()) == text


def test_extreme_values_give_finite_answers():
    frame = pd.DataFrame({"x": np.r_[np.full(600, 1e300), np.full(600, -1e300)], "y": 5e-324})
    report = judge(frame, frame.assign(x=frame["x"] / 1e10))
    assert np.isfinite(column(report, "x").distance) and report.verdict == "drift"


@pytest.mark.parametrize(
    "value",
    [
        {"min_effect": -1},
        {"fdr": 0},
        {"fdr": "0.9"},
        {"fdr": "low"},
        {"fdr": True},
        {"min_rows": 1},
        {"min_columns": 0},
        {"tolerance": 1},
    ],
)
def test_a_policy_out_of_range_is_refused(value):
    with pytest.raises(InvalidInputError, match="drift policy"):
        DriftPolicy.from_json(value)


def test_a_policy_survives_json():
    policy = DriftPolicy(min_effect=0.2, calendar_columns=("a", "b"))
    assert DriftPolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


def test_numbers_of_a_policy_may_be_text_as_templates_render_them():
    given = DriftPolicy.from_json({"fdr": "0.05", "min_rows": "600", "calendar_columns": ["1"]})
    assert given == DriftPolicy(fdr=0.05, min_rows=600, calendar_columns=("1",))
    with pytest.raises(InvalidInputError, match="calendar_columns is the text"):
        DriftPolicy.from_json({"calendar_columns": "hour"})


def test_the_noise_of_small_samples_is_taken_off_the_wasserstein_distance(rng):
    found = [column(judge(*(pd.DataFrame({"x": rng.normal(size=500)}) for _ in "ab")), "x") for _ in range(40)]
    assert np.mean([c.effect for c in found]) < 0.5 * np.mean([c.distance for c in found])
    assert np.mean([c.effect == 0 for c in found]) > 0.4


def test_the_chi_squared_test_is_honest_with_rare_categories(rng):
    """400 categories, most of them seen once or twice: one test in twenty may fall below 0.05."""
    weights = rng.dirichlet(np.full(400, 0.2))
    p = []
    for _ in range(100):
        frames = [pd.DataFrame({"c": rng.choice(400, n, p=weights).astype(str)}) for n in (3_000, 600)]
        p.append(column(judge(*frames), "c").p_value)
    assert np.mean(np.array(p) < 0.05) <= 0.12 and 0.3 < np.mean(p) < 0.7


@pytest.mark.parametrize("shares", [[0.9999, 0.0001], [0.6, 0.3999, 0.0001]])
def test_a_category_too_rare_to_approximate_is_judged_exactly(rng, shares):
    """A small window beside a large reference: one value of a rare category is no discovery, a tenth of them is."""
    names = np.array([*"abc"[: len(shares) - 1], "rare"])
    reference = Profile.of(pd.DataFrame({"c": rng.choice(names, 50_000, p=shares)}))

    def p_value(values):
        return column(compare(reference, Profile.of(pd.DataFrame({"c": values}))), "c").p_value

    p = np.array([p_value(rng.choice(names, 600, p=shares)) for _ in range(200)])
    assert np.mean(p <= 0.01) <= 0.01 + 3 * np.sqrt(0.01 * 0.99 / 200)
    common = rng.choice(names[:-1], 540, p=np.array(shares[:-1]) / sum(shares[:-1]))
    assert p_value(np.r_[common, np.full(60, "rare")]) < 1e-10
