"""The verdict on drift: right distances, honest error rates, and no break that goes unseen."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.spatial.distance import jensenshannon

from airflow_mlops.drift import DriftPolicy, DriftReport, Profile, compare
from airflow_mlops.drift.discoveries import adjust
from airflow_mlops.drift.distances import between
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
        {"control": "bonferroni"},
        {"prediction_min_effect": -1},
        {"prediction_fdr": 2},
        {"min_weight": 1.5},
        {"max_outside": -0.1},
        {"weights": {"x": -1}},
        {"weights": {"x": float("inf")}},
        {"weights": {"x": "much"}},
        {"weights": ["x"]},
        {"method": {"x": "t-test"}},
        {"ranges": {"x": [1, 0]}},
        {"ranges": {"x": [1]}},
        {"ranges": {"x": 1}},
        {"ranges": {"x": ["a", "b"]}},
        {"max_age": {"t": 60}},
        {"max_age": {"t": -60}, "as_of": "2013-01-01"},
        {"as_of": "tomorrow"},
        {"calendar_columns": ["x"], "prediction_columns": ["x"]},
    ],
)
def test_a_policy_out_of_range_is_refused(value):
    with pytest.raises(InvalidInputError, match="drift policy"):
        DriftPolicy.from_json(value)


def test_a_policy_survives_json():
    policy = DriftPolicy(
        min_effect=0.2,
        calendar_columns=("a", "b"),
        control="e-bh",
        weights={"x": 2.0, "y": 0},
        method={"x": "psi"},
        prediction_columns=("p",),
        ranges={"x": (0.0, None)},
        max_age={"t": 3600},
        as_of="2013-01-01T00:00:00+01:00",
    )
    assert DriftPolicy.from_json({}) == DriftPolicy()
    assert DriftPolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


def test_numbers_of_a_policy_may_be_text_as_templates_render_them():
    given = DriftPolicy.from_json({"fdr": "0.05", "min_rows": "600", "calendar_columns": ["1"]})
    assert given == DriftPolicy(fdr=0.05, min_rows=600, calendar_columns=("1",))
    given = DriftPolicy.from_json({"weights": {"x": "0.5"}, "as_of": "20130101", "max_age": {"t": "60"}})
    assert (given.weights, given.max_age, given.as_of) == ({"x": 0.5}, {"t": 60}, "20130101")
    assert given.deadline is not None and given.deadline.isoformat() == "2013-01-01T00:00:00+00:00"
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


def test_requested_methods_are_those_of_scipy_and_of_their_definitions(rng):
    reference, current = rng.lognormal(0, 1, 30_000), rng.lognormal(0.5, 1, 20_000)
    frames = [pd.DataFrame({name: side for name in ("w", "ks", "psi", "js")}) for side in (reference, current)]
    report = judge(*frames, method={"w": "wasserstein", "ks": "ks", "psi": "psi", "js": "js"})
    assert report.drifted == [c.name for c in sorted(report.columns, key=lambda c: -c.effect)]
    exact = stats.ks_2samp(reference, current)
    assert column(report, "ks").distance == pytest.approx(exact.statistic, rel=0.01)
    assert column(report, "ks").method == "ks"
    edges = np.quantile(reference, np.arange(1, 20) / 20)
    p, q = (np.bincount(np.searchsorted(edges, side), minlength=20) / len(side) for side in (reference, current))
    psi = float(np.sum((q - p) * np.log(q / p)))
    assert column(report, "psi").distance == pytest.approx(psi, rel=0.02)
    assert column(report, "w").psi == column(report, "psi").distance
    assert column(report, "js").distance == pytest.approx(jensenshannon(p, q), rel=0.02)
    for name in ("ks", "psi", "js"):
        assert column(report, name).effect == pytest.approx(column(report, name).distance, rel=0.02)


def test_requested_methods_agree_with_evidently(rng):
    """Its PSI is over bins of equal width; on names, and on numbers cut as ours are, the two must be one figure."""
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift

    x = rng.normal(size=15_000), rng.normal(0.1, 1, 12_000)
    cut = np.quantile(x[0], np.arange(1, 20) / 20)
    sides = [
        pd.DataFrame(
            {
                "x": side,
                "binned": np.searchsorted(cut, side).astype(str),
                "c": rng.choice(list("abcd"), len(side), p=shares),
            }
        )
        for side, shares in zip(x, ([0.4, 0.3, 0.2, 0.1], [0.3, 0.3, 0.2, 0.2]))
    ]
    definition = DataDefinition(numerical_columns=["x"], categorical_columns=["binned", "c"])
    asked = [("x", "ks"), ("binned", "psi"), ("binned", "jensenshannon"), ("c", "psi"), ("c", "jensenshannon")]
    report = Report([ValueDrift(column=name, method=method) for name, method in asked])
    snapshot = report.run(*(Dataset.from_pandas(side, definition) for side in reversed(sides)))
    metrics = [metric["value"] for metric in snapshot.dict()["metrics"]]
    theirs = dict(zip(asked, metrics))
    reference, current = (Profile.of(side[["x", "c"]]).columns for side in sides)
    # Of the Kolmogorov-Smirnov test it gives the p-value.
    ours = between(reference["x"], current["x"], "ks").p_value
    assert np.log(ours) == pytest.approx(np.log(theirs["x", "ks"]), rel=0.02)
    for evidently, method in (("psi", "psi"), ("jensenshannon", "js")):
        found = between(reference["c"], current["c"], method)
        assert found.raw == pytest.approx(theirs["c", evidently], rel=1e-6)
        assert found.effect == pytest.approx(theirs["c", evidently], rel=0.02)
        found = between(reference["x"], current["x"], method)
        assert found.raw == pytest.approx(theirs["binned", evidently], rel=0.02)


@pytest.mark.parametrize("method", ["js", "psi"])
def test_a_single_outlier_does_not_hide_a_drift(rng, method):
    reference, current = np.r_[rng.normal(size=5_000), 1e6], rng.normal(0.7, 1, 5_000)
    report = judge(pd.DataFrame({"x": reference}), pd.DataFrame({"x": current}), method={"x": method})
    assert report.drifted == ["x"] and column(report, "x").effect > 0.2


def test_a_method_that_cannot_be_is_refused(rng):
    frame = pd.DataFrame({"x": rng.normal(size=600), "c": "a", "t": pd.Timestamp("2013-01-01")})
    with pytest.raises(InvalidInputError, match="method of c is ks, but the column is categorical; expected js or psi"):
        judge(frame, frame, method={"c": "ks"})
    with pytest.raises(InvalidInputError, match="method of t is js, but the column is time"):
        judge(frame, frame, method={"t": "js"})
    for field, value in (("method", "js"), ("weights", 1.0), ("ranges", (0, 1)), ("prediction_columns", None)):
        with pytest.raises(InvalidInputError, match=f"{field} names y, which neither profile has"):
            judge(frame, frame, **{field: ("y",) if value is None else {"y": value}})
    for field, value, kind in (("ranges", (0, 1), "categorical; expected numeric"), ("max_age", 1, "expected time")):
        with pytest.raises(InvalidInputError, match=kind):
            judge(frame, frame, **{field: {"c": value}}, as_of="2013-01-01")


def test_the_least_effect_is_that_of_the_method_unless_one_is_given():
    policy = DriftPolicy(prediction_columns=("p",), prediction_min_effect=0.3)
    assert [policy.least_effect("x", method) for method in ("wasserstein", "js", "psi", "ks")] == [0.1, 0.07, 0.1, 0.05]
    assert policy.least_effect("p", "ks") == 0.3
    assert DriftPolicy(min_effect=0.2).least_effect("x", "js") == 0.2


def test_weights_decide_how_much_evidence_a_column_needs(rng):
    """Ten columns, one of them not significant enough: with most of the weight it is."""
    names = [f"x{i}" for i in range(10)]
    reference = pd.DataFrame(rng.normal(size=(2_000, 10)), columns=names)
    current = pd.DataFrame(rng.normal(size=(2_000, 10)), columns=names).assign(x0=lambda f: f["x0"] + 0.15)
    found = column(judge(reference, current, min_effect=0.05), "x0")
    assert 1e-8 < found.p_value < 1e-3
    fdr = 5 * found.p_value
    plain = judge(reference, current, min_effect=0.05, fdr=fdr)
    assert plain.drifted == [] and {c.weight for c in plain.columns} == {1.0}
    heavy = judge(reference, current, min_effect=0.05, fdr=fdr, weights={"x0": 60.0, **dict.fromkeys(names[1:], 1.0)})
    assert heavy.drifted == ["x0"]
    assert column(heavy, "x0").weight == pytest.approx(600 / 69)
    assert np.mean([c.weight for c in heavy.columns]) == pytest.approx(1)
    loud = current.assign(x0=current["x0"] + 1)
    assert judge(reference, loud, min_weight=0.2).verdict == "stable"
    assert (
        judge(reference, loud, min_weight=0.2, weights={"x0": 3.0, **dict.fromkeys(names[1:], 1.0)}).verdict == "drift"
    )


def test_columns_of_no_weight_are_shown_and_never_count(rng):
    frame = pd.DataFrame({"x": rng.normal(size=2_000), "id": rng.normal(size=2_000), "gone": 1.0})
    moved = frame.assign(id=frame["id"] + 5).drop(columns="gone")
    report = judge(frame, moved, weights={"id": 0, "gone": 0})
    assert report.verdict == "stable" and report.drifted == []
    assert report.kinds == {"data": "stable", "quality": "stable"}
    assert (column(report, "id").status, column(report, "id").weight) == ("uncounted", 0)
    assert column(report, "id").effect > 4 and column(report, "gone").status == "broken" and "gone" in report.breaks
    assert any("of weight 0, not counted: gone, id" in reason for reason in report.reasons)
    assert column(report, "x").weight == 1.0
    assert judge(frame, moved).verdict == "drift"
    assert judge(frame, frame, weights=dict.fromkeys(frame, 0)).verdict == "not_enough_data"


def test_predictions_are_judged_apart_from_the_data(rng):
    frame = pd.DataFrame({"x": rng.normal(size=3_000), "p": rng.beta(2, 5, 3_000)})
    moved = frame.assign(p=frame["p"] + 0.05)
    report = judge(frame, moved, prediction_columns=("p",))
    assert report.kinds == {"data": "stable", "prediction": "drift", "quality": "stable"}
    assert report.verdict == "drift" and column(report, "p").kind == "prediction"
    report = judge(frame, moved, prediction_columns=("p",), prediction_min_effect=0.5)
    assert report.verdict == "stable" and report.kinds["prediction"] == "stable"
    # The data's thresholds are not the predictions'.
    report = judge(frame, moved.assign(x=frame["x"] + 1), prediction_columns=("p",), min_effect=3.0, min_columns=2)
    assert report.kinds == {"data": "stable", "prediction": "drift", "quality": "stable"}
    report = judge(frame, moved.assign(x=frame["x"] + 1), prediction_columns=("p",), prediction_fdr=1e-12)
    assert report.kinds["data"] == "drift"
    report = judge(frame[["x"]], frame, prediction_columns=("p",))
    assert (report.verdict, report.kinds["prediction"]) == ("not_enough_data", "not_enough_data")
    assert any("predictions not judged, the reference has none: p" in reason for reason in report.reasons)


def test_many_predictions_without_drift_do_not_loosen_the_data(rng):
    """Each kind is a family: what one needs for significance does not depend on how many columns the other has."""
    frame = pd.DataFrame(rng.normal(size=(1_000, 6)), columns=list("abcdef"))
    other = pd.DataFrame(rng.normal(size=(1_000, 6)), columns=list("abcdef"))
    alone = column(judge(frame[["a"]], other[["a"]]), "a")
    beside = column(judge(frame, other, prediction_columns=tuple("bcdef")), "a")
    assert beside.adjusted_p == alone.adjusted_p == alone.p_value


def test_values_out_of_range_are_a_break(rng):
    frame = pd.DataFrame({"x": rng.uniform(0, 10, 5_000)})
    assert judge(frame, frame, ranges={"x": (0, 10)}).verdict == "stable"
    spoilt = frame.assign(x=frame["x"].mask(frame.index < 100, -40.0))
    report = judge(frame, spoilt, ranges={"x": (0, None)})
    assert report.verdict == "drift" and report.kinds["quality"] == "broken"
    assert report.breaks["x"].startswith("range: -40 to") and "at least 2.00% are outside" in report.breaks["x"]
    assert judge(frame, spoilt, ranges={"x": (0, None)}, max_outside=0.02).verdict == "stable"
    assert judge(frame, spoilt, ranges={"x": (None, 10)}).verdict == "stable"
    high = judge(frame, frame.assign(x=frame["x"].mask(frame.index == 0, 10.5)), ranges={"x": (None, 10)})
    assert "range" in high.breaks["x"] and "allowed any to 10; at least 0.02%" in high.breaks["x"]


@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
def test_stale_times_are_a_break(rng, zone):
    times = pd.date_range("2013-01-01", "2013-01-31 12:00", 3_000, tz="UTC").tz_convert(zone)
    frame = pd.DataFrame({"x": rng.normal(size=3_000), "t": times})
    due = {"max_age": {"t": 86_400}}
    assert judge(frame, frame, **due, as_of="2013-02-01T00:00:00+00:00").verdict == "stable"
    assert judge(frame, frame, **due, as_of="2013-02-01T05:00:00+05:00").verdict == "stable"
    report = judge(frame, frame, **due, as_of="2013-02-02")
    assert report.verdict == "drift" and column(report, "t").kind == "quality"
    assert (
        report.breaks["t"].startswith("stale: the newest is 2013-01-31T12:00:00") and "129600 s" in report.breaks["t"]
    )
    report = judge(frame, frame, **due, as_of="2013-01-31")
    assert report.breaks["t"].startswith("times in the future")


@pytest.mark.parametrize("zones", [("UTC", None), (None, "Europe/Berlin")])
def test_times_with_a_zone_and_without_are_a_break(rng, zones):
    times = pd.date_range("2013-01-01", periods=3_000, freq="h")
    before, now, berlin = (
        pd.DataFrame({"x": rng.normal(size=3_000), "t": times.tz_localize("UTC").tz_convert(zone)})
        for zone in (*zones, "Europe/Berlin")
    )
    report = judge(before, now)
    assert report.verdict == "drift" and report.kinds["quality"] == "broken"
    assert report.breaks["t"].startswith("type changed: timestamp[") and "write both in UTC" in report.breaks["t"]
    assert judge(before.assign(t=times.tz_localize("UTC")), berlin).breaks == {}, "the same instants"


def test_missing_values_that_come_and_go_by_chance_are_no_break(rng):
    """Half of the values missing on both sides, 600 rows, 100 columns: a rise of a tenth is chance."""
    names = [f"x{i}" for i in range(100)]
    sides = [pd.DataFrame(np.where(rng.uniform(size=(600, 100)) < 0.5, np.nan, 1.0), columns=names) for _ in range(6)]
    for reference, current in zip(sides[::2], sides[1::2]):
        assert max(c.isna().mean() for _, c in current.items()) > 0.54
        assert judge(reference, current, min_rows=100, max_missing_rise=0.01).breaks == {}
    emptier = sides[1].mask(rng.uniform(size=sides[1].shape) < 0.5)
    assert len(judge(sides[0], emptier, min_rows=100).breaks) > 90


def test_a_column_that_stops_varying_has_drifted(rng):
    frame = pd.DataFrame({"x": rng.normal(size=2_000), "c": rng.choice(["a", "b"], 2_000)})
    assert judge(frame, frame.assign(x=0.0, c="a")).drifted == ["x", "c"]
    constant = frame.assign(x=0.0, c="a")
    for method in ({}, {"x": "ks"}, {"x": "js", "c": "psi"}, {"x": "psi"}):
        assert judge(constant, constant, method=method).verdict == "stable"


def test_e_bh_finds_what_is_there_and_nothing_else(rng):
    reference = pd.DataFrame(rng.normal(size=(3_000, 30)), columns=[f"x{i}" for i in range(30)])
    current = pd.DataFrame(rng.normal(size=(3_000, 30)), columns=list(reference)).assign(x3=lambda f: f["x3"] + 0.5)
    report = judge(reference, current, control="e-bh")
    assert report.drifted == ["x3"]
    assert judge(reference, reference + 0.0, control="e-bh").verdict == "stable"


def test_e_values_are_e_values(rng):
    """Their mean is 1 at most where nothing has changed, which is all that e-BH asks of them; and they fall with p."""
    p = np.linspace(0.5, 1e6 - 0.5, 1_000_000) / 1e6
    e = 1 / np.array([adjust([value], control="e-bh")[0] for value in p[:2_000]])
    logs = np.log(p[:2_000])
    np.testing.assert_allclose(e, (1 - p[:2_000] + p[:2_000] * logs) / (p[:2_000] * logs**2), rtol=1e-12)
    from airflow_mlops.drift.discoveries import _e_values

    values = _e_values(p)
    assert values.mean() <= 1 and (np.diff(values) <= 0).all()
    assert values[-1] == pytest.approx(0.5, abs=1e-3)
    assert adjust([0.0, 1.0, 0.5], control="e-bh") == [0.0, 1.0, 1.0]


def test_weighted_adjustment_is_that_of_the_p_values_over_the_weights(rng):
    p, weights = rng.uniform(size=20) ** 4, rng.uniform(0.2, 3, 20)
    weights /= weights.mean()
    # Whether the k smallest are below k q / (m H), which is how the procedure is stated.
    scaled = np.sort(p / weights)
    harmonic = np.sum(1 / np.arange(1, 21))
    for q in (0.01, 0.05, 0.2):
        met = np.flatnonzero(scaled <= np.arange(1, 21) * q / (20 * harmonic))
        expected = set(np.flatnonzero(p / weights <= scaled[met[-1]])) if len(met) else set()
        assert set(np.flatnonzero(np.array(adjust(p, weights)) <= q)) == expected


def test_reports_of_earlier_versions_are_read(rng):
    frame = pd.DataFrame({"x": rng.normal(size=1_000)})
    value = judge(frame, frame + 1).to_json()
    del value["kinds"]
    for name in set(value["policy"]) - {"min_effect", "fdr", "min_rows", "max_unseen", "calendar_columns"}:
        del value["policy"][name]
    for entry in value["columns"]:
        for name in ("kind", "weight", "season_effect"):
            del entry[name]
    report = DriftReport.from_json(value)
    assert report.drifted == ["x"] and report.columns[0].kind == "data" and report.kinds == {}


def test_a_profile_of_a_newer_version_is_refused(rng):
    value = Profile.of(pd.DataFrame({"x": rng.normal(size=1_000)})).to_json()
    with pytest.raises(InvalidInputError, match=r"profile has version 99, this airflow-mlops reads up to \d+: upgrade"):
        Profile.from_json({**value, "profile_version": 99})
