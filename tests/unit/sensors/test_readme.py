"""The sensors that the README and docs/drift.md show, as they stand there."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path

import pytest
from airflow.sdk import Asset

from airflow_mlops.drift import HarmPolicy, LossReference, LossTest
from airflow_mlops.sensors.drift import DriftSensor
from airflow_mlops.windows import Window

ROOT = Path(__file__).parents[3]


@pytest.fixture(params=["README.md", "docs/drift.md"])
def drift(request) -> DriftSensor:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / request.param).read_text(), re.DOTALL)
    (text,) = (block for block in blocks if "hysteresis=" in block)
    names = {"DriftSensor": DriftSensor, "Asset": Asset, "DATA": "/data", "WEEK": "/data/w", "PREDICTIONS": "/data/p"}
    exec(text, names)
    return names["drift"]


def test_the_sensor_shown_is_valid(drift):
    drift._validate()
    assert drift._limits().cooldown == dt.timedelta(days=14)
    end = dt.datetime(2026, 1, 11, tzinfo=dt.timezone.utc)
    policy = drift._drift_policy(Window(end - dt.timedelta(days=7), end))
    assert policy.as_of == end.isoformat() and policy.weights["id"] == 0
    HarmPolicy.from_json(drift.harm_policy or {})
    fields = {name: value for name, value in (drift.loss_test or {}).items() if name != "label_delay"}
    reference = LossReference.of([0, 1, 0, 1] * 10, [0.2, 0.7, 0.3, 0.8] * 10, list(range(10)) * 4)
    LossTest(reference.log_loss, **fields).check()
