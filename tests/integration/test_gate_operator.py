from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from airflow_mlops.evaluation import GatePolicy, score
from airflow_mlops.operators.gate import ModelGateOperator, ModelScoreOperator


@pytest.fixture
def gate(mlflow_uri, mlflow_models, task_context, tmp_path):
    """``gate(**changes)``: the result and the context of a fresh operator, good against poor."""

    def run(context=None, **changes):
        arguments = {
            "challenger_uri": mlflow_models.good,
            "champion_uri": mlflow_models.poor,
            "data_uri": mlflow_models.data,
            "label_column": "late",
            "report_dir": str(tmp_path / "gate"),
            "measure_latency": False,
            "tracking_uri": mlflow_uri,
        } | changes
        return ModelGateOperator(task_id="gate", **arguments).execute(context or task_context("gate"))

    return run


@pytest.fixture
def champion(mlflow_hook, mlflow_models):
    """The poor model as version 1 of ``late``, champion."""
    mlflow_hook.client.create_registered_model("late")
    mlflow_hook.client.create_model_version("late", mlflow_models.poor)
    mlflow_hook.client.set_registered_model_alias("late", "champion", "1")
    return "1"


class TestGate:
    def test_a_winner_leaves_its_evidence(self, gate, mlflow_models):
        result = gate(slice_columns=["origin"], measure_latency=True, policy={"max_latency_ms": "5000"})
        assert result["passed"]
        json.dumps(result, allow_nan=False)
        assert "data:image/png" in Path(result["report_uri"]).read_text()
        assert json.loads(Path(result["verdict_uri"]).read_text())["passed"]
        rows = pd.read_parquet(result["predictions_uri"])
        assert list(rows.columns) == ["event_timestamp", "label", "challenger", "champion"]
        assert rows["label"].dtype == np.int8
        assert len(rows) == 3000
        found = score(rows["label"], rows["challenger"])
        assert result["metrics"]["challenger"]["log_loss"] == pytest.approx(found["log_loss"])
        assert {row["value"] for row in result["slices"]} == {"EWR", "JFK", "LGA"}
        assert result["clusters"] == 10
        assert 0 < result["latency"]["p50_ms"] <= result["latency"]["p95_ms"]

    @pytest.mark.parametrize(("on_fail", "error"), [("fail", AirflowFailException), ("skip", AirflowSkipException)])
    def test_a_loser_stops_and_its_verdict_is_kept(self, gate, mlflow_models, task_context, on_fail, error):
        context = task_context("gate")
        swapped = {"challenger_uri": mlflow_models.poor, "champion_uri": mlflow_models.good}
        with pytest.raises(error, match=r"does not pass: improvement in log_loss: gain -"):
            gate(context, on_fail=on_fail, **swapped)
        pushed = context["ti"].pushed
        assert pushed["return_value"]["passed"] is False
        # Tasks after it read single keys too, as of a task that returned.
        assert {key: value for key, value in pushed.items() if key != "return_value"} == pushed["return_value"]

    def test_page_verdict_and_picture_go_into_one_mlflow_run(self, gate, mlflow_hook, task_context):
        context = task_context("gate")
        first = gate(context, experiment="churn/gate")
        again = gate(context, experiment="churn/gate")
        assert first["mlflow_run_id"] == again["mlflow_run_id"]
        assert first["mlflow_url"] is None  # SQLite has no web address
        run = mlflow_hook.client.get_run(first["mlflow_run_id"])
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlops.verdict"] == "passed"
        assert run.data.tags["mlops.kind"] == "gate"
        assert run.data.metrics["challenger_auc"] == pytest.approx(first["metrics"]["challenger"]["auc"])
        assert run.data.metrics["gain"] == pytest.approx(first["differences"][0]["estimate"])
        assert len(mlflow_hook.client.get_metric_history(first["mlflow_run_id"], "gain")) == 1
        stored = {entry.path for entry in mlflow_hook.client.list_artifacts(first["mlflow_run_id"])}
        assert stored == {"gate.html", "gate.json", "gate.png"}
        folder = Path(mlflow_hook.client.download_artifacts(first["mlflow_run_id"], ""))
        assert json.loads((folder / "gate.json").read_text())["passed"]
        assert (folder / "gate.html").read_text() == Path(again["report_uri"]).read_text()
        assert (folder / "gate.png").read_bytes().startswith(b"\x89PNG")

    def test_a_loser_is_in_mlflow_too(self, gate, mlflow_models, mlflow_hook, task_context):
        context = task_context("gate")
        swapped = {"challenger_uri": mlflow_models.poor, "champion_uri": mlflow_models.good}
        policy = {"metric": "sklearn.metrics:roc_auc_score", "replicates": 200}
        with pytest.raises(AirflowFailException):
            gate(context, experiment="churn/gate", policy=policy, **swapped)
        run = mlflow_hook.client.get_run(context["ti"].pushed["return_value"]["mlflow_run_id"])
        assert run.data.tags["mlops.verdict"] == "failed"
        assert "improvement in sklearn.metrics:roc_auc_score" in run.data.tags["mlops.reason"]
        assert run.data.metrics["champion_sklearn.metrics/roc_auc_score"] > 0.7

    def test_everything_the_policy_can_ask_for(self, gate, mlflow_models, tmp_path):
        frame = pd.read_parquet(mlflow_models.data)
        frame["sex"] = np.where(np.arange(len(frame)) % 2, "f", "m")
        frame.to_parquet(tmp_path / "people.parquet")
        calm = {"a": -2.0, "b": 0.0, "c": 0.0}
        result = gate(
            data_uri=str(tmp_path / "people.parquet"),
            cluster="row",
            policy={
                "metric": "accuracy",
                "calibration_slope": [0.5, 2],
                "fairness": {"column": "sex", "metrics": {"equalized_odds_difference": 0.2}},
                "max_missing_loss": 0.5,
                "max_memory_mib": 8000,
                "max_p99_ms": 5000,
                "max_latency_ratio": 50,
            },
            cases=[
                {"name": "calm", "row": calm, "expect": {"max": 0.3}},
                {"name": "c means little", "change": {"c": 0}, "same_within": 0.3, "max_failed": 0.01},
                {"name": "more a", "row": calm, "change": {"a": {"add": 3}}, "direction": "not_lower"},
            ],
        )
        assert result["passed"]
        json.dumps(result, allow_nan=False)
        assert result["clusters"] == result["rows"] == 3000
        assert result["differences"][0]["method"].startswith("exact McNemar")
        assert {row["what"] for row in result["missing"]} == {"a", "b", "c", "10% of all values"}
        assert all(row["refused"] is None for row in result["missing"])
        assert [case["passed"] for case in result["cases"]] == [True] * 3
        assert result["fairness"][0]["estimate"] < 0.2
        assert result["champion_latency"]["p95_ms"] > 0 and result["latency"]["memory_mib"] > 50

    @pytest.mark.parametrize("kind", ["list", "text", "json", "parquet"])
    def test_a_failed_case_is_named_wherever_it_came_from(self, gate, tmp_path, kind):
        row = {"a": -2.0, "b": 0.0, "c": 0.0}
        cases: object = [{"name": "calm day", "row": row, "expect": {"min": 0.9}}]
        if kind == "json":
            (tmp_path / "cases.json").write_text(json.dumps(cases))
            cases = str(tmp_path / "cases.json")
        elif kind == "parquet":
            pd.DataFrame([{"name": "calm day", "expect_min": 0.9, **row}]).to_parquet(tmp_path / "cases.parquet")
            cases = str(tmp_path / "cases.parquet")
        elif kind == "text":
            cases = str(cases)
        with pytest.raises(AirflowFailException, match=r"does not pass: case calm day: 0\.\d+; required: 0.9 to 1\."):
            gate(cases=cases)

    def test_only_the_window_counts(self, gate):
        result = gate(window_start="2013-04-03", window_end="2013-04-09", policy=GatePolicy(min_clusters=6))
        rows = pd.read_parquet(result["predictions_uri"])
        assert rows["event_timestamp"].min() >= pd.Timestamp("2013-04-03", tz="UTC")
        assert rows["event_timestamp"].max() < pd.Timestamp("2013-04-09", tz="UTC")
        assert result["clusters"] == 6

    def test_an_empty_window_does_not_pass(self, gate):
        with pytest.raises(AirflowFailException, match="rows: 0; required: at least 500"):
            gate(window_start="2014-04-03", window_end="2014-04-09")
        with pytest.raises(AirflowFailException, match="rows: 0"):
            gate(window_start="2014-04-03", window_end="2014-04-09", champion_uri="", measure_latency=True)

    def test_unlabelled_rows_are_left_out_and_counted(self, gate, mlflow_models, tmp_path):
        frame = pd.read_parquet(mlflow_models.data)
        frame["late"] = frame["late"].astype("float64").mask(frame.index < 100)
        frame.to_parquet(tmp_path / "part.parquet")
        result = gate(data_uri=str(tmp_path / "part.parquet"))
        assert (result["unlabelled"], result["rows"]) == (100, 2900)

    def test_late_labels_do_not_pass(self, gate, mlflow_models, tmp_path):
        frame = pd.read_parquet(mlflow_models.data)
        frame["late"] = frame["late"].astype("float64").mask(frame.index < 1000)
        frame.to_parquet(tmp_path / "part.parquet")
        with pytest.raises(AirflowFailException, match=r"labelled: 66.7%; required: at least 80%"):
            gate(data_uri=str(tmp_path / "part.parquet"))

    def test_rows_without_a_time_are_refused(self, gate, mlflow_models, tmp_path):
        frame = pd.read_parquet(mlflow_models.data)
        frame.loc[:2, "event_timestamp"] = pd.NaT
        frame.to_parquet(tmp_path / "part.parquet")
        with pytest.raises(AirflowFailException, match=r"3 rows of .* have no event_timestamp"):
            gate(data_uri=str(tmp_path / "part.parquet"))

    def test_the_registry_names_the_champion(self, gate, champion):
        for named in ({}, {"champion_version": "1"}):
            result = gate(champion_uri=None, model_name="late", **named)
            assert (result["champion_version"], result["champion_uri"]) == ("1", "models:/late/1")
            assert not result["first_model"]

    def test_a_first_model_needs_the_registry_to_agree(self, gate):
        assert gate(champion_uri=None, model_name="late", champion_version="")["first_model"]
        assert gate(champion_uri="")["first_model"]

    def test_a_lost_champion_is_not_a_first_model(self, gate, champion):
        for blank in ({"champion_version": ""}, {"champion_version": "None"}, {"champion_uri": ""}):
            with pytest.raises(AirflowFailException, match="given as none, but the registry has version 1"):
                gate(**({"champion_uri": None, "model_name": "late"} | blank))
        for unknown in (None, "None"):
            with pytest.raises(AirflowFailException, match="no champion, or a lost one"):
                gate(champion_uri=unknown)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"challenger_uri": "None"}, "training left no model"),
            ({"challenger_uri": "/nowhere"}, "no model folder"),
            ({"data_uri": "/nowhere.parquet"}, "no data at /nowhere.parquet"),
            ({"label_column": "delay"}, r"lacks \['delay'\]"),
            ({"slice_columns": "['carrier']"}, r"slice columns \['carrier'\]"),
            ({"cluster": "week"}, "cluster column 'week'"),
            ({"policy": {"alpha": 2}}, "alpha is 2"),
            ({"on_fail": "ignore"}, "on_fail is 'ignore'"),
            ({"window_start": "2013-04-03"}, "only one end of the window"),
            ({"cases": "/nowhere.json"}, "no cases at /nowhere.json"),
            ({"cases": [{"name": "storm"}]}, "the case 'storm': says nothing"),
            (
                {"policy": {"fairness": {"column": "sex", "metrics": {"equalized_odds_ratio": 0.8}}}},
                r"fairness columns",
            ),
            ({"policy": {"metric": "no.such:metric"}}, "cannot be imported"),
            ({"fail_task_ids": ["mourn"]}, "need on_fail='branch'"),
        ],
    )
    def test_bad_input_never_passes(self, gate, changes, message):
        with pytest.raises(AirflowFailException, match=message):
            gate(**changes)

    def test_a_model_that_breaks_in_a_fresh_process_does_not_pass(self, gate, mlflow_models, monkeypatch):
        monkeypatch.setenv("PYTHONOPTIMIZE", "x")
        monkeypatch.setenv("PYTHONHOME", "/nowhere")
        with pytest.raises(AirflowFailException, match="fails in a fresh process"):
            gate(measure_latency=True)


