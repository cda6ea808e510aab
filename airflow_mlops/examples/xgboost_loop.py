"""A distributed XGBoost loop over Parquet: every worker reads its share of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def train_loop_per_worker(config: Mapping[str, Any]) -> None:
    """Boosted trees for a binary label, resumed from the run's last checkpoint.

    :param config: ``data`` (Parquet file or folder), ``features``, ``label``; optional ``rounds`` (50), ``params``
        (over XGBoost's), ``checkpoint_every`` (rounds, 10)
    """
    import pyarrow.dataset
    import ray.train
    import xgboost
    from ray.train.xgboost import RayTrainReportCallback

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    features, label = list(config["features"]), config["label"]
    table = pyarrow.dataset.dataset(config["data"]).to_table(columns=[*features, label])
    share = table.slice(
        table.num_rows * rank // world, table.num_rows * (rank + 1) // world - table.num_rows * rank // world
    )
    frame = share.to_pandas()
    data = xgboost.DMatrix(frame[features].astype("float32"), frame[label], nthread=1)

    every, rounds = int(config.get("checkpoint_every", 10)), int(config.get("rounds", 50))
    checkpoint = ray.train.get_checkpoint()
    model = RayTrainReportCallback.get_model(checkpoint) if checkpoint else None
    done = model.num_boosted_rounds() if model else 0
    if done >= rounds:
        return
    params = {"objective": "binary:logistic", "eval_metric": "logloss", "tree_method": "hist", "nthread": 1}
    xgboost.train(
        params | dict(config.get("params") or {}),
        data,
        num_boost_round=rounds - done,
        evals=[(data, "train")],
        verbose_eval=False,
        xgb_model=model,
        callbacks=[RayTrainReportCallback(frequency=every)],
    )
