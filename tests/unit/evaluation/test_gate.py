from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.evaluation import GatePolicy, GateVerdict, evaluate
from airflow_mlops.evaluation.paired import loss_gain
from airflow_mlops.evaluation.report import render
from airflow_mlops.exceptions import InvalidInputError


class Month:
    """A hold-out with a forecast that knows the truth and one with noise added to it."""

    def __init__(self, rows: int = 4000, days: int = 10, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.day = rng.integers(0, days, rows)
        signal = 1.5 * rng.normal(size=rows) - 1
        self.good = 1 / (1 + np.exp(-signal))
        self.poor = 1 / (1 + np.exp(-(signal + rng.normal(size=rows))))
        self.label = (rng.random(rows) < self.good).astype(int)
        self.origin = rng.choice(["EWR", "JFK", "LGA"], rows)


@pytest.fixture(scope="module")
def month() -> Month:
    return Month()


def failed(verdict: GateVerdict) -> set[str]:
    return {check.name for check in verdict.checks if not check.passed}


def test_a_better_challenger_passes_and_a_worse_one_does_not(month):
    better = evaluate(month.label, month.poor, month.good, clusters=month.day)
    assert better.passed
    assert not better.first_model
    assert "improvement in log_loss" in better.reasons[0]
    worse = evaluate(month.label, month.good, month.poor, clusters=month.day)
    assert not worse.passed
    assert failed(worse) == {"improvement in log_loss"}


@pytest.mark.parametrize("metric", ["log_loss", "brier", "auc"])
def test_each_metric_decides_in_its_own_direction(month, metric):
    policy = GatePolicy(metric=metric)
    assert evaluate(month.label, month.poor, month.good, clusters=month.day, policy=policy).passed
    worse = evaluate(month.label, month.good, month.poor, clusters=month.day, policy=policy)
    assert failed(worse) == {f"improvement in {metric}"}
    assert worse.differences[0]["metric"] == metric


def test_equal_models_are_no_improvement_but_not_inferior(month):
    same = (month.label, month.good, month.good)
    assert not evaluate(*same, clusters=month.day).passed
    policy = GatePolicy(rule="non_inferiority", margin=0.005)
    assert evaluate(*same, clusters=month.day, policy=policy).passed
    assert not evaluate(month.label, month.good, month.poor, clusters=month.day, policy=policy).passed


def test_a_margin_asks_for_more_than_better(month):
    gain = evaluate(month.label, month.poor, month.good, clusters=month.day).differences[0]["estimate"]
    policy = GatePolicy(margin=gain * 1.1)
    assert not evaluate(month.label, month.poor, month.good, clusters=month.day, policy=policy).passed


def test_the_gate_promotes_equal_models_at_most_as_often_as_it_says():
    rng = np.random.default_rng(21)
    promoted, pairs = 0, 400
    policy = GatePolicy(min_rows=100)
    for _ in range(pairs):
        day = np.repeat(np.arange(10), 40)
        signal = rng.normal(size=400)
        label = (rng.random(400) < 1 / (1 + np.exp(-signal))).astype(int)
        arms = [
            1 / (1 + np.exp(-(signal + 0.5 * rng.normal(size=10)[day] + 0.5 * rng.normal(size=400)))) for _ in range(2)
        ]
        promoted += evaluate(label, *arms, clusters=day, policy=policy).passed
    assert promoted / pairs <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / pairs)
    assert promoted > 0


def test_the_comparison_counts_days_and_not_rows(month):
    given = (month.label, month.poor, month.good)
    by_day, by_row = (evaluate(*given, clusters=clusters).differences for clusters in (month.day, None))
    assert {(gain["metric"], gain["degrees"]) for gain in by_day} == {("log_loss", 9), ("brier", 9), ("auc", 9)}
    assert by_day[0]["standard_error"] == loss_gain("log_loss", *given, month.day).standard_error
    assert by_row[0]["degrees"] == len(month.label) - 1


