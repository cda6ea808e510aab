"""What a model is worth when features do not come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from airflow_mlops.evaluation.metrics import Floats, check_probability
from airflow_mlops.evaluation.objective import objective
from airflow_mlops.evaluation.policy import GatePolicy
from airflow_mlops.evaluation.verdict import Check
from airflow_mlops.exceptions import InvalidInputError

MAX_ROWS = 20_000

Predict = Callable[[pd.DataFrame], Floats]


def missing_losses(
    predict: Predict,
    frame: pd.DataFrame,
    label: Any,
    features: Sequence[str],
    policy: GatePolicy,
    *,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
) -> list[dict[str, Any]]:
    """The loss in the policy's metric when each feature in turn is missing in all rows, and a share of all values is.

    :param predict: a frame to the probability of each row, shape (n,)
    :param frame: (n rows, columns), the held-out rows; beyond ``max_rows`` a sample is used
    :param label: shape (n,), 0 or 1
    :param features: the model's inputs
    :param seed: of the sample and of the values that go missing
    :return: worst first: ``what`` (the feature, or the share), ``loss`` (positive when the model is worse without; None
        when it refuses), ``refused`` (its error, or None)
    :raises InvalidInputError: no features, or one that the frame lacks
    """
    if not len(features):
        raise InvalidInputError("the model has no signature that names features to leave out; give `features`")
    if absent := [name for name in features if name not in frame.columns]:
        raise InvalidInputError(f"the data lacks the features {absent[:5]}; it has {list(frame.columns)[:20]}")
    rng = np.random.default_rng(seed)
    y = np.asarray(label)
    if len(frame) > max_rows:
        rows = np.sort(rng.choice(len(frame), max_rows, replace=False))
        frame, y = frame.iloc[rows], y[rows]
    names = list(features)
    full = frame[names].astype(np.float64)
    metric = objective(policy.metric, policy)
    whole = metric.of(y, _answer(predict, frame, full), "challenger")
    variants: list[tuple[str, pd.DataFrame]] = [(name, full.assign(**{name: np.nan})) for name in names]
    if policy.missing_share:
        gone = rng.random(full.shape) < policy.missing_share
        variants.append((f"{policy.missing_share:.0%} of all values", full.mask(gone)))
    found: list[dict[str, Any]] = []
    for what, part in variants:
        try:
            value = metric.of(y, _answer(predict, frame, part), "challenger")
        except Exception as error:  # whatever the model raises is its way to refuse
            reason = str(error).strip().splitlines() or [type(error).__name__]
            found.append({"what": what, "loss": None, "refused": reason[0][:200]})
        else:
            found.append({"what": what, "loss": metric.sign * (whole - value), "refused": None})
    return sorted(found, key=lambda row: -np.inf if row["loss"] is None else -row["loss"])


def check(found: Sequence[Mapping[str, Any]], policy: GatePolicy) -> list[Check]:
    """One check on the worst of them; none without a limit."""
    if policy.max_missing_loss is None:
        return []
    name, limit = "missing features", f"at most {policy.max_missing_loss:.4g} lost in {policy.metric}"
    if not found:
        return [Check(name, False, "not tried", limit)]
    refused = [row for row in found if row["refused"] is not None]
    if refused:
        what = ", ".join(row["what"] for row in refused[:5])
        return [Check(name, False, f"the model refuses to predict without {what}: {refused[0]['refused']}", limit)]
    worst = found[0]
    passed = worst["loss"] <= policy.max_missing_loss
    return [Check(name, passed, f"{worst['loss']:+.4f} without {worst['what']}, the worst of {len(found)}", limit)]


def _answer(predict: Predict, frame: pd.DataFrame, features: pd.DataFrame) -> Floats:
    given = frame.copy(deep=False)
    given[features.columns.tolist()] = features
    return check_probability(predict(given), len(frame), "model")
