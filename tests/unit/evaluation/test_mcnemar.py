from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize
from statsmodels.stats.contingency_tables import mcnemar as reference

from airflow_mlops.evaluation import GatePolicy, evaluate
from airflow_mlops.evaluation.mcnemar import accuracy_gain, mcnemar, tango, tango_interval
from airflow_mlops.evaluation.metrics import row_loss


@pytest.mark.parametrize(("wins", "losses"), [(9, 3), (30, 12), (100, 80)])
def test_the_exact_test_is_half_of_the_two_sided_one(wins, losses):
    two_sided = reference([[50, losses], [wins, 60]], exact=True).pvalue
    assert 2 * mcnemar(wins, losses) == pytest.approx(two_sided)
    assert mcnemar(losses, wins) > 0.5


def test_without_discordant_rows_nothing_is_shown():
    assert mcnemar(0, 0) == 1
    assert tango(0, 0, 100, -0.05) < 0.05 < tango(0, 0, 10, -0.05)


def by_likelihood(wins, losses, rows, bound):
    """The score statistic with the constrained maximum found numerically."""

    def negative(chance):
        chances = np.array([chance + bound, chance, 1 - 2 * chance - bound])
        return -float(np.dot([wins, losses, rows - wins - losses], np.log(np.clip(chances, 1e-300, None))))

    low, high = max(0, -bound), (1 - bound) / 2
    chance = optimize.minimize_scalar(negative, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (wins - losses - rows * bound) / np.sqrt(rows * (2 * chance + bound - bound**2))


@pytest.mark.parametrize(("wins", "losses"), [(12, 5), (5, 12), (40, 41), (0, 7)])
@pytest.mark.parametrize("bound", [-0.1, -0.02, 0.03, 0.2])
def test_the_score_test_is_that_of_the_likelihood(wins, losses, bound):
    from scipy.stats import norm

    expected = norm.sf(by_likelihood(wins, losses, 200, bound))
    assert tango(wins, losses, 200, bound) == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_the_interval_inverts_the_test():
    low, high = tango_interval(12, 5, 200, 0.05)
    assert tango(12, 5, 200, low) == pytest.approx(0.05)
    assert 1 - tango(12, 5, 200, high) == pytest.approx(0.05)
    assert low < 7 / 200 < high
    assert tango_interval(0, 0, 50, 0.05)[0] == pytest.approx(-tango_interval(0, 0, 50, 0.05)[1])
    assert tango_interval(50, 0, 50, 0.05)[1] == 1


def forecasts(rng, rows=1200):
    signal = rng.normal(size=rows)
    label = (rng.random(rows) < 1 / (1 + np.exp(-2 * signal))).astype(int)
    good, poor = (1 / (1 + np.exp(-(signal + noise * rng.normal(size=rows)))) for noise in (0.2, 1.5))
    return label, poor, good


def test_accuracy_decides_at_the_threshold():
    label, poor, good = forecasts(np.random.default_rng(0))
    policy = GatePolicy(metric="accuracy", floors={"accuracy": 0.6})
    verdict = evaluate(label, poor, good, policy=policy)
    assert verdict.passed
    assert verdict.metrics["challenger"]["accuracy"] == pytest.approx(((good >= 0.5) == label).mean())
    assert verdict.differences[0]["method"].startswith("exact McNemar")
    assert not evaluate(label, good, poor, policy=policy).passed
    shifted = GatePolicy(metric="accuracy", threshold=0.999)
    assert evaluate(label, poor, good, policy=shifted).differences[0]["estimate"] < 0.01
    floor = GatePolicy(metric="accuracy", floors={"accuracy": 0.99})
    assert "accuracy" in evaluate(label, poor, good, policy=floor).reasons[0]


def test_rows_of_a_day_are_no_independent_discordance():
    label, poor, good = forecasts(np.random.default_rng(1))
    day = np.repeat(np.arange(12), 100)
    clustered = accuracy_gain(label, poor, good, day)
    assert clustered.degrees == 11
    difference = row_loss("accuracy", label, poor) - row_loss("accuracy", label, good)
    assert clustered.estimate == pytest.approx(difference.mean())
    copies = [np.repeat(values, 10) for values in (label, poor, good)]
    assert accuracy_gain(*copies).p_value(0) < accuracy_gain(*copies, np.repeat(np.arange(1200), 10)).p_value(0)


def test_a_worse_model_within_the_margin_is_seldom_taken():
    """At the margin itself, truly worse by it, at most one in 20 passes."""
    rng = np.random.default_rng(2)
    rows, margin, passed, trials = 800, 0.03, 0, 2000
    for _ in range(trials):
        losses, wins, _ = rng.multinomial(rows, [0.06, 0.03, 0.91])
        passed += tango(wins, losses, rows, -margin) < 0.05
    assert 0.03 < passed / trials <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)