def test_a_first_model_is_judged_by_floors_alone(month):
    assert evaluate(month.label, None, month.good, clusters=month.day).first_model
    assert evaluate(month.label, None, month.good, clusters=month.day, policy=GatePolicy(floors={"auc": 0.6})).passed
    strict = GatePolicy(floors={"auc": 0.99}, ceilings={"brier": 0.01})
    assert failed(evaluate(month.label, None, month.good, clusters=month.day, policy=strict)) == {"auc", "brier"}


def test_floors_stop_a_challenger_that_beats_its_champion(month):
    policy = GatePolicy(floors={"auc": 0.99})
    assert failed(evaluate(month.label, month.poor, month.good, clusters=month.day, policy=policy)) == {"auc"}


def test_a_miscalibrated_challenger_is_stopped(month):
    high = np.clip(month.good + 0.1, 0, 1)
    policy = GatePolicy(metric="auc", max_calibration_error=0.05)
    assert "calibration" in failed(evaluate(month.label, month.poor, high, clusters=month.day, policy=policy))
    low = np.clip(month.good - 0.1, 0, 1)
    assert "calibration" in failed(evaluate(month.label, month.poor, low, clusters=month.day, policy=policy))
    assert "calibration" not in failed(evaluate(month.label, month.poor, month.good, clusters=month.day, policy=policy))


@pytest.mark.parametrize("latency", [None, {}, {"p95_ms": None}, {"p95_ms": float("nan")}, {"p95_ms": 60.0}])
def test_latency_unknown_or_too_long_does_not_pass(month, latency):
    policy = GatePolicy(max_latency_ms=50)
    verdict = evaluate(month.label, month.poor, month.good, clusters=month.day, policy=policy, latency=latency)
    assert failed(verdict) == {"latency p95 [ms]"}


def test_latency_within_the_limit_passes(month):
    policy = GatePolicy(max_latency_ms=50)
    latency = {"p95_ms": 49.0}
    assert evaluate(month.label, month.poor, month.good, clusters=month.day, policy=policy, latency=latency).passed


@pytest.mark.parametrize(
    ("policy", "latency", "name"),
    [
        ({"max_p99_ms": 80}, {"p99_ms": 81.0}, "latency p99 [ms]"),
        ({"max_memory_mib": 500}, {"memory_mib": 501.0}, "memory [MiB]"),
        ({"max_memory_mib": 500}, {"p99_ms": 1.0}, "memory [MiB]"),
        ({"max_latency_ratio": 1.5}, {"p95_ms": 16.0}, "latency p95, times the champion's"),
        ({"max_latency_ratio": 1.5}, None, "latency p95, times the champion's"),
    ],
)
def test_what_serving_costs_is_limited(month, policy, latency, name):
    def judge(found, champion=10.0):
        given = GatePolicy(**policy)
        serving = {"latency": found, "champion_latency": {"p95_ms": champion}}
        return failed(evaluate(month.label, month.poor, month.good, clusters=month.day, policy=given, **serving))

    assert judge(latency) == {name}
    assert judge({"p95_ms": 14.0, "p99_ms": 79.0, "memory_mib": 499.0}) == set()
    if "max_latency_ratio" in policy:
        assert judge({"p95_ms": 14.0}, None) == {name}
        first = evaluate(month.label, None, month.good, clusters=month.day, policy=GatePolicy(**policy))
        assert name not in {check.name for check in first.checks}


def test_arms_scored_on_different_rows_are_refused(month):
    label, poor, good = (pd.Series(values) for values in (month.label, month.poor, month.good))
    assert evaluate(label, poor, good, clusters=month.day).passed
    with pytest.raises(InvalidInputError, match="the champion has predictions for different rows"):
        evaluate(label, poor.sample(frac=1, random_state=0), good, clusters=month.day)


