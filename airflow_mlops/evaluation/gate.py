"""The gate: policy and paired evidence in, verdict out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from airflow_mlops.evaluation import cases as behaviour
from airflow_mlops.evaluation import fairness, resample, robustness
from airflow_mlops.evaluation.calibration import recalibration
from airflow_mlops.evaluation.mcnemar import accuracy_gain
from airflow_mlops.evaluation.metrics import Floats, check_label, check_probability, score
from airflow_mlops.evaluation.objective import further_metrics, objective
from airflow_mlops.evaluation.paired import Gain, auc_gain, auc_gain_bootstrap, cluster_codes, holm, loss_gain
from airflow_mlops.evaluation.policy import LOSSES, GatePolicy
from airflow_mlops.evaluation.rules import fairness_rules
from airflow_mlops.evaluation.verdict import Check, GateVerdict
from airflow_mlops.exceptions import InvalidInputError

# Beyond this many clusters DeLong's error is as good as the bootstrap's, and the table of pairs grows large.
MAX_BOOTSTRAP_CLUSTERS = 400
MAX_SLICE_VALUES = 100
SLICE_MIN_CLUSTERS = 4


def evaluate(
    label: npt.ArrayLike,
    champion: npt.ArrayLike | None,
    challenger: npt.ArrayLike,
    *,
    clusters: npt.ArrayLike | None = None,
    slices: Mapping[str, npt.ArrayLike] | None = None,
    groups: Mapping[str, npt.ArrayLike] | None = None,
    policy: GatePolicy | None = None,
    latency: Mapping[str, Any] | None = None,
    champion_latency: Mapping[str, Any] | None = None,
    missing: Sequence[Mapping[str, Any]] = (),
    cases: Sequence[Mapping[str, Any]] = (),
    unlabelled: int = 0,
    seed: int = 0,
) -> GateVerdict:
    """Judge the challenger by ``policy``.

    :param label: shape (n,), 0 or 1
    :param champion: shape (n,), its probabilities for the same rows; None when there is no champion, then nothing is
        compared and every other limit counts
    :param challenger: shape (n,), its probabilities
    :param clusters: shape (n,), what makes rows dependent, such as the day; None when rows are independent
    :param slices: for each name the value of each row, shape (n,); a missing value counts as one
    :param groups: the same for the columns of the policy's fairness
    :param policy: the rule; None for the defaults of :class:`GatePolicy`
    :param latency: ``p95_ms`` and more, as of :func:`airflow_mlops.evaluation.latency.measure`
    :param champion_latency: the champion's, where the policy compares them
    :param missing: of :func:`airflow_mlops.evaluation.robustness.missing_losses`, where the policy limits it
    :param cases: of :func:`airflow_mlops.evaluation.cases.run`
    :param unlabelled: further rows of the same window whose label is not known yet
    :param seed: of resamples and permutations
    :return: the verdict; too few rows or clusters, or one class only, is a verdict that did not pass
    :raises InvalidInputError: different rows, missing or impossible values, a metric that one arm does not have, a
        policy that makes no rule
    """
    policy = (policy or GatePolicy()).validate()
    _same_rows(label, {"champion": champion, "challenger": challenger})
    y = check_label(label)
    new = check_probability(challenger, len(y), "challenger")
    old = None if champion is None else check_probability(champion, len(y), "champion")
    for name, values in {"clusters": clusters, **(slices or {}), **(groups or {})}.items():
        if values is not None and len(np.asarray(values)) != len(y):
            raise InvalidInputError(f"{name} has {len(np.asarray(values))} values for {len(y)} rows")
    codes, count = cluster_codes(clusters, len(y))
    given = None if clusters is None else codes

    checks = _enough(policy, y, given, count, unlabelled, compared=old is not None)
    computable = all(check.passed for check in checks)
    metrics = _metrics(policy, y, old, new, computable)
    checks += _limits(policy, metrics["challenger"])
    judged = recalibration(y, new, given, policy.alpha) if computable else None
    checks += [*_calibration(policy, judged), *_serving(policy, latency, champion_latency, old is not None)]
    treated: list[dict[str, Any]] = []
    if rules := fairness_rules(policy.fairness):
        if computable:
            settings: dict[str, Any] = {"threshold": policy.threshold, "alpha": policy.alpha, "seed": seed}
            treated = fairness.assess(rules, y, new, groups or {}, given, **settings)
            checks += fairness.checks(treated)
        else:
            checks.append(Check("fairness", False, "not possible on these rows", "enough data"))
    checks += [*robustness.check(missing, policy), *behaviour.checks(cases)]
    differences: list[Gain] = []
    tested: list[dict[str, Any]] = []
    decided = "there is no champion yet: the floors hold"
    if old is not None and computable:
        differences = compare(policy, y, old, new, given, seed)
        comparison = _comparison(policy, differences[0])
        decided = str(comparison)
        tested = _slices(policy, y, old, new, codes, slices or {})
        checks += [comparison, *_slice_checks(policy, tested)]
    elif old is not None:
        checks.append(Check("comparison with the champion", False, "not possible on these rows", "enough data"))
    failed = tuple(str(check) for check in checks if not check.passed)
    return GateVerdict(
        passed=not failed,
        first_model=old is None,
        reasons=failed or (decided,),
        checks=tuple(checks),
        rows=len(y),
        clusters=count,
        unlabelled=unlabelled,
        metrics=metrics,
        differences=tuple(gain.to_json() for gain in differences),
        slices=tuple(tested),
        latency=latency,
        champion_latency=champion_latency,
        calibration=judged,
        fairness=tuple(treated),
        missing=tuple(missing),
        cases=tuple(cases),
        policy=policy.to_json(),
    )


def compare(
    policy: GatePolicy, label: Any, champion: Floats, challenger: Floats, clusters: Any = None, seed: int = 0
) -> list[Gain]:
    """The challenger's gains: first the one that the policy decides by, then those in the other metrics.

    :param label: shape (n,), 0 and 1, both present
    :param champion: shape (n,), probabilities
    :param challenger: shape (n,)
    :param clusters: shape (n,), or None for independent rows
    """
    arms = (label, champion, challenger, clusters, policy.alpha)
    gains = [decisive(policy, *arms[:4], seed)]
    gains += [loss_gain(metric, *arms) for metric in LOSSES if (policy.metric, policy.test) != (metric, "t")]
    if (policy.metric, policy.test) != ("auc", "delong"):
        gains.append(auc_gain(*arms))
    resampled = (policy.metric, policy.test) == ("auc", "bootstrap")
    if clusters is not None and not resampled and len(np.unique(clusters)) <= MAX_BOOTSTRAP_CLUSTERS:
        rng = np.random.default_rng(seed)
        gains.append(auc_gain_bootstrap(*arms[:4], alpha=policy.alpha, rng=rng))
    return gains


def decisive(
    policy: GatePolicy, label: Any, champion: Floats, challenger: Floats, clusters: Any = None, seed: int = 0
) -> Gain:
    """The gain in the policy's metric with the policy's test; arguments as of :func:`compare`."""
    metric, test = policy.metric, policy.test
    arms = (label, champion, challenger, clusters, policy.alpha)
    drawn: dict[str, Any] = {"replicates": policy.replicates, "rng": np.random.default_rng(seed)}
    if test == "delong":
        return auc_gain(*arms)
    if test == "t":
        return loss_gain(metric, *arms)
    if test == "mcnemar":
        return accuracy_gain(*arms, policy.threshold)
    if metric in LOSSES or metric == "accuracy":
        mean = resample.mean_bootstrap if test == "bootstrap" else resample.mean_permutation
        return mean(metric, *arms, policy.threshold, **drawn)
    if (metric, test) == ("auc", "bootstrap"):
        return resample.auc_bootstrap(*arms, **drawn)
    generic = resample.bootstrap if test == "bootstrap" else resample.permutation
    return generic(objective(metric, policy), *arms, **drawn)


def _same_rows(label: Any, arms: Mapping[str, Any]) -> None:
    for whose, values in arms.items():
        if isinstance(label, pd.Series) and isinstance(values, pd.Series) and not label.index.equals(values.index):
            raise InvalidInputError(
                f"the {whose} has predictions for different rows than there are labels for (their indexes differ); "
                "both arms must be scored on the same rows, in the same order"
            )


def _metrics(policy: GatePolicy, y: Any, old: Floats | None, new: Floats, computable: bool) -> dict[str, Any]:
    arms = {"challenger": new, "champion": old}
    found = {arm: None if p is None or not len(y) else score(y, p) for arm, p in arms.items()}
    further = further_metrics(policy, y, arms) if computable else {}
    return {arm: None if known is None else {**known, **further.get(arm, {})} for arm, known in found.items()}


def _enough(
    policy: GatePolicy, y: npt.NDArray[np.int8], codes: Any, clusters: int, unlabelled: int, *, compared: bool
) -> list[Check]:
    positive = int(y.sum())
    least, why = policy.min_clusters, ""
    if compared and policy.metric == "auc" and codes is not None:
        # A pair needs one row of each class: what the test has of the rarer is what counts.
        clusters = min(len(np.unique(codes[y == label])) for label in (0, 1))
        why = " with rows of each class"
    if compared and policy.test == "permutation" and 2.0**-least >= policy.alpha:
        # The arms of n clusters can be exchanged in 2^n ways, so no p-value is below 2^-n.
        least = math.floor(-math.log2(policy.alpha)) + 1
        why += f" for a permutation test at {policy.alpha:g}"
    share = len(y) / max(len(y) + unlabelled, 1)  # 0 of 0 rows do not hold
    return [
        Check("labelled", share >= policy.min_labelled, f"{share:.1%}", f"at least {policy.min_labelled:.0%}"),
        Check("rows", len(y) >= policy.min_rows, str(len(y)), f"at least {policy.min_rows}"),
        Check("clusters", clusters >= least, str(clusters), f"at least {least}{why}"),
        Check("classes", 0 < positive < len(y), f"{positive} of {len(y)} rows positive", "both classes"),
    ]


def _limits(policy: GatePolicy, metrics: Mapping[str, Any] | None) -> list[Check]:
    """Absolute limits on the challenger's metrics; a number that is not there does not hold."""
    found = metrics or {}
    checks = [_limit(name, found.get(name), limit, at_least=True) for name, limit in policy.floors.items()]
    checks += [_limit(name, found.get(name), limit, at_least=False) for name, limit in policy.ceilings.items()]
    if policy.max_calibration_error is not None:
        bias = found.get("calibration")
        distance = None if bias is None else abs(bias)
        checks.append(_limit("calibration", distance, policy.max_calibration_error, at_least=False))
    if policy.max_expected_calibration_error is not None:
        error, limit = found.get("calibration_error"), policy.max_expected_calibration_error
        checks.append(_limit("expected calibration error", error, limit, at_least=False))
    return checks


