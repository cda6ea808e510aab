"""Bootstrap and permutation: the numbers of their definitions, and error rates as stated."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from airflow_mlops.evaluation import GatePolicy, evaluate
from airflow_mlops.evaluation.gate import decisive
from airflow_mlops.evaluation.objective import objective
from airflow_mlops.evaluation.paired import auc_gain, loss_gain
from airflow_mlops.evaluation.resample import (
    WeightedAuc,
    auc_bootstrap,
    bootstrap,
    mean_permutation,
    permutation,
    weights,
)
from airflow_mlops.exceptions import InvalidInputError

ALPHA = 0.05
PRECISION = "sklearn.metrics:average_precision_score"


def pair(rng, days=14, rows=30, shared=0.6, noise=(0.5, 0.5)):
    """Two forecasts, each with an error shared by the rows of a day; equally good when ``noise`` is."""
    day = np.repeat(np.arange(days), rows)
    signal = rng.normal(size=len(day))
    label = (rng.random(len(day)) < 1 / (1 + np.exp(-1.5 * signal))).astype(int)
    first, second = (
        1 / (1 + np.exp(-(signal + shared * rng.normal(size=days)[day] + size * rng.normal(size=len(day)))))
        for size in noise
    )
    return label, first, second, day


def brier_by_row(label, probability):
    """A metric of the user's, less is better."""
    return float(((label - probability) ** 2).mean())


def top_decile(label, probability):
    """The share of positives among the tenth with the highest scores."""
    return float(label[np.argpartition(probability, -len(label) // 10)[-len(label) // 10 :]].mean())


@pytest.mark.parametrize("decimals", [1, 6])
def test_a_weighted_auc_is_that_of_scikit_learn_ties_included(decimals):
    rng = np.random.default_rng(0)
    label, score, _, _ = pair(rng)
    score = np.round(score, decimals)
    found = WeightedAuc(label, score)
    for weight in weights(rng, len(label), 5):
        assert found(weight) == pytest.approx(roc_auc_score(label, score, sample_weight=weight), abs=1e-12)
    assert np.isnan(found((label == 1).astype(np.int32)))


@pytest.mark.parametrize("count", [50, 20_001])
def test_weights_have_the_mean_and_variance_of_drawing_with_replacement(count):
    drawn = np.array(list(weights(np.random.default_rng(0), count, 400)), dtype=float)
    drawn /= drawn.mean()
    assert drawn.shape == (400, count)
    assert drawn.var() == pytest.approx(1, abs=0.06)
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, -1])[0, 1]) < 0.2


def test_the_bootstrap_of_rows_has_the_error_of_a_loop_and_of_delong():
    label, first, second, _ = pair(np.random.default_rng(1), days=1, rows=12_000, shared=0)
    gain = auc_bootstrap(label, first, second, replicates=1000)
    assert gain.estimate == pytest.approx(roc_auc_score(label, second) - roc_auc_score(label, first))
    assert gain.standard_error == pytest.approx(auc_gain(label, first, second).standard_error, rel=0.08)
    rng = np.random.default_rng(2)
    slow = []
    for _ in range(150):
        rows = rng.integers(0, len(label), len(label))
        slow.append(roc_auc_score(label[rows], second[rows]) - roc_auc_score(label[rows], first[rows]))
    assert gain.standard_error == pytest.approx(np.std(slow), rel=0.25)
    again = auc_bootstrap(label, first, second, replicates=1000)
    assert gain == again


def test_many_clusters_are_drawn_whole():
    """Eight copies of a row are one row's evidence."""
    label, first, second, _ = pair(np.random.default_rng(3), days=1, rows=600, shared=0)
    copies = [np.repeat(values, 8) for values in (label, first, second)]
    by_row = auc_bootstrap(*copies, replicates=600).standard_error
    gain = auc_bootstrap(*copies, np.repeat(np.arange(600), 8), replicates=600)
    assert gain.degrees == 599
    assert gain.standard_error == pytest.approx(auc_gain(label, first, second).standard_error, rel=0.12)
    assert gain.standard_error == pytest.approx(8**0.5 * by_row, rel=0.15)


def test_a_permutation_counts_every_exchange_of_few_clusters():
    label, first, second, day = pair(np.random.default_rng(4), days=6, noise=(0.6, 0.4))
    difference = (label - first) ** 2 - (label - second) ** 2
    sums = np.bincount(day, difference)
    totals = [float(np.dot(signs, sums)) for signs in itertools.product((1, -1), repeat=6)]
    expected = np.mean([total >= sums.sum() - 1e-12 for total in totals])
    assert mean_permutation("brier", label, first, second, day).p_value(0.0) == pytest.approx(expected)
    shifted = np.bincount(day, difference - 0.003)
    totals = [float(np.dot(signs, shifted)) for signs in itertools.product((1, -1), repeat=6)]
    expected = np.mean([total >= shifted.sum() - 1e-12 for total in totals])
    assert mean_permutation("brier", label, first, second, day).p_value(0.003) == pytest.approx(expected)


def test_any_metric_is_permuted_as_its_rows_are():
    """For a mean over rows, exchanging the arms is flipping signs."""
    label, first, second, day = pair(np.random.default_rng(5), days=8, noise=(0.6, 0.4))
    mine = objective(f"{__name__}:brier_by_row", GatePolicy(greater_is_better=False))
    any_metric = permutation(mine, label, first, second, day, replicates=200)
    assert any_metric.p_value(0.0) == mean_permutation("brier", label, first, second, day).p_value(0.0)
    assert any_metric.estimate == pytest.approx(loss_gain("brier", label, first, second, day).estimate)