@pytest.mark.parametrize(
    ("metric", "method", "shown"),
    [
        ("log_loss", None, "clustered t"),
        ("log_loss", "permutation", "permutation, all exchanges; interval of the cluster bootstrap"),
        ("brier", "bootstrap", "cluster bootstrap"),
        ("auc", None, "clustered DeLong"),
        ("auc", "bootstrap", "cluster bootstrap"),
        ("accuracy", None, "clustered t"),
        ("sklearn.metrics:roc_auc_score", None, "permutation, all exchanges; interval of the cluster bootstrap"),
    ],
)
def test_the_policys_test_decides_and_the_others_stand_beside_it(month, metric, method, shown):
    policy = GatePolicy(metric=metric, method=method, replicates=200)
    verdict = evaluate(month.label, month.poor, month.good, clusters=month.day, policy=policy)
    first, *others = verdict.differences
    assert (first["metric"], first["method"]) == (metric, shown)
    assert {gain["metric"] for gain in others} >= {"log_loss", "brier", "auc"} - {metric}
    assert len({(gain["metric"], gain["method"]) for gain in verdict.differences}) == len(verdict.differences)
    assert shown in verdict.reasons[0]


def test_a_slice_that_loses_stops_a_challenger_that_wins_overall(month):
    spoiled = np.where(month.origin == "LGA", month.poor, month.good)
    champion = np.where(month.origin == "LGA", month.good, month.poor)
    verdict = evaluate(month.label, champion, spoiled, clusters=month.day, slices={"origin": month.origin})
    assert failed(verdict) == {"worst slice"}
    assert verdict.slices[0]["value"] == "LGA"
    tolerant = GatePolicy(slice_tolerance=1.0)
    assert evaluate(
        month.label, champion, spoiled, clusters=month.day, slices={"origin": month.origin}, policy=tolerant
    ).passed


def test_small_slices_are_shown_and_not_tested(month):
    carrier = np.array(["UA"] * 3990 + ["OO"] * 10)
    rows = evaluate(month.label, month.poor, month.good, clusters=month.day, slices={"carrier": carrier}).slices
    assert {row["value"]: row["tested"] for row in rows} == {"UA": True, "OO": False}
    assert {row["value"]: row["rows"] for row in rows} == {"UA": 3990, "OO": 10}


def test_a_slice_of_few_days_is_shown_and_not_tested(month):
    """A thousand rows of three days are three units of evidence."""
    days = np.where(month.day < 3, "three days", "rest")
    slices = evaluate(month.label, month.poor, month.good, clusters=month.day, slices={"d": days}).slices
    assert {row["value"]: row["tested"] for row in slices} == {"three days": False, "rest": True}


def test_missing_slice_values_are_a_slice(month):
    carrier = np.array([None, "UA"] * 2000, dtype=object)
    rows = evaluate(month.label, month.poor, month.good, clusters=month.day, slices={"carrier": carrier}).slices
    assert {row["value"] for row in rows} == {"missing", "UA"}


def test_equal_slices_seldom_stop_anything():
    rng = np.random.default_rng(9)
    stopped, trials = 0, 200
    for _ in range(trials):
        day = np.repeat(np.arange(8), 100)
        signal = rng.normal(size=800)
        label = (rng.random(800) < 1 / (1 + np.exp(-signal))).astype(int)
        arms = [1 / (1 + np.exp(-(signal + 0.5 * rng.normal(size=800)))) for _ in range(2)]
        policy = GatePolicy(slice_tolerance=0.0, slice_min_rows=50)
        verdict = evaluate(label, *arms, clusters=day, slices={"s": rng.integers(0, 8, 800)}, policy=policy)
        stopped += "worst slice" in failed(verdict)
    assert stopped / trials <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)


@pytest.mark.parametrize("champion", [True, False])
def test_too_little_data_never_passes(month, champion):
    def judge(rows, **policy):
        old = month.poor[rows] if champion else None
        return failed(
            evaluate(month.label[rows], old, month.good[rows], clusters=month.day[rows], policy=GatePolicy(**policy))
        )

    comparison = {"comparison with the champion"} if champion else set()
    assert judge(slice(0, 300)) == {"rows"} | comparison
    assert judge(slice(None), min_clusters=11) == {"clusters"} | comparison
    assert judge(month.label == 0) == {"classes", "auc"} | comparison
    assert judge(slice(0, 0)) == {"labelled", "rows", "clusters", "classes", "auc"} | comparison


