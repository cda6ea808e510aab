"""What the Feast operators check before Feast is loaded, and what their templates render."""

from __future__ import annotations

import pytest
from airflow.sdk.exceptions import AirflowFailException

from airflow_mlops.operators.feast import FeastApplyOperator, FeastMaterializeOperator, FeastTrainingSetOperator

SET = {"entity_uri": "rows", "output_uri": "set.parquet", "feature_service": "all", "repo_path": "/nowhere"}
WINDOW = {"window_start": "2013-04-01", "window_end": "2013-05-01"}


def test_all_but_switches_is_templated(untemplated):
    assert untemplated(FeastApplyOperator) == set()
    assert untemplated(FeastMaterializeOperator) == {"batch_size"}
    assert untemplated(FeastTrainingSetOperator) == {"full_feature_names", "filter_by_created_timestamp"}


def test_templates_render_at_every_depth(rendered):
    made = rendered(
        FeastTrainingSetOperator(
            task_id="s", **SET | {"feature_store": {"online_store": {"path": "{{ path }}"}}, "label_column": "{{ y }}"}
        ),
        path="x.db",
        y="late",
    )
    assert (made.feature_store, made.label_column) == ({"online_store": {"path": "x.db"}}, "late")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entity_uri": ""}, "entity_uri="),
        ({"output_uri": "None"}, "output_uri="),
        ({"feature_service": None}, "either feature_service or features"),
        ({"feature_service": "None", "features": "[]"}, "either feature_service or features"),
        ({"features": ["v:f"]}, "either feature_service or features"),
        ({"feature_service": None, "features": "v:f"}, "features is 'v:f'; expected a list"),
        ({"window_start": ""}, "only one end"),
        ({"feature_store": "redis"}, "feature_store is 'redis'; expected a dict"),
        ({}, "/nowhere has no feature_store.yaml"),
        ({"repo_path": "None"}, "no Feast repository: give repo_path"),
        ({"repo_path": None, "feast_conn_id": "gone"}, "no connection 'gone'"),
    ],
)
def test_bad_input_names_the_fix(changes, message):
    with pytest.raises(AirflowFailException, match=message):
        FeastTrainingSetOperator(task_id="s", **SET | WINDOW | changes).execute({})


@pytest.mark.parametrize("operator", [FeastApplyOperator, FeastMaterializeOperator])
def test_a_folder_that_is_no_repository_is_named(operator, tmp_path):
    window = WINDOW if operator is FeastMaterializeOperator else {}
    with pytest.raises(AirflowFailException, match="must be the folder of a Feast repository on this worker"):
        operator(task_id="f", repo_path=str(tmp_path), **window).execute({})


def test_nothing_is_materialized_without_a_window():
    with pytest.raises(AirflowFailException, match="no data interval"):
        FeastMaterializeOperator(task_id="f", repo_path="/nowhere").execute({})