@pytest.mark.parametrize(
    ("metric", "method", "by_day", "pairs"),
    [
        ("brier", "permutation", True, 1000),
        ("log_loss", "bootstrap", True, 1000),
        ("auc", "bootstrap", True, 1000),
        ("auc", "bootstrap", False, 300),
        ("accuracy", "mcnemar", True, 2000),
        ("accuracy", "mcnemar", False, 2000),
        ("accuracy", "permutation", True, 600),
        (f"{__name__}:top_decile", "bootstrap", True, 100),
        (f"{__name__}:top_decile", "permutation", True, 100),
    ],
)
def test_equal_models_seldom_look_better(metric, method, by_day, pairs):
    rng = np.random.default_rng(12)
    policy = GatePolicy(metric=metric, method=method, replicates=200)
    passed = 0
    for seed in range(pairs):
        label, first, second, day = pair(rng, rows=25, shared=0.6 if by_day else 0)
        passed += decisive(policy, label, first, second, day if by_day else None, seed).p_value(0.0) < ALPHA
    assert passed / pairs <= ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / pairs)
    assert passed > 0


@pytest.mark.parametrize("method", ["permutation", "bootstrap"])
def test_a_metric_of_the_users_decides(method):
    rng = np.random.default_rng(8)
    label, poor, good, day = pair(rng, rows=200, noise=(1.5, 0.3), shared=0.1)
    policy = GatePolicy(metric=PRECISION, method=method, replicates=200, floors={PRECISION: 0.3})
    verdict = evaluate(label, poor, good, clusters=day, policy=policy)
    assert verdict.passed
    expected = [average_precision_score(label, arm) for arm in (good, poor)]
    assert [verdict.metrics[arm][PRECISION] for arm in ("challenger", "champion")] == pytest.approx(expected)
    assert verdict.differences[0]["estimate"] == pytest.approx(expected[0] - expected[1])
    low, high = verdict.differences[0]["interval"]
    assert low < expected[0] - expected[1] < high
    assert not evaluate(label, good, poor, clusters=day, policy=policy).passed


def test_with_a_margin_a_function_is_tested_by_the_bootstrap():
    policy = GatePolicy(metric=PRECISION, rule="non_inferiority", margin=0.05, replicates=200)
    assert policy.validate().test == "bootstrap"
    label, first, second, day = pair(np.random.default_rng(9), rows=200, noise=(0.5, 0.5), shared=0.1)
    assert evaluate(label, first, second, clusters=day, policy=policy).passed
    worse = GatePolicy(metric=PRECISION, rule="non_inferiority", margin=0.0001, replicates=200)
    assert not evaluate(label, second, 1 - first, clusters=day, policy=worse).passed


def test_identical_arms_gain_nothing_by_any_method():
    label, first, _, day = pair(np.random.default_rng(10), days=6)
    pairs = [
        ("log_loss", "permutation"),
        ("log_loss", "bootstrap"),
        ("auc", "bootstrap"),
        ("accuracy", "mcnemar"),
        (PRECISION, "permutation"),
        (PRECISION, "bootstrap"),
    ]
    for metric, method in pairs:
        for clusters in (day, None):
            gain = decisive(GatePolicy(metric=metric, method=method, replicates=200), label, first, first, clusters)
            assert (gain.estimate, gain.p_value(0.0)) == (0, 1), (metric, method)


def nothing(label, probability):
    return None


def single_class(label, probability):
    if len(set(label[:40])) < 2:
        raise ValueError("only one class")
    return float(probability.mean())


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"metric": f"{__name__}:nothing"}, "of the challenger is None; expected a finite number"),
        ({"metric": "no.such:module"}, "cannot be imported: No module named 'no'"),
        ({"metric": f"{__name__}:absent"}, "cannot be imported"),
        ({"metric": f"{__name__}:ALPHA"}, "is a float; expected a function"),
        ({"metric": "sklearn.metrics:confusion_matrix"}, "fails on the challenger"),
        ({"metric": "sklearn.metrics:"}, "cannot be imported"),
    ],
)
def test_a_metric_that_an_arm_does_not_have_is_named(policy, message):
    label, first, second, day = pair(np.random.default_rng(11))
    with pytest.raises(InvalidInputError, match=message):
        evaluate(label, first, second, clusters=day, policy=GatePolicy(min_rows=10, **policy))


def test_resamples_without_the_metric_are_counted():
    label = np.array([1] + [0] * 399)
    first = np.linspace(0, 1, 400)
    metric = objective("auc", GatePolicy())
    with pytest.raises(InvalidInputError, match=r"auc cannot be computed on .* of 200 resamples"):
        bootstrap(metric, label, first, first[::-1], np.repeat(np.arange(10), 40), replicates=200)


def test_too_few_clusters_for_a_permutation_are_named():
    label, poor, good, day = pair(np.random.default_rng(13), days=5, rows=200, noise=(3, 0.1), shared=0)
    policy = GatePolicy(method="permutation", alpha=0.01, min_clusters=5)
    verdict = evaluate(label, poor, good, clusters=day, policy=policy)
    assert verdict.reasons[0] == "clusters: 5; required: at least 7 for a permutation test at 0.01"
    assert evaluate(label, poor, good, clusters=day, policy=GatePolicy(method="permutation")).passed