def test_labels_that_are_mostly_out_never_pass(month):
    def judge(unlabelled, **policy):
        arms = (month.poor, month.good)
        verdict = evaluate(month.label, *arms, clusters=month.day, unlabelled=unlabelled, policy=GatePolicy(**policy))
        assert verdict.unlabelled == unlabelled
        return verdict.passed

    assert judge(1000) and not judge(1001)
    assert judge(1001, min_labelled=0.7)
    with pytest.raises(InvalidInputError, match="min_labelled is 8"):
        judge(0, min_labelled=8)
    assert GatePolicy.from_json({"min_labelled": "0.5", "min_rows": "10"}) == GatePolicy(min_labelled=0.5, min_rows=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"challenger": [0.5]}, "same rows"),
        ({"champion": [0.5]}, "same rows"),
        ({"champion": "nan"}, "of the champion are not probabilities"),
        ({"challenger": "nan"}, "of the challenger are not probabilities"),
        ({"clusters": [1, 2]}, "clusters has 2 values"),
        ({"slices": {"origin": ["EWR"]}}, "origin has 1 values"),
        ({"slices": {"id": "rows"}}, "Bin it first"),
        ({"policy": GatePolicy(alpha=0.9)}, "alpha is 0.9"),
    ],
)
def test_bad_input_is_an_error_not_a_verdict(month, change, message):
    given = {"label": month.label, "champion": month.poor, "challenger": month.good, "clusters": month.day}
    for key, value in change.items():
        if value == "nan":
            value = np.where(np.arange(len(month.label)) == 7, np.nan, month.good)
        elif value == {"id": "rows"}:
            value = {"id": np.arange(len(month.label))}
        given[key] = value
    with pytest.raises(InvalidInputError, match=message):
        evaluate(**given)


def test_a_verdict_survives_json(month):
    verdict = evaluate(
        month.label,
        month.poor,
        month.good,
        clusters=month.day,
        slices={"origin": month.origin},
        latency={"p95_ms": float("nan")},
    )
    text = json.dumps(verdict.to_json(), allow_nan=False)
    assert GateVerdict.from_json({**json.loads(text), "report_uri": "x"}).to_json() == json.loads(text)


def test_the_same_input_gives_the_same_verdict(month):
    first, second = (evaluate(month.label, month.poor, month.good, clusters=month.day).to_json() for _ in range(2))
    assert first == second


def test_the_report_shows_verdict_and_plots(month):
    verdict = evaluate(month.label, month.good, month.poor, clusters=month.day, slices={"<origin>": month.origin})
    page = render(verdict, month.label, month.poor, month.good, title="July & <August>")
    assert 'July &amp; &lt;August&gt; <span class="chip bad">failed' in page
    assert page.count("data:image/png;base64,") == 2
    assert "&lt;origin&gt;" in page
    assert "http" not in page
    assert page.index("NO</b></td><td>improvement in log_loss") < page.index("yes</b></td><td>rows")


def test_the_report_shows_all_that_was_judged(month):
    policy = GatePolicy(
        max_missing_loss=0.1,
        max_latency_ratio=2,
        fairness={"column": "<sex>", "metrics": {"demographic_parity_difference": 0.2}},
    )
    verdict = evaluate(
        month.label,
        month.poor,
        month.good,
        clusters=month.day,
        groups={"<sex>": month.origin},
        policy=policy,
        latency={"p95_ms": 12.5},
        champion_latency={"p95_ms": 11.25},
        missing=[
            {"what": "wind & rain", "loss": None, "refused": "no <NaN>"},
            {"what": "hour", "loss": 0.02, "refused": None},
        ],
        cases=[{"name": "a <storm>", "passed": False, "found": "0.2", "expected": "0.9 to 1"}],
    )
    page = render(verdict, month.label, month.good, month.poor)
    for shown in (
        "&lt;sex&gt;",
        "wind &amp; rain",
        "refuses: no &lt;NaN&gt;",
        "a &lt;storm&gt;",
        "11.25",
        "Spiegelhalter",
    ):
        assert shown in page, shown
    text = json.dumps(verdict.to_json(), allow_nan=False)
    assert GateVerdict.from_json(json.loads(text)).to_json() == json.loads(text)
    old = {key: value for key, value in json.loads(text).items() if key not in ("fairness", "missing", "cases")}
    assert GateVerdict.from_json(old).cases == ()


