from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm

from airflow_mlops.evaluation import GatePolicy, evaluate
from airflow_mlops.evaluation.calibration import recalibration


def world(overconfidence=1.0, shift=0.0, rows=6000, seed=0):
    rng = np.random.default_rng(seed)
    logit = rng.normal(size=rows) - 0.5
    label = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int)
    return label, 1 / (1 + np.exp(-(overconfidence * logit + shift))), rng.integers(0, 20, rows)


def test_the_regression_is_statsmodels_with_clusters():
    label, probability, _ = world(1.5, 0.3)
    # Days on which all the errors go one way: as independent rows they would say far too much.
    day = np.argsort(np.argsort(label - probability)) // 300
    found = recalibration(label, probability, day)
    design = sm.add_constant(np.log(probability / (1 - probability)))
    fit = sm.Logit(label, design).fit(disp=0, cov_type="cluster", cov_kwds={"groups": day}, use_t=True)
    assert (found["intercept"], found["slope"]) == pytest.approx(tuple(fit.params), abs=1e-6)
    low, high = fit.conf_int(alpha=0.1)[1]
    # statsmodels' correction for few clusters has (n - 1) / (n - k) besides.
    assert found["slope_interval"] == pytest.approx([low, high], abs=1e-3)
    independent = recalibration(label, probability)["slope_interval"]
    assert abs(np.diff(independent)[0] / (high - low) - 1) > 0.2


def test_calibrated_overconfident_and_shifted_are_told_apart():
    good, over, high = (recalibration(*world(*given)) for given in ((), (2.0,), (1.0, 0.5)))
    assert good["slope_interval"][0] < 1 < good["slope_interval"][1]
    assert good["intercept_interval"][0] < 0 < good["intercept_interval"][1]
    assert over["slope"] == pytest.approx(0.5, abs=0.06)
    assert high["intercept_interval"][1] < -0.3
    assert good["spiegelhalter_p"] > 0.01 > over["spiegelhalter_p"]


def test_the_intervals_cover_as_often_as_they_say():
    missed = 0
    for seed in range(400):
        low, high = recalibration(*world(rows=600, seed=seed), alpha=0.05)["slope_interval"]
        missed += not low <= 1 <= high
    assert 0.05 < missed / 400 < 0.10 + 3 * np.sqrt(0.1 * 0.9 / 400)


def test_spiegelhalters_z_is_standard_normal_when_calibrated():
    z = [recalibration(*world(rows=300, seed=seed)[:2])["spiegelhalter_z"] for seed in range(400)]
    assert np.mean(z) == pytest.approx(0, abs=0.2)
    assert np.std(z) == pytest.approx(1, abs=0.15)


def test_where_the_regression_has_no_end_nothing_is_known():
    label = np.repeat([0, 1], 300)
    separated = np.where(label == 1, 0.9, 0.1)
    assert recalibration(label, separated)["slope"] is None
    assert recalibration(label, np.full(600, 0.5))["slope"] is None
    for probability in (separated, np.full(600, 0.5)):
        verdict = evaluate(label, None, probability, policy=GatePolicy(calibration_slope=(0.5, 2)))
        assert "calibration slope: not known; required: 0.5 to 2" in verdict.reasons


def test_the_policy_limits_slope_and_error():
    def failed(*given, **policy):
        label, probability, day = world(*given)
        verdict = evaluate(label, None, probability, clusters=day, policy=GatePolicy(**policy))
        return {check.name for check in verdict.checks if not check.passed}

    assert failed(calibration_slope=(0.8, 1.25), max_expected_calibration_error=0.03) == set()
    assert failed(2.0, calibration_slope=(0.8, 1.25)) == {"calibration slope"}
    assert failed(2.0, max_expected_calibration_error=0.03) == {"expected calibration error"}
    assert GatePolicy.from_json({"calibration_slope": ["0.8", "1.25"]}).calibration_slope == (0.8, 1.25)
