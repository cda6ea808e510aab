"""What the gate and the score check before they touch a registry, and what their templates render."""

from __future__ import annotations

import datetime as dt

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
    assert untemplated(ModelGateOperator) == {"alias", "cluster", "measure_latency", "on_fail", *trust}
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
        ({"on_fail": "warn"}, "on_fail is 'warn'; expected 'fail' or 'skip'"),
        ({"policy": {"metric": "accuracy"}}, "metric is 'accuracy'; expected one of"),
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
