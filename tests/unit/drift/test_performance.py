"""Performance without labels: against NannyML and the truth, honest intervals, and what is said when it cannot be."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    log_loss,
    precision_score,
    recall_score,
    roc_auc_score,
)
from support import cbpe

from airflow_mlops.drift.performance import (
    METRICS,
    CalibratedEstimate,
    Calibration,
    PerformanceEstimate,
    expected_metrics,
)
from airflow_mlops.exceptions import DataError, InvalidInputError

NANNYML = json.loads(cbpe.RECORDED.read_text())["estimates"]
NAMES = {"auc": "roc_auc", "accuracy": "accuracy", "precision": "precision", "recall": "recall"}


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def draw(rng, rows, *, mean=-1.0, sd=1.2, bias=0.0, slope=1.0):
    """Scores and labels; ``bias`` and ``slope`` are what the model does to the true logit."""
    logit = rng.normal(mean, sd, rows)
    label = (rng.uniform(size=rows) < 1 / (1 + np.exp(-logit))).astype(float)
    return 1 / (1 + np.exp(-(bias + slope * logit))), label


def values(metrics):
    return {name: value for name, (value, _) in metrics.items()}


@pytest.mark.parametrize("name", list(cbpe.DATA))
def test_estimates_agree_with_nannyml(name):
    """The same calibration, fitted on the same reference: all metrics, six windows, recorded from NannyML 0.13.1."""
    (scores, labels, _), *windows = cbpe.draw(name)
    estimator = CalibratedEstimate.fit(scores, labels, threshold=cbpe.DATA[name][-1], method="isotonic")
    for number, (window, _, _) in enumerate(windows):
        found = estimator.estimate(window).metrics
        for ours, theirs in NAMES.items():
            assert found[ours].value == pytest.approx(NANNYML[name][theirs][number], abs=0.003), (ours, number)


def test_estimates_by_default_are_nearer_the_truth_than_nannymls():
    """The truth is the expectation under the probabilities that the labels were drawn from."""
    ours, theirs, apart = [], [], []
    for name in cbpe.DATA:
        (scores, labels, _), *windows = cbpe.draw(name)
        estimator = CalibratedEstimate.fit(scores, labels)
        for (window, _, probability), recorded in zip(windows, NANNYML[name]["roc_auc"], strict=True):
            truth = expected_metrics(probability, window, 0.5)["auc"][0]
            estimate = estimator.estimate(window).metrics["auc"].value
            ours.append(abs(estimate - truth))
            theirs.append(abs(recorded - truth))
            apart.append(abs(estimate - recorded))
    assert np.mean(ours) < np.mean(theirs) and np.median(apart) < 0.005 and max(apart) < 0.015


def test_the_metrics_of_labels_are_those_of_scikit_learn(rng):
    scores, labels = draw(rng, 3_000, slope=1.5)
    scores = np.round(scores, 2)
    found = expected_metrics(labels, scores, 0.3)
    called = scores >= 0.3
    expected = {
        "auc": roc_auc_score(labels, scores),
        "log_loss": log_loss(labels, np.clip(scores, 1e-6, 1 - 1e-6)),
        "brier": brier_score_loss(labels, scores),
        "accuracy": accuracy_score(labels, called),
        "precision": precision_score(labels, called),
        "recall": recall_score(labels, called),
    }
    assert values(found) == pytest.approx(expected, rel=1e-9)
    assert {variance for _, variance in found.values()} == {0.0}


def test_expectation_and_variance_are_those_of_drawn_labels(rng):
    """Ratios are ratios of expectations, so they may be off by a little that vanishes with the rows."""
    scores, _ = draw(rng, 400)
    scores = np.round(scores, 2)
    p = np.clip(scores**1.3 + 0.05, 0, 1)
    drawn = [values(expected_metrics((rng.uniform(size=400) < p).astype(float), scores, 0.4)) for _ in range(2_000)]
    for name, (value, variance) in expected_metrics(p, scores, 0.4).items():
        truth = np.array([one[name] for one in drawn])
        assert value == pytest.approx(truth.mean(), abs=4 * truth.std() / np.sqrt(2_000) + 2e-4), name
        assert np.sqrt(variance) == pytest.approx(truth.std(), rel=0.08), name


def test_the_expected_auc_is_that_of_all_pairs_of_rows(rng):
    p, scores = rng.uniform(size=12), np.round(rng.uniform(size=12), 1)
    right = pairs = 0.0
    for i in range(12):
        for j in set(range(12)) - {i}:
            pairs += p[i] * (1 - p[j])
            right += p[i] * (1 - p[j]) * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
    assert expected_metrics(p, scores, 0.5)["auc"][0] == pytest.approx(right / pairs, rel=1e-12)


@pytest.mark.parametrize(("bias", "slope", "drift"), [(0.0, 1.0, 0.0), (0.6, 1.7, 0.0), (0.0, 1.0, 0.35)])
def test_intervals_cover_what_the_labels_show(rng, bias, slope, drift):
    """Calibrated, overconfident, and calibrated only on average over chunks that are each off by their own bias."""
    hits = {name: [] for name in METRICS}
    for _ in range(50):
        chunks = [draw(rng, 400, bias=bias + drift * rng.normal(), slope=slope) for _ in range(10)]
        estimator = CalibratedEstimate.fit(*(np.concatenate(part) for part in zip(*chunks)))
        window, labels = draw(rng, 800, mean=-0.7, bias=bias + drift * rng.normal() / np.sqrt(2), slope=slope)
        truth = values(expected_metrics(labels, window, 0.5))
        for name, metric in estimator.estimate(window).metrics.items():
            hits[name].append(metric.low <= truth[name] <= metric.high)
    for name, hit in hits.items():
        assert np.mean(hit) >= 0.85, name
    assert np.mean(list(hits.values())) >= 0.93


def test_intervals_narrow_with_rows_and_widen_with_confidence(rng):
    estimator = CalibratedEstimate.fit(*draw(rng, 20_000))

    def width(rows, **more):
        metric = estimator.estimate(draw(rng, rows)[0], **more).metrics["auc"]
        return metric.high - metric.low

    assert width(1_000) > 1.5 * width(20_000) and width(5_000, confidence=0.99) > 1.2 * width(5_000)


def test_what_differs_from_chunk_to_chunk_stays_in_windows_larger_than_a_chunk_and_grows_in_smaller_ones(rng):
    chunks = [draw(rng, 2_000, bias=0.3 * rng.normal()) for _ in range(10)]
    estimator = CalibratedEstimate.fit(*(np.concatenate(part) for part in zip(*chunks)))
    window = draw(rng, 2_000)[0]

    def beyond_sampling(scores):
        metric = estimator.estimate(scores, min_rows=1).metrics["log_loss"]
        width = (metric.high - metric.low) / 2 / stats.t.isf(0.025, 9)
        return width**2 - expected_metrics(estimator.calibration(scores), scores, 0.5)["log_loss"][1]

    spread = estimator.spread["log_loss"] ** 2
    assert spread > 1e-4
    assert beyond_sampling(window) == pytest.approx(spread) == beyond_sampling(np.tile(window, 5))
    assert beyond_sampling(window[:500]) == pytest.approx(4 * spread)


def test_the_spread_between_chunks_leaves_out_what_sampling_explains(rng):
    shares = []
    for _ in range(10):
        scores, labels = draw(rng, 5_000)
        spread = CalibratedEstimate.fit(scores, labels, method="none").spread["brier"]
        shares.append(spread**2 / (expected_metrics(scores, scores, 0.5)["brier"][1] * 10))
    assert np.mean(shares) < 0.5


def test_a_falling_auc_is_seen_without_labels(rng):
    estimator = CalibratedEstimate.fit(*draw(rng, 20_000, slope=1.6))
    window, labels = draw(rng, 8_000, mean=0.0, sd=0.5, slope=1.6)
    metric = estimator.estimate(window).metrics["auc"]
    assert metric.high < metric.reference - 0.05
    assert metric.value == pytest.approx(roc_auc_score(labels, window), abs=0.02)


def test_concept_drift_is_not_seen_as_the_docstring_says(rng):
    estimator = CalibratedEstimate.fit(*draw(rng, 20_000))
    window, labels = draw(rng, 8_000)
    assert abs(roc_auc_score(1 - labels, window) - estimator.estimate(window).metrics["auc"].value) > 0.3


@pytest.mark.parametrize(
    ("bias", "slope", "power", "method"), [(0, 1, 1, "none"), (0.5, 1.8, 1, "platt"), (0, 1, 4, "isotonic")]
)
def test_the_simplest_calibration_that_serves_is_chosen(rng, bias, slope, power, method):
    scores, labels = draw(rng, 60_000, bias=bias, slope=slope, sd=2.0)
    # A power of the score bends its logit, which only a free shape mends.
    scores = np.where(scores > 0.3, scores, scores**power)
    estimator = CalibratedEstimate.fit(scores, labels)
    assert estimator.calibration.method == method
    assert (estimator.warnings == ()) == (method == "none")


def test_calibrations_agree_with_scikit_learn(rng):
    scores, labels = draw(rng, 40_000, bias=0.4, slope=1.6)
    grid = np.linspace(0.05, 0.95, 50)
    free = IsotonicRegression(out_of_bounds="clip").fit(scores, labels).predict(grid)
    assert np.abs(Calibration.fit("isotonic", scores, labels)(grid) - free).max() < 0.05
    assert np.abs(Calibration.fit("isotonic", scores, labels)(grid) - free).mean() < 0.01
    coarse = Calibration.fit("isotonic", np.round(scores, 1), labels)
    means = pd.Series(labels).groupby(np.round(scores, 1)).mean()
    assert coarse.scores == pytest.approx(means.index.to_numpy())
    assert coarse.probabilities == pytest.approx(np.maximum.accumulate(means.to_numpy()), abs=0.02)
    logit = np.log(scores / (1 - scores))
    line = LogisticRegression(C=np.inf, tol=1e-10).fit(logit[:, None], labels)
    fitted = Calibration.fit("platt", scores, labels).coefficients
    assert fitted == pytest.approx((line.intercept_[0], line.coef_[0, 0]), abs=1e-3)


def test_scores_that_are_not_calibrated_are_warned_of(rng):
    scores, labels = draw(rng, 10_000, slope=2.0)
    mended = CalibratedEstimate.fit(scores, labels)
    assert "the scores are not calibrated: off by 0.1" in mended.warnings[0] and len(mended.warnings) == 1
    assert "platt calibrated" in mended.estimate(scores).reasons[0]
    raw = CalibratedEstimate.fit(scores, labels, method="none")
    assert "taken as they are" in raw.warnings[0] and "does not hold over time" in raw.warnings[1]
    assert CalibratedEstimate.fit(*draw(rng, 10_000)).warnings == ()


def test_a_calibration_that_moves_with_time_is_warned_of(rng):
    chunks = [draw(rng, 2_000, bias=0.8 * (-1) ** number) for number in range(10)]
    estimator = CalibratedEstimate.fit(*(np.concatenate(part) for part in zip(*chunks)))
    assert any("does not hold over time" in text for text in estimator.warnings)


def test_doubts_about_a_window_are_said(rng):
    estimator = CalibratedEstimate.fit(*draw(rng, 5_000, sd=0.3))
    window = np.concatenate([draw(rng, 990, sd=0.3)[0], np.full(40, 0.99), np.full(10, np.nan)])
    found = estimator.estimate(window)
    assert found.verdict == "estimated" and found.rows == 1_030
    assert "10 of 1040 rows have no score" in found.reasons[0] and "lie outside the reference's" in found.reasons[1]


def test_without_enough_data_there_is_no_estimate(rng):
    estimator = CalibratedEstimate.fit(*draw(rng, 5_000))
    for window, reason in (
        ([], "0 rows with a score"),
        (draw(rng, 499)[0], "499 rows with a score, at least 500 needed"),
        (np.full(2_000, np.nan), "2000 of 2000 rows have no score"),
        (np.where(np.arange(2_000) % 10 == 0, np.nan, 0.3), "200 of 2000 rows have no score, 95% need one"),
    ):
        found = estimator.estimate(window)
        assert found.verdict == "not_enough_data" and found.metrics == {}
        assert any(reason in text for text in found.reasons)
    assert estimator.estimate([], min_rows=0).verdict == "not_enough_data"


def test_metrics_that_are_not_defined_are_none(rng):
    scores, labels = draw(rng, 5_000, mean=-2.0, sd=0.3)
    estimator = CalibratedEstimate.fit(scores, labels, threshold=0.99)
    found = estimator.estimate(scores)
    assert found.metrics["precision"].value is None and found.metrics["precision"].reference is None
    assert found.metrics["recall"].value == 0.0
    json.dumps(found.to_json(), allow_nan=False)


def test_rows_without_a_label_are_left_out_and_nullable_types_understood(rng):
    scores, labels = draw(rng, 6_000)
    labels[::3] = np.nan
    known = ~np.isnan(labels)
    estimator = CalibratedEstimate.fit(pd.Series(scores, dtype="Float64"), pd.Series(labels).astype("Int8"))
    assert estimator == CalibratedEstimate.fit(scores[known], labels[known]) and estimator.rows == 4_000


@pytest.mark.parametrize("method", ["none", "platt", "isotonic"])
def test_everything_survives_json(rng, method):
    scores, labels = draw(rng, 30_000, slope=1.4)
    estimator = CalibratedEstimate.fit(scores, labels, method=method)
    text = json.dumps(estimator.to_json(), allow_nan=False)
    assert len(text) < 12_000
    again = CalibratedEstimate.from_json(json.loads(text))
    assert again == estimator and again.estimate(scores) == estimator.estimate(scores)
    found = estimator.estimate(scores)
    assert PerformanceEstimate.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_damaged_json_is_refused(rng):
    value = json.loads(json.dumps(CalibratedEstimate.fit(*draw(rng, 5_000), method="isotonic").to_json()))
    with pytest.raises(InvalidInputError, match="version 2"):
        CalibratedEstimate.from_json({**value, "performance_version": 2})
    for wrong in ([], {}):
        with pytest.raises(InvalidInputError, match="no estimator of performance"):
            CalibratedEstimate.from_json(wrong)
    calibration = value["calibration"]
    for change in (
        {"threshold": 2},
        {"threshold": float("nan")},
        {"rows": 1.5},
        {"chunks": 1},
        {"spread": {"auc": -1}},
        {"reference": None},
        {"calibration": {**calibration, "method": "oracle"}},
        {"calibration": {**calibration, "method": "platt"}},
        {"calibration": {**calibration, "scores": calibration["scores"][::-1]}},
        {"calibration": {**calibration, "probabilities": calibration["probabilities"][::-1]}},
        {"calibration": {**calibration, "probabilities": calibration["probabilities"][1:]}},
        {"calibration": {**calibration, "scores": [], "probabilities": []}},
        {"calibration": {"method": "platt", "coefficients": [0, float("inf")], "scores": [], "probabilities": []}},
        {"calibration": {"method": "isotonic", "coefficients": [], "scores": [0.1], "probabilities": [1.5]}},
    ):
        with pytest.raises(InvalidInputError, match="damaged"):
            CalibratedEstimate.from_json({**value, **change})
    assert CalibratedEstimate.from_json(value).to_json() == value


def test_wrong_input_is_an_error(rng):
    scores, labels = draw(rng, 1_000)
    for wrong, message in (
        ((scores[:-1], labels), "999 and 1000 rows"),
        ((scores * 2, labels), "probabilities must lie in"),
        ((scores, labels * 2), "labels must be 0 or 1"),
        ((np.where(scores < 0.2, np.nan, scores), labels), "labelled rows have no score"),
        ((scores[:400], labels[:400]), "400 labelled rows, 10 chunks need at least 500"),
        ((scores, np.where(np.arange(1_000) < 100, 0, labels)), "chunk 1 of 10 of the reference has 0 of 100 labels 1"),
    ):
        with pytest.raises(DataError, match=message):
            CalibratedEstimate.fit(*wrong)
    for parameters, message in (
        ({"method": "magic"}, "method is 'magic'"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"n_chunks": 2}, "n_chunks is 2"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            CalibratedEstimate.fit(scores, labels, **parameters)
    with pytest.raises(InvalidInputError, match="confidence is 1"):
        CalibratedEstimate.fit(scores, labels).estimate(scores, confidence=1.0)
    with pytest.raises(DataError, match="probabilities must lie in"):
        CalibratedEstimate.fit(scores, labels).estimate(scores + 1)