def test_the_report_does_without_plots_when_there_is_nothing_to_plot(month):
    rows = month.label == 0
    verdict = evaluate(month.label[rows], None, month.good[rows], clusters=month.day[rows])
    assert "data:image" not in render(verdict, month.label[rows], month.good[rows])


class TestPolicy:
    def test_json_round_trip_and_template_text(self):
        policy = GatePolicy(metric="auc", floors={"auc": 0.7}, max_latency_ms=20)
        assert GatePolicy.from_json(policy.to_json()) == policy
        policy = GatePolicy(
            metric="a:b",
            method="bootstrap",
            greater_is_better=False,
            floors={"a:b": -1},
            calibration_slope=(0.8, 1.2),
            fairness={"column": "sex", "metrics": {"equalized_odds_ratio": 0.8}},
        )
        assert GatePolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy
        assert GatePolicy.from_json({"greater_is_better": "False"}) == GatePolicy(greater_is_better=False)
        text = {"alpha": "0.01", "min_rows": "100", "floors": {"auc": "0.6"}, "max_latency_ms": "None"}
        assert GatePolicy.from_json(text) == GatePolicy(alpha=0.01, min_rows=100, floors={"auc": 0.6})

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ({"metric": "f1"}, "metric is 'f1'"),
            ({"rule": "better"}, "rule is 'better'"),
            ({"floor": 1}, "has no \\['floor'\\]"),
            ({"floors": {"acc": 1}}, "\\['acc'\\]"),
            ({"ceilings": {"auc": 1}}, "\\['auc'\\]"),
            ({"alpha": 0}, "alpha is 0"),
            ({"alpha": "much"}, "alpha is 'much'"),
            ({"alpha": None}, "are empty"),
            ({"margin": -1}, "not negative"),
            ({"margin": float("nan")}, "finite"),
            ({"floors": {"auc": float("nan")}}, "finite"),
            ({"rule": "non_inferiority"}, "positive margin"),
            ({"min_clusters": 1}, "at least 2"),
            ({"method": "magic"}, "method is 'magic'; for the metric log_loss expected one of"),
            ({"metric": "accuracy", "method": "delong"}, "for the metric accuracy expected"),
            ({"metric": "auc", "method": "permutation", "margin": 0.01}, "for the metric auc expected one of"),
            ({"metric": "a:b", "method": "permutation", "rule": "non_inferiority", "margin": 1}, "method='bootstrap'"),
            ({"threshold": 1.5}, "threshold is 1.5"),
            ({"missing_share": -1}, "missing_share is -1"),
            ({"replicates": 50}, "fewer than 200"),
            ({"greater_is_better": "perhaps"}, "expected true or false"),
            ({"calibration_slope": [1.1, 1.3]}, "with 1 between them"),
            ({"calibration_slope": "steep"}, "calibration_slope is 'steep'"),
            ({"max_memory_mib": -5}, "not negative"),
            ({"floors": {"a:b": float("inf")}}, "finite numbers"),
        ],
    )
    def test_what_makes_no_rule_is_refused(self, value, message):
        with pytest.raises(InvalidInputError, match=message):
            GatePolicy.from_json(value)


def test_a_class_on_one_day_alone_decides_nothing_by_auc():
    """Ten days, but every pair has its positive on the first: that is one independent unit."""
    rng = np.random.default_rng(0)
    day = np.repeat(np.arange(10), 100)
    label = ((day == 0) & (rng.random(1000) < 0.5)).astype(int)
    arms = rng.random((2, 1000))
    verdict = evaluate(label, *arms, clusters=day, policy=GatePolicy(metric="auc"))
    assert "clusters: 1; required: at least 5 with rows of each class" in verdict.reasons


def test_permutations_too_few_for_alpha_are_refused():
    with pytest.raises(InvalidInputError, match=r"2000 permutations give no p-value below 0\.0005.*more than 2500"):
        GatePolicy(method="permutation", alpha=0.0004, replicates=2000).validate()
