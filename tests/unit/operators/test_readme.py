"""The operators that README and the pages beside it show are made as they stand there, and take their arguments."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_mlops.approval import Approval
from airflow_mlops.assets import model_asset
from airflow_mlops.hooks import _rollout
from airflow_mlops.operators.canary import CanaryPromoteOperator
from airflow_mlops.operators.gate import ModelGateOperator
from airflow_mlops.operators.mlflow import MlflowPromoteOperator, MlflowRegisterOperator

ROOT = pathlib.Path(__file__).parents[3]
MARK = "<!-- tests/unit/operators/test_readme.py makes this very operator -->"


@pytest.mark.parametrize("page", ["README.md", "docs/rollout.md"])
def test_the_operator_of_a_page(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(re.escape(MARK) + r"\n```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert block
    names: dict[str, Any] = {"CanaryPromoteOperator": CanaryPromoteOperator}
    exec(block[1], names)
    operator = names["canary"]
    # What would ask MLflow where the versions lie.
    monkeypatch.setattr("airflow_mlops.operators.canary.servables_of", lambda *_: {})
    place = operator._place()
    assert place.target["kind"] in ("kserve", "gateway")
    ti = SimpleNamespace(dag_id="d", task_id="t", run_id="r", map_index=-1, try_number=1)
    spec = operator._spec({"ti": ti})
    assert spec.policy.weights[-1] == 100 and len(spec.guardrails) == 2
    from airflow_mlops.rollout.sources.config import source_of
    from airflow_mlops.rollout.targets.factory import cluster_target

    cluster_target(place.target, object())  # type: ignore[arg-type]
    evidence = {**place.evidence, "url": "http://127.0.0.1:9"}
    assert source_of(evidence, name="fraud", namespace="serving", metrics=spec.metrics)
    assert _rollout.RAY_SERVE not in place.target.values()


def test_the_operators_of_the_page_on_the_registry() -> None:
    text = (ROOT / "docs/registry.md").read_text()
    block = re.search(r"these very operators -->\n```python\n(.*?)```", text, re.DOTALL)
    assert block
    task = SimpleNamespace(output={"model_uri": "m", "uri": "u"})
    names: dict[str, Any] = {"train": task, "training_set": task, "DATA": "/data", "WEEK": "/data/week.parquet"}
    code = block[1].replace(".output[", "_output[").replace(".output,", "_output,")
    names |= {f"{name}_output": collections.defaultdict(str) for name in ("train", "training_set", "gate", "register")}
    names |= {"ModelGateOperator": ModelGateOperator, "model_asset": model_asset}
    names |= {"MlflowRegisterOperator": MlflowRegisterOperator, "MlflowPromoteOperator": MlflowPromoteOperator}
    exec(code, names)
    approval = names["promote"]._approval()
    assert [user["id"] for user in approval.assigned_users] == ["carol", "dave"] and approval.timeout == 28_800
    assert names["promote"].outlets == [model_asset("churn")] and names["gate"]._approval() is None


def test_the_fields_of_an_approval_are_those_of_the_page() -> None:
    text = (ROOT / "docs/registry.md").read_text()
    table = text.partition("| field | |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [field.name for field in dataclasses.fields(Approval)]


def test_the_dag_of_the_page_on_the_registry_follows_the_champion() -> None:
    text = (ROOT / "docs/registry.md").read_text()
    block = re.search(r"## Dags that follow a promotion.*?```python\n(.*?)```", text, re.DOTALL)
    assert block
    names: dict[str, Any] = {}
    exec(block[1].replace('schedule=[model_asset("churn")]):', 'schedule=[model_asset("churn")]) as made:'), names)
    assert names["made"].timetable.asset_condition.objects == (model_asset("churn"),)


def test_the_notebook_of_the_page_on_rollouts(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/rollout.md").read_text()
    block = re.search(r"## In a notebook\n\n```python\n(.*?)```", text, re.DOTALL)
    assert block
    exec(block[1], {})
    assert capsys.readouterr().out.startswith("ROLLBACK ['errors: the canary is worse")
