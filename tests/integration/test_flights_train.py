"""The training loop on two real Ray Train workers."""

from __future__ import annotations

import numpy as np
import pytest

from airflow_mlops.examples.flights import LABEL, experiment, features, train

pytestmark = pytest.mark.ray
ROUNDS = 12


@pytest.fixture(scope="module")
def training_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("flights")
    experiment.prepare(str(root), "2013-01")
    frame = experiment.join(str(root), ["2013-01"])
    path = root / "set.parquet"
    frame.to_parquet(path, row_group_size=5000)
    return str(path), frame


@pytest.fixture(scope="module")
def ray_two_cpus():
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def _fit(uri, storage, **config):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.xgboost import XGBoostTrainer

    trainer = XGBoostTrainer(
        train.train_loop_per_worker,
        train_loop_config={
            "train_uri": uri,
            "features": features.feature_names(),
            "label": LABEL,
            "rounds": ROUNDS,
            "checkpoint_every": 5,
            **config,
        },
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="flights", storage_path=str(storage)),
    )
    return trainer.fit()


def _model(result):
    from ray.train.xgboost import RayTrainReportCallback

    return RayTrainReportCallback.get_model(result.checkpoint)


def test_two_workers_train_one_model_and_a_new_attempt_continues_it(training_set, ray_two_cpus, tmp_path):
    uri, frame = training_set
    first = _fit(uri, tmp_path, rounds=5)
    assert _model(first).num_boosted_rounds() == 5

    # The same storage and name: Ray Train hands the last checkpoint to the workers.
    second = _fit(uri, tmp_path)
    model = _model(second)
    assert model.num_boosted_rounds() == ROUNDS
    assert second.metrics["train_log_loss"] < first.metrics["train_log_loss"]
    assert model.feature_names == features.feature_names()

    # The first five trees are those of the first attempt, so it was continued and not begun again.
    kept = model[:5].get_dump()
    assert kept == _model(first).get_dump()

    third = _fit(uri, tmp_path)
    assert _model(third).num_boosted_rounds() == ROUNDS

    # Two workers saw all rows: their model is as good as one that a single process fits on all of them.
    alone = experiment.predict(experiment.fit(frame, rounds=ROUNDS), frame)
    together = experiment.predict(model, frame)
    late = frame[LABEL].to_numpy()

    def loss(probability):
        return -np.mean(np.log(np.where(late == 1, probability, 1 - probability)))

    assert abs(loss(together) - loss(alone)) < 0.01
    assert np.isclose(second.metrics["train_log_loss"], loss(together), atol=1e-3)
