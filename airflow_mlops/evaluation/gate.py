"""The gate: policy and paired evidence in, verdict out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from airflow_mlops.evaluation.metrics import Floats, check_label, check_probability, score
from airflow_mlops.evaluation.paired import Gain, auc_gain, auc_gain_bootstrap, cluster_codes, holm, loss_gain
from airflow_mlops.evaluation.policy import GatePolicy
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
    policy: GatePolicy | None = None,
    latency: Mapping[str, Any] | None = None,
    unlabelled: int = 0,
    seed: int = 0,
) -> GateVerdict:
    """Judge the challenger by ``policy``.

    :param label: shape (n,), 0 or 1
    :param champion: shape (n,), its probabilities for the same rows; None when there is no champion, then only
        floors, ceilings, calibration and latency count
    :param challenger: shape (n,), its probabilities
    :param clusters: shape (n,), what makes rows dependent, such as the day; None when rows are independent
    :param slices: for each name the value of each row, shape (n,); a missing value counts as one
    :param policy: the rule; None for the defaults of :class:`GatePolicy`
    :param latency: ``p95_ms`` and more, as of :func:`airflow_mlops.evaluation.latency.measure`
    :param unlabelled: further rows of the same window whose label is not known yet
    :param seed: of the bootstrap
    :return: the verdict; too few rows or clusters, or one class only, is a verdict that did not pass
    :raises InvalidInputError: different lengths, missing or impossible values, a policy that makes no rule
    """
    policy = (policy or GatePolicy()).validate()
    y = check_label(label)
    new = check_probability(challenger, len(y), "challenger")
    old = None if champion is None else check_probability(champion, len(y), "champion")
    for name, values in {"clusters": clusters, **(slices or {})}.items():
        if values is not None and len(np.asarray(values)) != len(y):
            raise InvalidInputError(f"{name} has {len(np.asarray(values))} values for {len(y)} rows")
    codes, count = cluster_codes(clusters, len(y))

    checks = _enough(policy, y, count, unlabelled)
    computable = all(check.passed for check in checks)
    metrics: dict[str, Any] = {
        "challenger": score(y, new) if len(y) else None,
        "champion": score(y, old) if old is not None and len(y) else None,
    }
    checks += _limits(policy, metrics["challenger"], latency)
    differences: list[Gain] = []
    tested: list[dict[str, Any]] = []
    decided = "there is no champion yet: the floors hold"
    if old is not None and computable:
        differences = _differences(policy, y, old, new, None if clusters is None else codes, count, seed)
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
        policy=policy.to_json(),
    )


def _enough(policy: GatePolicy, y: npt.NDArray[np.int8], clusters: int, unlabelled: int) -> list[Check]:
    positive = int(y.sum())
    share = len(y) / max(len(y) + unlabelled, 1)  # 0 of 0 rows do not hold
    return [
        Check("labelled", share >= policy.min_labelled, f"{share:.1%}", f"at least {policy.min_labelled:.0%}"),
        Check("rows", len(y) >= policy.min_rows, str(len(y)), f"at least {policy.min_rows}"),
        Check("clusters", clusters >= policy.min_clusters, str(clusters), f"at least {policy.min_clusters}"),
        Check("classes", 0 < positive < len(y), f"{positive} of {len(y)} rows positive", "both classes"),
    ]


def _limits(policy: GatePolicy, metrics: Mapping[str, Any] | None, latency: Mapping[str, Any] | None) -> list[Check]:
    """Absolute limits on the challenger; a number that is not there does not hold."""
    found = metrics or {}
    checks = [_limit(name, found.get(name), limit, at_least=True) for name, limit in policy.floors.items()]
    checks += [_limit(name, found.get(name), limit, at_least=False) for name, limit in policy.ceilings.items()]
    if policy.max_calibration_error is not None:
        bias = found.get("calibration")
        distance = None if bias is None else abs(bias)
        checks.append(_limit("calibration", distance, policy.max_calibration_error, at_least=False))
    if policy.max_latency_ms is not None:
        p95 = (latency or {}).get("p95_ms")
        checks.append(_limit("latency p95 [ms]", p95, policy.max_latency_ms, at_least=False))
    return checks


def _limit(name: str, value: float | None, limit: float, *, at_least: bool) -> Check:
    # A NaN compares false with everything, which is what is wanted.
    passed = value is not None and (value >= limit if at_least else value <= limit)
    shown = "not known" if value is None else f"{value:.4g}"
    return Check(name, passed, shown, f"{'at least' if at_least else 'at most'} {limit:.4g}")


def _differences(policy: GatePolicy, y: Any, old: Floats, new: Floats, codes: Any, count: int, seed: int) -> list[Gain]:
    """The gain in the policy's metric first, the others after it."""
    gains = [loss_gain(metric, y, old, new, codes, policy.alpha) for metric in ("log_loss", "brier")]
    gains.append(auc_gain(y, old, new, codes, policy.alpha))
    gains.sort(key=lambda gain: gain.metric != policy.metric)
    if codes is not None and count <= MAX_BOOTSTRAP_CLUSTERS:
        rng = np.random.default_rng(seed)
        gains.append(auc_gain_bootstrap(y, old, new, codes, alpha=policy.alpha, rng=rng))
    return gains


def _comparison(policy: GatePolicy, gain: Gain) -> Check:
    bound = policy.margin if policy.rule == "improvement" else -policy.margin
    sure = f"at least {gain.interval[0]:+.5f} with {1 - policy.alpha:.0%} confidence"
    p = gain.p_value(bound)
    return Check(
        f"{policy.rule.replace('_', '-')} in {policy.metric}",
        p < policy.alpha,
        f"gain {gain.estimate:+.5f}, {sure}, p={p:.3g}",
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
