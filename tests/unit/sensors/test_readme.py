"""The sensor that the README shows under "Drift", as it stands there."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path

from airflow.sdk import Asset

from airflow_mlops.sensors.drift import DriftSensor
from airflow_mlops.windows import Window

README = Path(__file__).parents[3] / "README.md"


def test_the_sensor_of_the_readme_is_valid():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (text,) = (block for block in blocks if "hysteresis=" in block)
    names = {"DriftSensor": DriftSensor, "Asset": Asset, "DATA": "/data", "WEEK": "/data/w", "PREDICTIONS": "/data/p"}
    exec(text, names)
    drift = names["drift"]
    drift._validate()
    assert drift._limits().cooldown == dt.timedelta(days=14)
    end = dt.datetime(2026, 1, 11, tzinfo=dt.timezone.utc)
    policy = drift._drift_policy(Window(end - dt.timedelta(days=7), end))
    assert policy.as_of == end.isoformat() and policy.weights["id"] == 0
