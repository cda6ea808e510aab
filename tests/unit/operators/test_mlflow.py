"""What the registry operators check before they touch a registry, and what their templates render."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from airflow.sdk.exceptions import AirflowFailException

from airflow_mlops.operators.mlflow import MlflowPromoteOperator, MlflowRegisterOperator, MlflowRollbackOperator

CONTEXT = {"ti": SimpleNamespace(dag_id="d", task_id="t", run_id="r", map_index=2)}
TRAINING = {"run_key": "june", "model_uri": "/models/june"}


def register(**changes):
    return MlflowRegisterOperator(task_id="register", **{"model_name": "late", "training": TRAINING} | changes)


@pytest.mark.parametrize(
    ("operator", "switches"),
    [
        (MlflowRegisterOperator, {"require_signature", "example_rows"}),
        (MlflowPromoteOperator, {"approval_notifiers", "on_reject"}),
        (MlflowRollbackOperator, set()),
    ],
)
def test_all_but_the_connection_and_switches_is_templated(operator, switches, untemplated):
    # A template must not be what allows a pickle.
    assert untemplated(operator) == {"mlflow_conn_id", "signing_conn_id", "allow_pickle", *switches}


def test_templates_render_at_every_depth(rendered):
    made = rendered(
        register(tags={"team": "{{ team }}"}, training="{{ training }}", gate=None), team="ops", training=TRAINING
    )
    assert made.tags == {"team": "ops"}
    papers = made._papers(CONTEXT)
    assert (papers.key, papers.model_uri, papers.task) == ("june", "/models/june", "d/r/t/2")


def test_without_a_key_the_task_is_the_training():
    assert register(training={"model_uri": "/m"})._papers(CONTEXT).key == "d/r/t/2"
    assert register(run_key="mine")._papers(CONTEXT).key == "mine"


@pytest.mark.parametrize(
    ("given", "data"),
    [
        ("/sets/a.parquet", {"uri": "/sets/a.parquet"}),
        ({"uri": "x"}, {"uri": "x"}),
        ("{'uri': 'x'}", {"uri": "x"}),
        ("None", {}),
    ],
)
def test_a_training_set_is_a_result_or_a_uri(given, data):
    assert register(training_set=given)._papers(CONTEXT).data == data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"model_uri": None}}, "both are needed"),
        ({"model_name": ""}, "model_name is ''"),
        ({"training": "None"}, "model's URI None"),
        ({"training": "june"}, "training is 'june'; expected a dict"),
        ({"gate": {"passed": False, "reasons": ["auc: 0.4; required: at least 0.5"]}}, "did not pass: auc: 0.4"),
        ({"gate": {"passed": "True"}}, "did not pass: no verdict"),
        ({"gate": {"reasons": []}}, "did not pass: no verdict"),
    ],
)
def test_what_is_not_registered_is_said(changes, message):
    with pytest.raises(AirflowFailException, match=message):
        register(**changes).execute(CONTEXT)


@pytest.mark.parametrize("blank", ["", "None", None])
def test_a_gate_that_was_skipped_is_not_none(blank):
    operator = register(gate="{{ ti.xcom_pull('gate') }}")
    operator.gate = blank
    with pytest.raises(AirflowFailException, match="gate is empty after templating: did the gate run"):
        operator.execute(CONTEXT)


@pytest.mark.parametrize("blank", ["", "None", None])
def test_nothing_is_promoted_without_a_version(blank):
    with pytest.raises(AirflowFailException, match="version is empty; give the number"):
        MlflowPromoteOperator(task_id="p", model_name="late", version=blank, expected_version="").execute(CONTEXT)
