"""The Dag of the README, as it stands there: copied out, run by Airflow for two weeks of data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ray
pytest.importorskip("xgboost", reason="the README's Dag trains with XGBoost: pip install 'airflow-mlops[xgboost]'")

README = Path(__file__).parents[2] / "README.md"
FEATURES = ["age", "spend", "visits"]

# ``dag.test()`` runs the Dag of the bundle, so the file lies in the Dags folder of an Airflow of its own.
RUNNER = """
import datetime as dt, json, sys

from airflow.utils import db
db.initdb()
from airflow.dag_processing.dagbag import DagBag

bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
weeks = []
for day in (11, 18):
    run = bag.dags["churn"].test(logical_date=dt.datetime(2026, 1, day, tzinfo=dt.timezone.utc))
    tasks = {ti.task_id: str(ti.state) for ti in run.get_task_instances()}
    weeks.append({"state": str(run.state), "start": str(run.data_interval_start.date()), "tasks": tasks})
with open(sys.argv[2], "w") as file:
    json.dump(weeks, file)
"""


def customers(rows: int, first_day: str, days: int, seed: int) -> Any:
    """Customers of which those that visit seldom and spend little leave."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "event_timestamp": pd.Timestamp(first_day, tz="UTC")
            + pd.to_timedelta(np.sort(rng.integers(0, days * 24 * 60, rows)), unit="min"),
            "age": rng.integers(18, 80, rows).astype("float64"),
            "spend": rng.gamma(2.0, 30.0, rows),
            "visits": rng.poisson(4.0, rows).astype("float64"),
        }
    )
    logit = 1.5 - 0.5 * frame["visits"] - 0.01 * frame["spend"] + 0.01 * frame["age"]
    frame["churned"] = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype("int64")
    return frame


@pytest.fixture(scope="module")
def block() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    found = [text for text in blocks if "with DAG(" in text]
    assert len(found) == 1, "the README has no longer exactly one Dag"
    return found[0]


@pytest.fixture(scope="module")
def weeks(block: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two weekly runs of the Dag did."""
    root = tmp_path_factory.mktemp("readme")
    data, dags, home = root / "churn", root / "dags", root / "airflow"
    for folder in (data / "weeks", dags, home):
        folder.mkdir(parents=True)
    customers(6000, "2025-10-01", 90, seed=1).to_parquet(data / "history.parquet", index=False)
    for seed, week in ((2, "2026-01-04"), (3, "2026-01-11")):
        customers(2000, week, 7, seed).to_parquet(data / "weeks" / f"{week}.parquet", index=False)
    assert "/data/churn" in block
    (dags / "churn.py").write_text(block.replace("/data/churn", str(data)))
    env = os.environ | {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db",
    }
    env.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(dags), str(root / "weeks.json")],
        cwd=root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return {"root": root, "output": done.stdout, "runs": json.loads((root / "weeks.json").read_text())}


def test_first_week_trains_and_promotes_the_first_champion(weeks: dict[str, Any]) -> None:
    from airflow_mlops.hooks.mlflow import MlflowHook

    first = weeks["runs"][0]
    assert first["start"] == "2026-01-04"
    assert first["tasks"] == dict.fromkeys(["drift", "train", "gate", "register", "promote"], "success"), weeks[
        "output"
    ][-8000:]
    assert first["state"] == "success"
    hook = MlflowHook(tracking_uri=f"sqlite:///{weeks['root']}/mlflow.db")
    versions = hook.client.search_model_versions("name='churn'")
    assert [version.version for version in versions] == [1]
    champion = hook.version_by_alias("churn", "champion")
    assert champion is not None and int(champion.version) == 1
    assert champion.tags["mlops.gate"] == "passed"
    week = customers(500, "2026-01-18", 7, seed=4)
    predicted = hook.predict_proba("models:/churn/1", week, FEATURES)
    assert predicted[week["churned"] == 1].mean() > predicted[week["churned"] == 0].mean() + 0.1


def test_a_week_like_the_first_is_skipped_and_says_so(weeks: dict[str, Any]) -> None:
    second = weeks["runs"][1]
    assert second["start"] == "2026-01-11"
    assert second["tasks"] == dict.fromkeys(["drift", "train", "gate", "register", "promote"], "skipped"), weeks[
        "output"
    ][-8000:]
    assert second["state"] == "success"
    assert "churn stable: no retraining" in weeks["output"]
    report = next((weeks["root"] / "churn" / "reports").glob("churn-20260111*.drift.json"))
    assert json.loads(report.read_text())["verdict"] == "stable"