def _calibration(policy: GatePolicy, judged: Mapping[str, Any] | None) -> list[Check]:
    if policy.calibration_slope is None:
        return []
    low, high = policy.calibration_slope
    name, limit = "calibration slope", f"{low:g} to {high:g}"
    slope = (judged or {}).get("slope")
    if judged is None or slope is None:
        return [Check(name, False, "not known", limit)]
    interval = " to ".join(f"{bound:.3g}" for bound in judged["slope_interval"])
    return [Check(name, bool(low <= slope <= high), f"{slope:.3g} ({interval})", limit)]


def _serving(
    policy: GatePolicy, latency: Mapping[str, Any] | None, champion: Mapping[str, Any] | None, compared: bool
) -> list[Check]:
    found = latency or {}
    limits = [
        ("latency p95 [ms]", "p95_ms", policy.max_latency_ms),
        ("latency p99 [ms]", "p99_ms", policy.max_p99_ms),
        ("memory [MiB]", "memory_mib", policy.max_memory_mib),
    ]
    checks = [_limit(name, found.get(key), limit, at_least=False) for name, key, limit in limits if limit is not None]
    if policy.max_latency_ratio is not None and compared:
        new, old = found.get("p95_ms"), (champion or {}).get("p95_ms")
        ratio = new / old if new is not None and old else None
        checks.append(_limit("latency p95, times the champion's", ratio, policy.max_latency_ratio, at_least=False))
    return checks


