"""What the sensor checks before it looks at data or a registry, and what its templates render."""

from __future__ import annotations

import inspect

import pytest
from airflow.sdk.exceptions import AirflowFailException

from airflow_mlops.sensors.drift import DriftSensor

GIVEN = {"current_uri": "/nowhere", "model_name": "late", "report_dir": "/nowhere"}


def test_all_but_switches_is_templated():
    parameters = inspect.signature(DriftSensor.__init__).parameters.values()
    own = {given.name for given in parameters if given.kind is given.KEYWORD_ONLY}
    assert own - set(DriftSensor.template_fields) == {"mlflow_conn_id", "ray_conn_id", "evidently", "deferrable"}


def test_templates_render_at_every_depth():
    made = DriftSensor(task_id="d", **GIVEN, retrain_on=["{{ on }}"], policy={"calendar_columns": ["{{ column }}"]})
    made.render_template_fields({"on": "drift", "column": "temp"})
    assert (made.retrain_on, made.policy) == (["drift"], {"calendar_columns": ["temp"]})


@pytest.mark.parametrize("deferrable", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"current_uri": "None"}, "current_uri="),
        ({"model_name": ""}, "model_name="),
        ({"report_dir": None}, "report_dir="),
        ({"on_stable": "pass"}, "on_stable is 'pass'; expected wait, skip or proceed"),
        ({"retrain_on": "harm"}, "retrain_on is 'harm'; expected a list"),
        ({"retrain_on": "[]"}, "expected a list of harm, drift or both"),
        ({"retrain_on": ["harm", "loss"]}, "expected a list of harm, drift or both"),
        ({"engine": "spark"}, "engine is 'spark'; expected profile or ray or evidently"),
        ({"engine_options": {"drift_share": 0.2}}, "engine_options are for engine='ray' or 'evidently'"),
        ({"hysteresis": {"cool": 1}}, "unknown field"),
        ({"hysteresis": "{'cooldown': 'soon'}"}, "cooldown is 'soon'"),
    ],
)
def test_bad_input_fails_before_any_waiting(changes, message, deferrable):
    with pytest.raises(AirflowFailException, match=message):
        DriftSensor(task_id="d", **GIVEN | changes, deferrable=deferrable, timeout=1, poke_interval=1).execute({})
