"""The year as one plain script: the same steps and libraries as the Dag, without Airflow.

``python -m airflow_mlops.examples.flights.experiment`` prints, for each month, what a model frozen in March, one
retrained each month on all past data and one retrained on the last three months would have scored.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xgboost
from sklearn.metrics import log_loss, roc_auc_score

from airflow_mlops import storage
from airflow_mlops.examples.flights import LABEL, features, quality, source, train
from airflow_mlops.examples.flights.months import months_before
from airflow_mlops.exceptions import DataError

STRATEGIES = ("frozen", "all past", "last 3 months")


def prepare(root: str, month: str) -> None:
    """Land, check and build the features of one month."""
    source.land(root, month)
    quality.check(root, month)
    features.build(root, month)


def join(root: str, months: Sequence[str]) -> pd.DataFrame:
    """The labelled rows of ``months`` with every feature as it was known at the prediction time.

    :return: one row per flight: keys, ``event_timestamp``, :func:`features.feature_names` as float64, label
    """
    rows = _read(root, "entities/flights", months)
    rows = rows.sort_values("event_timestamp", kind="stable").reset_index(drop=True)
    views = {**features.DELAY_VIEWS, "weather": ("origin",), "planes": ("tailnum",)}
    for view, keys in views.items():
        known = months_before(months[0], 1, source.FIRST_MONTH) + list(months)
        table = _read(root, f"features/{view}", known).drop(columns="observed_at", errors="ignore")
        rows = pd.merge_asof(
            rows,
            table.sort_values("known_at", kind="stable"),
            left_on="event_timestamp",
            right_on="known_at",
            by=list(keys),
        ).drop(columns="known_at")
    return rows.assign(**features.calendar(rows))


def fit(
    rows: pd.DataFrame, *, rounds: int = train.ROUNDS, nthread: int = 1, params: dict[str, Any] | None = None
) -> xgboost.Booster:
    """The training loop's model, on one worker."""
    names = features.feature_names()
    data = xgboost.QuantileDMatrix(rows[names].astype("float32"), rows[LABEL], nthread=nthread)
    return xgboost.train(train.PARAMS | {"nthread": nthread} | (params or {}), data, num_boost_round=rounds)


def predict(model: xgboost.Booster, rows: pd.DataFrame) -> np.ndarray:
    """The probability of being late, shape ``(rows,)``."""
    return model.predict(xgboost.DMatrix(rows[features.feature_names()].astype("float32"), nthread=1))


def replay(root: str, first: int = 5, last: int = 12, nthread: int = 1) -> pd.DataFrame:
    """Score each strategy on the months ``first`` to ``last`` of 2013 (4 at the earliest).

    :return: one row per month and strategy: ``month, strategy, rows, late_rate, auc, log_loss``
    """
    if not 4 <= first <= last <= 12:
        raise DataError(f"months {first} to {last}; expected 4 <= first <= last <= 12: the first three train the model")
    months = [f"2013-{number:02d}" for number in range(1, last + 1)]
    frames = {}
    for month in months:
        prepare(root, month)
        frames[month] = join(root, [month])
    frozen = fit(pd.concat([frames[month] for month in months[:3]]), nthread=nthread)
    scores = []
    for number in range(first, last + 1):
        month, past = months[number - 1], months[: number - 1]
        models = {
            "frozen": frozen,
            "all past": fit(pd.concat([frames[earlier] for earlier in past]), nthread=nthread),
            "last 3 months": fit(pd.concat([frames[earlier] for earlier in past[-3:]]), nthread=nthread),
        }
        label = frames[month][LABEL]
        for strategy in STRATEGIES:
            probability = predict(models[strategy], frames[month])
            scores.append(
                {
                    "month": month,
                    "strategy": strategy,
                    "rows": len(label),
                    "late_rate": float(label.mean()),
                    "auc": float(roc_auc_score(label, probability)),
                    "log_loss": float(log_loss(label, probability)),
                }
            )
    return pd.DataFrame(scores)


def _read(root: str, folder: str, months: Sequence[str]) -> pd.DataFrame:
    fix = "build the month's features first"
    return pd.concat(
        [source.read_parquet(storage.join(root, folder, f"{month}.parquet"), fix).to_pandas() for month in months],
        ignore_index=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the replay and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="project folder to use and keep; default: a temporary one")
    parser.add_argument("--first", type=int, default=5, help="first month scored, 4 to 12")
    parser.add_argument("--last", type=int, default=12, help="last month scored")
    parser.add_argument("--nthread", type=int, default=1)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        scores = replay(options.root or temporary, options.first, options.last, options.nthread)
    for metric in ("auc", "log_loss"):
        table = scores.pivot(index="month", columns="strategy", values=metric)[list(STRATEGIES)]
        table.loc["mean"] = table.mean()
        table.insert(0, "late_rate", scores.groupby("month")["late_rate"].first())
        print(f"\n{metric}\n{table.to_string(float_format='%.4f', na_rep='')}")


if __name__ == "__main__":
    main()
