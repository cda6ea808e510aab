"""What the gate and the score check before they touch a registry, and what their templates render."""

from __future__ import annotations

import datetime as dt
import pathlib
import re

import pandas as pd
import pytest
from airflow.sdk.exceptions import AirflowFailException

from airflow_mlops.exceptions import DataError
from airflow_mlops.operators.gate import ModelGateOperator, ModelScoreOperator, read_rows
from airflow_mlops.windows import Window

GATE = {"challenger_uri": "m", "champion_uri": "", "data_uri": "d", "label_column": "late", "report_dir": "r"}
SCORE = {"models": {"champion": ""}, "data_uri": "d", "label_column": "late", "predictions_uri": "p"}
CONTEXT = {
    "data_interval_start": dt.datetime(2013, 4, 1, tzinfo=dt.timezone.utc),
    "data_interval_end": dt.datetime(2013, 5, 1, tzinfo=dt.timezone.utc),
}


def test_all_but_switches_is_templated(untemplated):
    trust = {"mlflow_conn_id", "signing_conn_id", "allow_pickle"}
    switches = {"alias", "cluster", "measure_latency", "on_fail", "pass_task_ids", "fail_task_ids"}
    assert untemplated(ModelGateOperator) == {*switches, *trust, "approval_notifiers"}
    assert untemplated(ModelScoreOperator) == {"optional", *trust}


def test_templates_render_at_every_depth(rendered):
    gate = rendered(
        ModelGateOperator(
            task_id="gate",
            **GATE
            | {
                "policy": {"floors": {"auc": "{{ floor }}"}},
                "slice_columns": ["{{ column }}"],
                "data_uri": "{{ uri }}",
            },
        ),
        floor=0.7,
        column="origin",
        uri="set.parquet",
    )
    assert (gate.data_uri, gate.slice_columns) == ("set.parquet", ["origin"])
    assert gate._policy().floors == {"auc": 0.7}
    score = rendered(ModelScoreOperator(task_id="s", **SCORE | {"models": {"frozen": "models:/{{ m }}/1"}}), m="late")
    assert score.models == {"frozen": "models:/late/1"}


@pytest.mark.parametrize("name", ["challenger_uri", "data_uri", "label_column", "report_dir"])
@pytest.mark.parametrize("blank", ["", "None", None])
def test_a_gate_without_its_inputs_does_not_pass(name, blank):
    with pytest.raises(AirflowFailException, match=name):
        ModelGateOperator(task_id="gate", **GATE | {name: blank}).execute(CONTEXT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_fail": "warn"}, "on_fail is 'warn'; expected one of"),
        ({"policy": {"metric": "f1"}}, "metric is 'f1'; expected one of .* or package.module:function"),
        ({"policy": "{'rule': 'non_inferiority'}"}, "positive margin"),
        ({"policy": "strict"}, "policy is 'strict'; expected a dict"),
        ({"champion_uri": None}, "no champion, or a lost one"),
        ({"features": "a, b"}, "features is 'a, b'; expected a list"),
        ({"window_end": "2013-05-01"}, "only one end"),
        ({"window_start": "April", "window_end": "May"}, "ISO 8601"),
        ({"data_uri": "/nowhere"}, "no data at /nowhere; did the task that writes it succeed"),
    ],
)
def test_bad_input_of_the_gate_names_the_fix(changes, message):
    with pytest.raises(AirflowFailException, match=message):
        ModelGateOperator(task_id="gate", **GATE | changes).execute(CONTEXT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_uri": ""}, "data_uri="),
        ({"label_column": None}, "label_column="),
        ({"predictions_uri": "None"}, "predictions_uri="),
        ({"models": "champion"}, "models is 'champion'; expected a dict"),
        ({"data_uri": "/nowhere"}, "no data at /nowhere"),
    ],
)
def test_bad_input_of_the_score_names_the_fix(changes, message):
    with pytest.raises(AirflowFailException, match=message):
        ModelScoreOperator(task_id="score", **SCORE | changes).execute(CONTEXT)


def test_without_a_window_nothing_is_scored():
    with pytest.raises(AirflowFailException, match="no data interval"):
        ModelScoreOperator(task_id="score", **SCORE).execute({})


class TestReadRows:
    @pytest.fixture
    def uri(self, tmp_path):
        times = ["2013-04-01T00:00Z", "2013-04-30T23:59:59.999999Z", "2013-05-01T00:00Z", "2013-03-31T23:59Z"]
        frame = pd.DataFrame({"event_timestamp": pd.to_datetime(times, format="ISO8601"), "late": [1.0, None, 0, 0]})
        frame.to_parquet(tmp_path / "rows.parquet")
        return str(tmp_path / "rows.parquet")

    def test_the_window_is_half_open_and_labels_may_be_missing(self, uri):
        rows = read_rows(uri, "late", Window(*CONTEXT.values()))
        assert rows["event_timestamp"].dt.month.tolist() == [4, 4]
        assert rows["late"].isna().tolist() == [False, True]
        assert len(read_rows(uri, "late")) == 4

    def test_a_window_in_another_zone_is_the_same_instants(self, uri, tmp_path):
        local = pd.read_parquet(uri)
        local["event_timestamp"] = local["event_timestamp"].dt.tz_convert("America/New_York")
        local.to_parquet(tmp_path / "local.parquet")
        window = Window(*CONTEXT.values())
        pd.testing.assert_frame_equal(
            read_rows(str(tmp_path / "local.parquet"), "late", window), read_rows(uri, "late", window)
        )

    def test_what_is_lacking_is_named(self, uri):
        with pytest.raises(DataError, match=r"lacks \['delay'\]; it has \['event_timestamp', 'late'\]"):
            read_rows(uri, "delay")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "needs fail_task_ids"),
        (
            {"fail_task_ids": "later"},
            r"names 'later', which does not come directly after 'gate'; after it come \['go', 'tell'\]",
        ),
        ({"fail_task_ids": "tell", "pass_task_ids": ["absent"]}, "names 'absent'"),
    ],
)
def test_a_branch_that_leads_nowhere_is_named_before_anything_runs(changes, message):
    from airflow.providers.standard.operators.empty import EmptyOperator
    from airflow.sdk import DAG

    with DAG("training", schedule=None):
        gate = ModelGateOperator(task_id="gate", on_fail="branch", **GATE | changes)
        go = EmptyOperator(task_id="go")
        gate >> [EmptyOperator(task_id="tell"), go]
        go >> EmptyOperator(task_id="later")
    with pytest.raises(AirflowFailException, match=message):
        gate.execute(CONTEXT)


PAGE = pathlib.Path(__file__).parents[3] / "docs/gate.md"


def test_the_operator_of_the_page():
    from airflow_mlops.evaluation.cases import read_cases

    mark = "<!-- tests/unit/operators/test_gate.py makes this very operator -->"
    block = re.search(re.escape(mark) + r"\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block
    names = {"ModelGateOperator": ModelGateOperator, "CHALLENGER": "m", "HOLDOUT": "d", "DATA": "/data"}
    exec(block[1], names)
    gate = names["gate"]
    assert gate._policy().test == "delong"
    assert len(read_cases(gate.cases)) == 3


def test_the_notebook_of_the_page(capsys):
    block = re.search(r"## In a notebook\n\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block
    exec(block[1], {})
    assert capsys.readouterr().out.startswith("True ('improvement in auc: gain +0.0")
