"""The flights example: will a flight that leaves New York arrive more than 15 minutes late?

Predicted two hours before the scheduled departure, on the flights of 2013 that stand for a stream arriving month by
month. :mod:`~airflow_mlops.examples.flights.source` lands a month, ``quality`` checks it, ``features`` turns it into
feature tables and labelled entities, ``train`` is the training loop, and ``experiment`` replays the year as a plain
script. Nothing here imports Airflow.
"""

from __future__ import annotations

from typing import Any

MODEL = "flights_delay"
LABEL = "late"
#: Feast's feature service.
SERVICE = "flights_delay_v1"
#: The calendar moves these every month; drift in them is shown and never counts.
CALENDAR_BOUND = ("temp", "dewp", "humid", "pressure", "wind_dir", "wind_speed", "wind_gust", "visib", "precip")
#: A false alarm costs a training that the gate looks at, harm that is missed a month of worse predictions: so one
#: month in ten may be called harmed without being so, and from a rise of 0.02 in the log loss on.
HARM: dict[str, Any] = {"alpha": 0.1, "epsilon": 0.02, "calibration_tolerance": 0.01, "excess_epsilon": 0.01}
#: XGBoost's parameters, the seed among them, unless the training loop's ``config["params"]`` says otherwise.
PARAMS: dict[str, Any] = {
    "objective": "binary:logistic",
    "eval_metric": "logloss",
    "tree_method": "hist",
    "max_depth": 6,
    "eta": 0.1,
    "min_child_weight": 20,
    "subsample": 0.8,
    "colsample_bytree": 0.5,
    "lambda": 5.0,
    "seed": 7,
}
