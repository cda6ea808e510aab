"""The operators that README and the page on rollouts show are made as they stand there, and take their arguments."""

from __future__ import annotations

import pathlib
import re
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_mlops.hooks import _rollout
from airflow_mlops.operators.canary import CanaryPromoteOperator

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


def test_the_notebook_of_the_page_on_rollouts(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/rollout.md").read_text()
    block = re.search(r"## In a notebook\n\n```python\n(.*?)```", text, re.DOTALL)
    assert block
    exec(block[1], {})
    assert capsys.readouterr().out.startswith("ROLLBACK ['errors: the canary is worse")
