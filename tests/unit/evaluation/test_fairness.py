from __future__ import annotations

import sys

import numpy as np
import pytest

from airflow_mlops.evaluation import GatePolicy, evaluate, fairness
from airflow_mlops.evaluation.fairness import METRICS as METRICS_OF_TABLES
from airflow_mlops.evaluation.fairness import assess, by_tables
from airflow_mlops.evaluation.rules import fairness_rules
from airflow_mlops.exceptions import InvalidInputError

fairlearn = pytest.importorskip("fairlearn.metrics", reason="pip install 'airflow-mlops[fairness]'")

ROWS = 4000
METRICS = {"demographic_parity_difference": 0.1, "equalized_odds_difference": 0.2, "demographic_parity_ratio": 0.8}


def world(shift=0.0, seed=0, rows=ROWS):
    """A model that scores group B lower by ``shift`` for no reason."""
    rng = np.random.default_rng(seed)
    group = rng.choice(["A", "B", "C"], rows, p=[0.5, 0.3, 0.2])
    signal = rng.normal(size=rows)
    label = (rng.random(rows) < 1 / (1 + np.exp(-2 * signal))).astype(np.int8)
    probability = 1 / (1 + np.exp(-(2 * signal - shift * (group == "B"))))
    return label, probability, group, rng.integers(0, 12, rows)


def judge(shift=0.0, rule=None, groups=None, **policy):
    label, probability, group, day = world(shift)
    fairness = {"column": "sex", "metrics": METRICS, **(rule or {})}
    given = GatePolicy(fairness=fairness, **policy)
    return evaluate(
        label, None, probability, clusters=day, groups={"sex": group} if groups is None else groups, policy=given
    )


def failed(verdict):
    return {check.name.rpartition(" ")[2]: check.value for check in verdict.checks if not check.passed}


def test_estimates_are_fairlearns():
    label, probability, group, day = world(0.5)
    found = assess(fairness_rules({"column": "sex", "metrics": METRICS}), label, probability, {"sex": group}, day)
    for entry in found:
        expected = getattr(fairlearn, entry["metric"])(label, probability >= 0.5, sensitive_features=group)
        assert entry["estimate"] == pytest.approx(expected)
        assert entry["interval"][0] < entry["estimate"] + 0.02 and entry["interval"][1] > entry["estimate"] - 0.02
    table = {row["group"]: row for row in found[0]["groups"]}
    mask = group == "B"
    assert table["B"]["rows"] == mask.sum()
    assert table["B"]["selection_rate"] == pytest.approx((probability[mask] >= 0.5).mean())
    assert table["B"]["true_positive_rate"] == pytest.approx((probability[mask & (label == 1)] >= 0.5).mean())


@pytest.mark.parametrize("metric", METRICS_OF_TABLES)
@pytest.mark.parametrize("kind", ["difference", "ratio"])
def test_resamples_are_what_fairlearn_would_say(metric, kind):
    tables = np.random.default_rng(0).integers(1, 40, (3, 4, 2, 2)).astype(float)
    found = by_tables(f"{metric}_{kind}", tables)
    group, label, decided = (axis.ravel() for axis in np.indices((4, 2, 2)))
    for table, value in zip(tables, found):
        given = {"sensitive_features": group, "sample_weight": table.ravel()}
        assert value == pytest.approx(getattr(fairlearn, f"{metric}_{kind}")(label, decided, **given))


def test_the_interval_is_that_of_resampled_rows():
    label, probability, group, _ = world(1.0, rows=1500)
    rule = fairness_rules({"column": "sex", "metrics": {"selection_rate_difference": 0.1}})
    (found,) = assess(rule, label, probability, {"sex": group}, None)
    rng = np.random.default_rng(1)
    slow = []
    for _ in range(100):
        rows = rng.integers(0, len(label), len(label))
        slow.append(
            fairlearn.selection_rate_difference(label[rows], probability[rows] >= 0.5, sensitive_features=group[rows])
        )
    assert found["interval"] == pytest.approx(np.quantile(slow, [0.05, 0.95]), abs=0.025)


def test_whole_days_are_resampled():
    """A day on which one group is treated otherwise is one observation, not hundreds."""
    label, _, group, day = world(seed=2)
    rng = np.random.default_rng(2)
    probability = np.where(group == "A", 0.5, rng.random(12)[day])
    rule = fairness_rules({"column": "sex", "metrics": {"selection_rate_difference": 0.1}})
    widths = [
        np.diff(assess(rule, label, probability, {"sex": group}, codes)[0]["interval"])[0] for codes in (day, None)
    ]
    assert widths[0] > 3 * widths[1]


