from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from airflow_mlops.evaluation import score
from airflow_mlops.evaluation.metrics import reliability
from airflow_mlops.exceptions import InvalidInputError


@pytest.fixture
def forecast() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    # Rounded, so that many predictions are tied.
    probability = np.round(rng.beta(2, 5, 3000), 2)
    return (rng.random(3000) < probability).astype(int), probability


def test_score_agrees_with_scikit_learn(forecast):
    label, probability = forecast
    found = score(label, probability)
    assert found["auc"] == pytest.approx(roc_auc_score(label, probability), abs=1e-12)
    assert found["log_loss"] == pytest.approx(log_loss(label, np.clip(probability, 1e-15, 1 - 1e-15)), abs=1e-12)
    assert found["brier"] == pytest.approx(brier_score_loss(label, probability), abs=1e-12)
    assert found["rows"] == 3000
    assert found["base_rate"] == label.mean()
    assert found["calibration"] == pytest.approx(probability.mean() - label.mean())


def test_calibration_tells_too_high_from_too_low(forecast):
    label, probability = forecast
    honest, high, low = (score(label, np.clip(probability + shift, 0, 1)) for shift in (0, 0.2, -0.1))
    assert high["calibration"] > 0.15
    assert low["calibration"] < -0.05
    assert honest["calibration_error"] < 0.03 < 0.15 < high["calibration_error"]


def test_reliability_groups_cover_all_rows(forecast):
    curve = reliability(*forecast)
    assert curve["share"].sum() == pytest.approx(1)
    assert (np.diff(curve["predicted"]) >= 0).all()


def test_one_class_has_no_auc_but_a_loss():
    found = score([0, 0, 0], [0.1, 0.2, 0.3])
    assert found["auc"] is None
    assert found["log_loss"] == pytest.approx(-np.log([0.9, 0.8, 0.7]).mean())


def test_certain_and_wrong_is_finite():
    assert 30 < score([1, 0], [0.0, 0.0])["log_loss"] * 2 < 40


@pytest.mark.parametrize(
    ("label", "probability", "message"),
    [
        ([], [], "no rows"),
        ([0, 1], [0.1], "same rows"),
        ([0, 2], [0.1, 0.2], "neither 0 nor 1"),
        ([0, np.nan], [0.1, 0.2], "not known yet"),
        (["yes", "no"], [0.1, 0.2], "must be 0 or 1"),
        ([0, 1], [0.1, np.nan], "none missing"),
        ([0, 1], [0.1, 1.2], "not probabilities"),
        ([0, 1], [-0.1, 0.2], "not probabilities"),
        ([[0, 1]], [[0.1, 0.2]], "one value a row"),
    ],
)
def test_input_that_is_no_forecast_is_named(label, probability, message):
    with pytest.raises(InvalidInputError, match=message):
        score(label, probability)
