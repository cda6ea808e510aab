from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.evaluation import GatePolicy, evaluate, score
from airflow_mlops.evaluation.robustness import missing_losses
from airflow_mlops.exceptions import DataError, InvalidInputError

FEATURES = ["a", "b"]


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(4000, 2)), columns=FEATURES)
    frame["late"] = (rng.random(4000) < 1 / (1 + np.exp(-2 * frame["a"]))).astype(int)
    frame["day"] = rng.integers(0, 10, 4000)
    return frame


def tolerant(frame):
    return 1 / (1 + np.exp(-(2 * frame["a"].fillna(0.0) + 0 * frame["b"].fillna(0.0)))).to_numpy()


def refusing(frame):
    if frame["b"].isna().any():
        raise ValueError("Input X contains NaN.\nand more")
    return tolerant(frame)


def judge(rows, predict, **policy):
    given = GatePolicy(**policy)
    found = missing_losses(predict, rows, rows["late"], FEATURES, given)
    verdict = evaluate(rows["late"], None, predict(rows), clusters=rows["day"], policy=given, missing=found)
    return found, {check.name: check.value for check in verdict.checks if not check.passed}


def test_a_feature_that_matters_is_missed_and_another_is_not(rows):
    found, failed = judge(rows, tolerant, max_missing_loss=0.05)
    losses = {row["what"]: row["loss"] for row in found}
    whole = score(rows["late"], tolerant(rows))["log_loss"]
    assert losses["a"] == pytest.approx(np.log(2) - whole, abs=1e-6)
    assert losses["b"] == 0
    assert 0 < losses["10% of all values"] < losses["a"]
    assert found[0]["what"] == "a"
    assert "without a" in failed["missing features"]
    assert judge(rows, tolerant, max_missing_loss=0.5)[1] == {}


def test_the_loss_is_in_the_policys_metric(rows):
    found, _ = judge(rows, tolerant, max_missing_loss=0.05, metric="auc", missing_share=0)
    assert {row["what"]: round(row["loss"], 6) for row in found} == {
        "a": round(score(rows["late"], tolerant(rows))["auc"] - 0.5, 6),
        "b": 0,
    }


def test_a_model_that_refuses_missing_values_is_told_so(rows):
    found, failed = judge(rows, refusing, max_missing_loss=1)
    assert {row["what"] for row in found if row["refused"]} == {"b", "10% of all values"}
    assert failed == {
        "missing features": "the model refuses to predict without b, 10% of all values: Input X contains NaN."
    }


def test_a_nan_answer_is_a_refusal(rows):
    _, failed = judge(rows, lambda frame: np.where(frame["a"].isna(), np.nan, 0.5 + 0 * frame["a"]), max_missing_loss=1)
    assert "not probabilities" in failed["missing features"]


def test_what_was_not_tried_does_not_pass(rows):
    policy = GatePolicy(max_missing_loss=1)
    verdict = evaluate(rows["late"], None, tolerant(rows), clusters=rows["day"], policy=policy)
    assert "missing features: not tried" in verdict.reasons[0]


def test_large_data_are_sampled_and_the_same_each_time(rows):
    seen = []

    def predict(frame):
        seen.append(len(frame))
        return tolerant(frame)

    first = missing_losses(predict, rows, rows["late"], FEATURES, GatePolicy(), max_rows=1000)
    assert set(seen) == {1000}
    assert first == missing_losses(predict, rows, rows["late"], FEATURES, GatePolicy(), max_rows=1000)


def test_features_that_are_not_there_are_named(rows):
    with pytest.raises(InvalidInputError, match=r"lacks the features \['c'\]"):
        missing_losses(tolerant, rows, rows["late"], ["a", "c"], GatePolicy())
    with pytest.raises(InvalidInputError, match="give `features`"):
        missing_losses(tolerant, rows, rows["late"], [], GatePolicy())
    assert issubclass(DataError, InvalidInputError)