def test_a_fair_model_passes_and_an_unfair_one_does_not():
    assert failed(judge()) == {}
    found = failed(judge(shift=2.0))
    assert set(found) == set(METRICS)
    assert "to" in found["demographic_parity_difference"]


def test_to_be_shown_is_more_than_to_be_found():
    limits = {"demographic_parity_difference": 0.06}
    assert failed(judge(rule={"metrics": limits})) == {}
    assert set(failed(judge(rule={"metrics": limits, "require": "shown"}))) == set(limits)
    wide = {"demographic_parity_difference": 0.5}
    assert failed(judge(rule={"metrics": wide, "require": "shown"})) == {}


def test_one_day_s_interval_is_not_no_interval_at_all():
    label, probability, group, _ = world()
    rule = {"column": "sex", "metrics": {"demographic_parity_difference": 0.5}, "require": "shown"}
    for days, passes in ((np.zeros(ROWS, int), False), (np.arange(ROWS) % 12, True)):
        (found,) = assess(fairness_rules(rule), label, probability, {"sex": group}, days)
        (check,) = fairness.checks([found])
        assert (found["interval"] is not None, check.passed) == (passes, passes)


def test_what_cannot_be_told_does_not_pass():
    found = failed(judge(rule={"min_rows": 1000}))
    assert found["equalized_odds_difference"].startswith("not enough: C has")
    label, probability, group, day = world()
    label = np.where(group == "C", 0, label)
    policy = GatePolicy(fairness={"column": "sex", "metrics": METRICS})
    verdict = evaluate(label, None, probability, clusters=day, groups={"sex": group}, policy=policy)
    assert failed(verdict)["equalized_odds_difference"] == "not enough: C has no positive rows"
    one = {"sex": np.full(ROWS, "A")}
    assert "only 1 group" in failed(judge(groups=one))["demographic_parity_difference"]
    few = evaluate(label[:20], None, probability[:20], groups={"sex": group[:20]}, policy=policy)
    assert "fairness" in {check.name for check in few.checks if not check.passed}


def test_missing_is_a_group_and_listed_groups_are_compared_alone():
    label, probability, group, day = world(2.0)
    group = np.where(group == "C", None, group.astype(object))
    metrics = {"column": "sex", "metrics": {"demographic_parity_difference": 0.1}}
    (every,) = assess(fairness_rules(metrics), label, probability, {"sex": group}, day)
    assert {row["group"] for row in every["groups"]} == {"A", "B", "missing"}
    rule = fairness_rules({**metrics, "groups": ["A", "missing"]})
    (listed,) = assess(rule, label, probability, {"sex": group}, day)
    assert listed["estimate"] < 0.1 < every["estimate"]


@pytest.mark.parametrize(
    ("rule", "groups", "message"),
    [
        ({"groups": ["A", "D"]}, None, r"lists the groups \['D'\], which have no rows; there are \['A', 'B', 'C'\]"),
        ({}, {}, "needs that column"),
        ({}, {"sex": ["A"]}, "sex has 1 values"),
        (
            {"metrics": {"niceness_difference": 0.1}},
            None,
            r"names \['niceness_difference'\]; expected some of .*equalized_odds",
        ),
        ({"metrics": {"demographic_parity": 0.1}}, None, "ends in _difference or _ratio"),
        ({"metrics": {"demographic_parity_difference": "x"}}, None, "could not convert"),
        ({"metrics": {"demographic_parity_difference": 2}}, None, "from 0 to 1"),
        ({"metrics": {}}, None, "needs a column and metrics"),
        ({"require": "hope"}, None, "require='hope'"),
        ({"limit": 1}, None, r"has no \['limit'\]"),
        ({"groups": "A"}, None, "expected a list"),
        ({"min_rows": 0}, None, "at least 1"),
    ],
)
def test_a_rule_that_cannot_be_applied_is_named(rule, groups, message):
    with pytest.raises(InvalidInputError, match=message):
        judge(rule=rule, groups=groups)


def test_several_columns_have_their_rules():
    label, probability, group, day = world(2.0)
    limits = {"metrics": {"demographic_parity_difference": 0.1}}
    policy = GatePolicy.from_json({"fairness": [{"column": "sex", **limits}, {"column": "region", **limits}]})
    columns = {"sex": group, "region": np.where(day > 5, "N", "S")}
    verdict = evaluate(label, None, probability, clusters=day, groups=columns, policy=policy)
    assert [check.name for check in verdict.checks if not check.passed] == [
        "fairness by sex: demographic_parity_difference"
    ]
    with pytest.raises(InvalidInputError, match="expected a mapping"):
        GatePolicy.from_json({"fairness": "sex"})


def test_without_fairlearn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fairlearn", None)
    with pytest.raises(InvalidInputError, match=r"pip install 'airflow-mlops\[fairness\]'"):
        judge()