def _limit(name: str, value: float | None, limit: float, *, at_least: bool) -> Check:
    # A NaN compares false with everything, which is what is wanted.
    passed = value is not None and (value >= limit if at_least else value <= limit)
    shown = "not known" if value is None else f"{value:.4g}"
    return Check(name, passed, shown, f"{'at least' if at_least else 'at most'} {limit:.4g}")


def _comparison(policy: GatePolicy, gain: Gain) -> Check:
    bound = policy.margin if policy.rule == "improvement" else -policy.margin
    sure = f"at least {gain.interval[0]:+.5f} with {1 - policy.alpha:.0%} confidence"
    p = gain.p_value(bound)
    return Check(
        f"{policy.rule.replace('_', '-')} in {policy.metric}",
        p < policy.alpha,
        f"gain {gain.estimate:+.5f}, {sure}, p={p:.3g} ({gain.method})",
        f"gain above {bound:+.4g}, p < {policy.alpha:g}",
    )


def _slices(
    policy: GatePolicy, y: Any, old: Floats, new: Floats, codes: Any, slices: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The gain in loss of every slice, worst first; p-values that it is worse than tolerated, adjusted by Holm."""
    metric = "brier" if policy.metric == "brier" else "log_loss"
    rows: list[dict[str, Any]] = []
    for column, given in slices.items():
        members, names = pd.factorize(np.asarray(given), use_na_sentinel=False, sort=False)
        if len(names) > MAX_SLICE_VALUES:
            raise InvalidInputError(
                f"the slice column {column!r} has {len(names)} values; at most {MAX_SLICE_VALUES} can be told apart. "
                "Bin it first."
            )
        for number, name in enumerate(names):
            mask = members == number
            row: dict[str, Any] = {
                "column": column,
                "value": "missing" if pd.isna(name) else str(name),
                "rows": int(mask.sum()),
                "tested": False,
            }
            rows.append(row)
            groups = np.unique(codes[mask])
            if row["rows"] < policy.slice_min_rows or len(groups) < SLICE_MIN_CLUSTERS:
                continue
            gain = loss_gain(metric, y[mask], old[mask], new[mask], codes[mask], policy.alpha)
            harm = gain.p_worse(-policy.slice_tolerance)
            row.update(tested=True, metric=metric, gain=gain.estimate, interval=list(gain.interval), p_value=harm)
    tested = [row for row in rows if row["tested"]]
    for row, adjusted in zip(tested, holm([row["p_value"] for row in tested])):
        row["p_adjusted"] = float(adjusted)
    return sorted(rows, key=lambda row: row.get("gain", np.inf))


def _slice_checks(policy: GatePolicy, slices: list[dict[str, Any]]) -> list[Check]:
    tested = [row for row in slices if row["tested"]]
    if not tested:
        return []
    worst = min(tested, key=lambda row: (row["p_adjusted"], row["gain"]))
    value = f"{worst['column']}={worst['value']} gains {worst['gain']:+.4f} in {worst['metric']}"
    return [
        Check(
            "worst slice",
            worst["p_adjusted"] >= policy.alpha,
            f"{value} on {worst['rows']} rows, adjusted p={worst['p_adjusted']:.3g} ({len(tested)} slices)",
            f"none shown to lose more than {policy.slice_tolerance:g}",
        )
    ]
