"""The training loop: boosted trees over Ray Train workers, an ordinary Ray Train function.

Nothing of the provider's is required in such a loop; it runs in any ``ray.train.xgboost.XGBoostTrainer``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs

from airflow_mlops.examples.flights import PARAMS
from airflow_mlops.exceptions import DataError

ROUNDS = 150
CHECKPOINT_EVERY = 25


def train_loop_per_worker(config: Mapping[str, Any]) -> None:
    """Train on this worker's share of the training set; continues from the run's last checkpoint.

    :param config: ``train_uri`` (Parquet file or folder), ``features`` (numeric columns), ``label`` (0/1 column);
        optional ``rounds``, ``params`` (over ``airflow_mlops.examples.flights.PARAMS``), ``checkpoint_every`` (rounds),
        ``nthread`` (1) and ``recency_half_life_days`` (weight of old rows; default: all weigh the same)
    :raises DataError: the training set is empty, lacks a column or has a missing label
    """
    import ray.train
    import xgboost
    from ray.train.xgboost import RayTrainReportCallback

    class Report(RayTrainReportCallback):
        """Reports where a checkpoint is due; a report is a barrier for all workers and not free."""

        def _report_metrics(self, report_dict: dict[str, Any]) -> None:
            pass

    context = ray.train.get_context()
    features, label = list(config["features"]), str(config["label"])
    half_life = config.get("recency_half_life_days")
    shard = read_shard(
        config["train_uri"],
        [*features, label, *(["event_timestamp"] if half_life else [])],
        context.get_world_rank(),
        context.get_world_size(),
    )
    nthread = int(config.get("nthread", 1))
    weight = recency(shard.column("event_timestamp"), half_life) if half_life else None
    train = xgboost.QuantileDMatrix(
        matrix(shard, features), target(shard, label), weight=weight, feature_names=features, nthread=nthread
    )
    rounds = int(config.get("rounds", ROUNDS))
    report = Report(
        metrics={"train_log_loss": "train-logloss"}, frequency=int(config.get("checkpoint_every", CHECKPOINT_EVERY))
    )

    checkpoint = ray.train.get_checkpoint()
    model = Report.get_model(checkpoint) if checkpoint else None
    done = model.num_boosted_rounds() if model else 0
    if model and done >= rounds:
        # A run cut off after its last round has nothing left but to report it once more.
        report.after_training(model)
        return
    xgboost.train(
        PARAMS | {"nthread": nthread} | dict(config.get("params") or {}),
        train,
        num_boost_round=rounds - done,
        evals=[(train, "train")],
        verbose_eval=False,
        xgb_model=model,
        callbacks=[report],
    )


def read_shard(uri: str, columns: Sequence[str], rank: int, world_size: int) -> pa.Table:
    """The ``rank``-th of ``world_size`` contiguous parts of the rows at ``uri``, reading only the row groups it needs.

    :raises DataError: no rows for a worker, or a column is missing
    """
    filesystem, path = pyarrow.fs.FileSystem.from_uri(uri) if "://" in uri else (pyarrow.fs.LocalFileSystem(), uri)
    dataset = ds.dataset(path, filesystem=filesystem, format="parquet")
    missing = [name for name in columns if name not in dataset.schema.names]
    if missing:
        raise DataError(f"the training set {uri} lacks the columns {missing}; join them or leave them out of features")
    groups = [group for fragment in dataset.get_fragments() for group in fragment.split_by_row_group()]
    # The metadata's count: Fragment.count_rows() ignores the split and gives wrong sums (pyarrow 25).
    counts = [sum(part.num_rows for part in group.row_groups) for group in groups]
    rows = sum(counts)
    start, stop = rows * rank // world_size, rows * (rank + 1) // world_size
    if start == stop:
        raise DataError(
            f"the training set {uri} has {rows} rows, none for worker {rank} of {world_size}; "
            "widen the training window or use fewer workers"
        )
    parts, first = [], 0
    for group, count in zip(groups, counts):
        low, high = max(start, first), min(stop, first + count)
        if low < high:
            parts.append(group.to_table(columns=list(columns)).slice(low - first, high - low))
        first += count
    return pa.concat_tables(parts)


def matrix(table: pa.Table, features: Sequence[str]) -> np.ndarray:
    """``(rows, features)`` float32; a null is NaN, which trees take as missing."""
    columns = [table.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False) for name in features]
    return np.column_stack(columns).astype("float32")


def target(table: pa.Table, label: str) -> np.ndarray:
    """The label as 0/1.

    :raises DataError: a missing label
    """
    if table.column(label).null_count:
        raise DataError(
            f"{table.column(label).null_count} rows have no {label!r}; train on rows whose outcome is known only"
        )
    return table.column(label).cast(pa.float64()).to_numpy(zero_copy_only=False)


def recency(times: pa.ChunkedArray, half_life_days: float) -> np.ndarray:
    """Row weights that halve with each ``half_life_days`` of age, 1 for the newest."""
    days = pc.cast(pc.cast(times, pa.timestamp("us", tz="UTC")), pa.int64()).to_numpy() / 86_400e6
    return np.exp2((days - days.max()) / float(half_life_days))
