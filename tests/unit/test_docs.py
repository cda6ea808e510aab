"""What the README and the pages beside it name is there: modules, what is in them, files and headings."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pathlib
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

import airflow_mlops.drift
from airflow_mlops.drift.limits import CONTROLS, MIN_EFFECT
from airflow_mlops.notifications.drift import VERDICTS
from airflow_mlops.sensors.drift import DriftSensor

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DRIFT = ROOT / "docs/drift.md"
SHELL = "operators|sensors|triggers|hooks|notifications|decorators"
#: What the page on drift sets as code besides arguments of the sensor, fields of policies and public names.
WORDS = {
    "DriftSensor",
    "DriftEventTrigger",
    "MlflowRegisterOperator",
    "event_timestamp",
    "label_delay",
    "threads",
    "s3",
    "ray",
}
WORDS |= {"data", "prediction", "quality", "calendar", "broken", "estimate", "proceed", "skip", "wait", "state"}
WORDS |= {"on_success_callback", "MLOPS_CALIBRATION_GRID", *VERDICTS, *CONTROLS, *MIN_EFFECT}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def find(name: str) -> Any:
    """The module, or what is in one, that a dotted name (an entry point's colon is a dot) stands for."""
    parts = name.replace(":", ".").split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def imports(text: str) -> set[str]:
    """What the Python blocks of a page import from the package."""
    found = set()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for module, names in re.findall(r"^from (airflow_mlops[\w.]*) import ([\w, ]+)$", block, re.MULTILINE):
            found |= {f"{module}.{name.strip()}" for name in names.split(",")}
    return found


@pytest.mark.parametrize("name", airflow_mlops.drift.__all__)
def test_every_public_name_of_drift_is_there(name):
    found = getattr(airflow_mlops.drift, name)
    assert found.__name__ == name and found.__module__.startswith("airflow_mlops.drift.") and found.__doc__


def test_the_public_names_of_drift_are_in_order_and_all_that_is_imported():
    names = airflow_mlops.drift.__all__
    assert names == sorted(set(names))
    assert names == sorted(
        name
        for name, value in vars(airflow_mlops.drift).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    )


@pages
def test_names_of_the_package_resolve(page):
    text = page.read_text()
    names = set(re.findall(r"\bairflow_mlops(?:\.\w+)+(?::\w+)?", text)) | imports(text)
    names |= {f"airflow_mlops.{name}" for name in re.findall(rf"`((?:{SHELL})\.\w+\.\w+)`", text)}
    assert names or page.name == "CONTRIBUTING.md"
    for name in sorted(names):
        find(name)


@pages
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if heading else []
        anchors = [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]
        assert not heading or heading in anchors, target


def spans(text: str) -> set[str]:
    """What a page sets as code in its prose and tables."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))


def test_the_page_on_drift_names_what_there_is():
    """Arguments, fields and classes that its prose names are there, and no field of a policy is left out."""
    drift, found = airflow_mlops.drift, spans(DRIFT.read_text())
    policies = (drift.DriftPolicy, drift.HarmPolicy, drift.Hysteresis)
    fields = {field.name for policy in policies for field in dataclasses.fields(policy)}
    known = fields | {field.name for field in dataclasses.fields(drift.LossTest)} | WORDS | set(drift.__all__)
    known |= set(inspect.signature(DriftSensor).parameters)
    words = {span[0] for span in (re.findall(r"^[\w-]+(?=$|[=(])", span) for span in found) if span}
    assert words - known == set()
    assert fields - words == set()
    for name in re.findall(r"`([A-Z]\w+\.\w+)", DRIFT.read_text()):
        find(f"airflow_mlops.drift.{name}")


def test_the_page_on_drift_runs_in_a_notebook(tmp_path, monkeypatch, capsys):
    """Its last blocks, one after the other, on customers that spend more than they did."""
    rng = np.random.default_rng(3)

    def write(name: str, first_day: str, spend: float) -> None:
        rows = 4000
        score = rng.beta(2, 5, rows)
        times = pd.Timestamp(first_day, tz="UTC") + pd.to_timedelta(np.sort(rng.uniform(0, 7, rows)), unit="D")
        columns = {"age": rng.normal(40, 9, rows), "spend": rng.gamma(2, spend, rows), "visits": rng.poisson(4, rows)}
        frame = pd.DataFrame({"event_timestamp": times, **columns, "champion": score})
        frame["churned"] = (rng.random(rows) < score).astype("int64")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        frame.to_parquet(tmp_path / name)

    monkeypatch.chdir(tmp_path)
    write("train/1.parquet", "2025-12-01", 30)
    write("week.parquet", "2026-01-04", 60)
    write("held_out.parquet", "2025-12-21", 30)
    write("scored.parquet", "2026-01-04", 60)
    blocks = re.findall(r"```python\n(.*?)```", DRIFT.read_text().partition("## In a notebook")[2], re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3 and names["report"].drifted == ["spend"]
    assert names["harm"].verdict == names["verdict"].verdict == "stable" and not names["decision"].retrain
    assert "drift ['spend']" in capsys.readouterr().out