class TestScore:
    @pytest.fixture
    def run(self, mlflow_uri, mlflow_models, task_context, tmp_path):
        def run(models, **changes):
            arguments = {
                "models": models,
                "data_uri": mlflow_models.data,
                "label_column": "late",
                "predictions_uri": str(tmp_path / "predictions.parquet"),
                "tracking_uri": mlflow_uri,
            } | changes
            return ModelScoreOperator(task_id="score", **arguments).execute(task_context("score"))

        return run

    def test_champion_and_frozen_are_put_on_record_once(self, run, champion, mlflow_hook, mlflow_models):
        models = {"champion": "models:/late@champion", "frozen": mlflow_models.good}
        result = run(models)
        assert result["models"]["champion"]["version"] == "1"
        assert result["models"]["frozen"]["auc"] > result["models"]["champion"]["auc"]
        assert run(models)["run_id"] == result["run_id"]
        history = mlflow_hook.client.get_metric_history(result["run_id"], "champion_auc")
        assert [(point.step, point.value) for point in history] == [(20130401, result["models"]["champion"]["auc"])]
        tags = mlflow_hook.client.get_run(result["run_id"]).data.tags
        assert tags["mlops.window_start"].startswith("2013-04-01")
        assert tags["mlops.version.champion"] == "1"
        rows = pd.read_parquet(result["predictions_uri"])
        assert list(rows.columns) == ["event_timestamp", "label", "champion", "frozen"]
        json.dumps(result, allow_nan=False)

    def test_without_models_there_is_still_a_result(self, run):
        result = run({"champion": "models:/late@champion", "frozen": "", "other": "None"})
        assert result["models"] == {"champion": None, "frozen": None, "other": None}
        assert (result["rows"], result["run_id"]) == (3000, None)
        assert list(pd.read_parquet(result["predictions_uri"]).columns) == ["event_timestamp", "label"]

    def test_rows_without_a_label_are_predicted_and_not_scored(self, run, mlflow_models, tmp_path):
        """The drift sensor has to see how many labels are still out."""
        frame = pd.read_parquet(mlflow_models.data)
        frame["late"] = frame["late"].astype("float64").mask(frame.index < 1000)
        frame.to_parquet(tmp_path / "part.parquet")
        result = run({"champion": mlflow_models.good}, data_uri=str(tmp_path / "part.parquet"))
        assert (result["rows"], result["unlabelled"], result["models"]["champion"]["rows"]) == (2000, 1000, 2000)
        rows = pd.read_parquet(result["predictions_uri"])
        assert (len(rows), rows["label"].isna().sum(), rows["champion"].isna().sum()) == (3000, 1000, 0)
        known = rows[rows["label"].notna()]
        assert score(known["label"].astype(int), known["champion"])["auc"] == result["models"]["champion"]["auc"]

    def test_a_label_that_is_none_is_named_without_any_model(self, run, mlflow_models, tmp_path):
        frame = pd.read_parquet(mlflow_models.data)
        frame.assign(late=frame["late"] * 2).to_parquet(tmp_path / "twice.parquet")
        with pytest.raises(AirflowFailException, match="neither 0 nor 1"):
            run({"champion": ""}, data_uri=str(tmp_path / "twice.parquet"))

    def test_models_may_be_text_as_templates_render_them(self, run, mlflow_models):
        assert run(str({"champion": mlflow_models.good}))["models"]["champion"]["rows"] == 3000

    def test_an_alias_never_set_has_to_be_declared(self, run, champion):
        models = {"frozen": "models:/late@frozen"}
        with pytest.raises(AirflowFailException, match="no alias 'frozen'"):
            run(models)
        assert run(models, optional=["frozen"])["models"] == {"frozen": None}

    def test_no_labels_is_no_score(self, run, mlflow_models, tmp_path):
        frame = pd.read_parquet(mlflow_models.data)
        frame.assign(late=np.nan).to_parquet(tmp_path / "early.parquet")
        with pytest.raises(AirflowFailException, match="no labelled rows"):
            run({"champion": mlflow_models.good}, data_uri=str(tmp_path / "early.parquet"))
