"""A distributed XGBoost loop over Parquet: every worker reads its share of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def train_loop_per_worker(config: Mapping[str, Any]) -> None:
    """Boosted trees for a binary label, resumed from the run's last checkpoint.

    :param config: ``data`` (Parquet file or folder), ``features``, ``label``; optional ``validation`` (Parquet of rows
        to report metrics on, which a search should look at), ``rounds`` (50), ``params`` (over XGBoost's),
        ``checkpoint_every`` (rounds, 10)
    """
    import pyarrow.dataset
    import ray.train
    import xgboost
    from ray.train.xgboost import RayTrainReportCallback

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    features, label = list(config["features"]), config["label"]

    def matrix(path: str, rank: int, world: int) -> Any:
        table = pyarrow.dataset.dataset(path).to_table(columns=[*features, label])
        first, end = table.num_rows * rank // world, table.num_rows * (rank + 1) // world
        frame = table.slice(first, end - first).to_pandas()
        return xgboost.DMatrix(frame[features].astype("float32"), frame[label], nthread=1)

    data = matrix(config["data"], rank, world)
    evals = [(data, "train")]
    if config.get("validation"):
        evals.append((matrix(config["validation"], rank, world), "validation"))

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
        evals=evals,
        verbose_eval=False,
        xgb_model=model,
        callbacks=[RayTrainReportCallback(frequency=every)],
    )
