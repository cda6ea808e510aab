"""The tests hold their error rates on simulated pairs, also when rows of one day depend on each other."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from statsmodels.stats.multitest import multipletests

from airflow_mlops.evaluation.paired import auc_gain, auc_gain_bootstrap, concordance, holm, loss_gain

ALPHA = 0.05
PAIRS = 2000


def equal_pair(rng, days=14, rows=40, day_noise=0.6):
    """Two forecasts that are equally good, each with errors shared by the rows of a day."""
    day = np.repeat(np.arange(days), rows)
    signal = rng.normal(size=days * rows) + 0.3 * rng.normal(size=days)[day]
    label = (rng.random(len(day)) < 1 / (1 + np.exp(-signal))).astype(int)
    first, second = (
        1 / (1 + np.exp(-(signal + day_noise * rng.normal(size=days)[day] + 0.5 * rng.normal(size=len(day)))))
        for _ in range(2)
    )
    return label, first, second, day


def false_alarms(test, pairs=PAIRS, rows=40) -> float:
    rng = np.random.default_rng(11)
    return float(np.mean([test(*equal_pair(rng, rows=rows)).p_value(0.0) < ALPHA for _ in range(pairs)]))


# Three standard errors of a rate of 5 % over 2,000 pairs.
LIMIT = ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / PAIRS)


@pytest.mark.parametrize("metric", ["log_loss", "brier"])
def test_equal_models_seldom_look_better_in_loss(metric):
    rate = false_alarms(lambda y, a, b, day: loss_gain(metric, y, a, b, day))
    assert 0.02 < rate <= LIMIT


def test_equal_models_seldom_look_better_in_auc():
    rate = false_alarms(lambda y, a, b, day: auc_gain(y, a, b, day))
    assert 0.02 < rate <= LIMIT


def test_ignoring_the_days_would_promise_too_much():
    rate = false_alarms(lambda y, a, b, day: loss_gain("log_loss", y, a, b), pairs=300, rows=200)
    assert rate > 0.15


def test_a_better_model_is_found():
    rng = np.random.default_rng(5)
    found = 0
    for _ in range(100):
        label, first, _, day = equal_pair(rng, rows=150, day_noise=0.2)
        logit = np.log(first / (1 - first))
        worse = 1 / (1 + np.exp(-(logit + 0.7 * rng.normal(size=len(logit)))))
        found += loss_gain("log_loss", label, worse, first, day).p_value(0.0) < ALPHA
    assert found >= 95


def test_clustered_error_is_the_textbook_one():
    label = np.array([0, 0, 0, 0, 1, 1])
    day = np.array(["a", "a", "b", "b", "c", "c"])
    gain = loss_gain("brier", label, np.full(6, 0.5), np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), day)
    values = 0.25 - (np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) - label) ** 2
    sums = [sum(values[i : i + 2] - values.mean()) for i in (0, 2, 4)]
    assert gain.estimate == pytest.approx(values.mean())
    assert gain.standard_error == pytest.approx(np.sqrt(3 / 2 * np.sum(np.square(sums))) / 6)
    assert gain.degrees == 2


def delong_by_definition(label, champion, challenger):
    """Covariances of the placement values, pair by pair."""
    positive, negative = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
    kernels = []
    for score in (challenger, champion):
        a, b = score[positive][:, None], score[negative][None, :]
        kernels.append((a > b) + 0.5 * (a == b))
    difference = kernels[0] - kernels[1]
    v10, v01 = difference.mean(axis=1), difference.mean(axis=0)
    return difference.mean(), np.sqrt(v10.var(ddof=1) / len(positive) + v01.var(ddof=1) / len(negative))


def test_delong_matches_its_definition_ties_included():
    rng = np.random.default_rng(3)
    label, first, second, _ = equal_pair(rng, days=5)
    first, second = np.round(first, 1), np.round(second, 1)
    gain = auc_gain(label, first, second)
    assert (gain.estimate, gain.standard_error) == pytest.approx(delong_by_definition(label, first, second))
    assert gain.estimate == pytest.approx(roc_auc_score(label, second) - roc_auc_score(label, first))


def test_bootstrap_resamples_whole_days():
    label, first, second, day = equal_pair(np.random.default_rng(4), days=20)
    gain = auc_gain_bootstrap(label, first, second, day, replicates=3000, rng=np.random.default_rng(0))
    rng = np.random.default_rng(1)
    slow = []
    for _ in range(600):
        rows = np.concatenate([np.flatnonzero(day == d) for d in rng.integers(0, 20, 20)])
        slow.append(roc_auc_score(label[rows], second[rows]) - roc_auc_score(label[rows], first[rows]))
    assert gain.estimate == pytest.approx(roc_auc_score(label, second) - roc_auc_score(label, first))
    assert gain.standard_error == pytest.approx(np.std(slow), rel=0.12)
    assert gain.interval == pytest.approx(np.quantile(slow, [0.05, 0.95]), abs=0.006)
    assert gain.standard_error == pytest.approx(auc_gain(label, first, second, day).standard_error, rel=0.25)


def test_concordance_counts_every_pair():
    label, score, _, day = equal_pair(np.random.default_rng(6), days=3, rows=10)
    score = np.round(score, 1)
    table = concordance(label, score, day, 3)
    for g in range(3):
        for h in range(3):
            a, b = score[(day == g) & (label == 1)][:, None], score[(day == h) & (label == 0)][None, :]
            assert table[g, h] == ((a > b) + 0.5 * (a == b)).sum()


def test_holm_agrees_with_statsmodels():
    p = np.array([0.04, 0.001, 0.3, 0.012, 0.9, 0.012])
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert len(holm([])) == 0


def test_identical_forecasts_gain_exactly_nothing():
    label, first, _, day = equal_pair(np.random.default_rng(8))
    for gain in (loss_gain("log_loss", label, first, first, day), auc_gain(label, first, first, day)):
        assert gain.standard_error == 0
        assert gain.p_value(0.0) == 1
        assert gain.p_value(-0.01) == 0
        assert gain.p_worse(0.0) == 1
        assert gain.p_worse(0.01) == 0
