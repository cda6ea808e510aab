"""A gate and a promotion that wait for a person: real models, a real registry, Airflow's answers as it gives them."""

from __future__ import annotations

import datetime as dt
import json
import uuid

import pytest
from airflow.sdk import Asset
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException, TaskAwaitingInput
from support.required_actions import NO, NOBODY, SILENCE, YES, RequiredActions, Told

from airflow_mlops.assets import model_asset
from airflow_mlops.exceptions import ExternalSystemError
from airflow_mlops.operators.gate import ModelGateOperator
from airflow_mlops.operators.mlflow import MlflowPromoteOperator, MlflowRegisterOperator


@pytest.fixture
def airflow(monkeypatch):
    found = RequiredActions()
    monkeypatch.setattr("airflow.sdk.execution_time.task_runner.SUPERVISOR_COMMS", found, raising=False)
    return found


@pytest.fixture
def context(task_context):
    made = task_context("task")
    made["ti"].id = uuid.UUID(int=1)
    return made


def waits(operator, context):
    with pytest.raises(TaskAwaitingInput) as waiting:
        operator.execute(context)
    return waiting.value


def resumed(operator, waiting, event, context):
    """As a fresh process goes on, what it gets having been through a database."""
    kwargs = json.loads(json.dumps(waiting.kwargs))
    return operator.resume_execution(waiting.method_name, {**kwargs, "event": event}, context)


class TestGate:
    @pytest.fixture
    def gate(self, mlflow_uri, mlflow_models, tmp_path):
        def make(won=True, **changes):
            arms = (mlflow_models.good, mlflow_models.poor)
            arguments = {
                "challenger_uri": arms[not won],
                "champion_uri": arms[won],
                "data_uri": mlflow_models.data,
                "label_column": "late",
                "report_dir": str(tmp_path / "gate"),
                "measure_latency": False,
                "tracking_uri": mlflow_uri,
            }
            return ModelGateOperator(task_id="gate", **arguments | changes)

        return make

    def test_it_waits_and_goes_on_in_a_fresh_process(self, gate, context, airflow):
        told = Told()
        waiting = waits(gate(approval={"timeout": 60}, approval_notifiers=[told]), context)
        assert waiting.timeout == dt.timedelta(seconds=60) and told.times == 1
        (asked,) = airflow.sent
        assert "improvement in log_loss" in asked.body and "gate/report.html" in asked.body
        found = resumed(gate(approval={"timeout": 60}), waiting, YES, context)
        assert found["passed"] and found["approval"]["by"] == "ops" and found["rows"] == 3000

    @pytest.mark.parametrize(("on_fail", "error"), [("fail", AirflowFailException), ("skip", AirflowSkipException)])
    def test_a_rejection_ends_as_a_verdict_that_did_not_pass(self, gate, context, airflow, on_fail, error):
        operator = gate(approval=True, on_fail=on_fail)
        waiting = waits(operator, context)
        with pytest.raises(error, match="rejected by ops"):
            resumed(operator, waiting, NO, context)
        pushed = context["ti"].pushed["return_value"]
        assert pushed["passed"] is False and pushed["approval"]["user_id"] == "7"

    def test_silence_can_fail_what_would_be_skipped(self, gate, context, airflow):
        operator = gate(approval={"on_timeout": "fail"}, on_fail="skip")
        waiting = waits(operator, context)
        assert airflow.sent[0].defaults is None
        with pytest.raises(AirflowFailException, match="nobody approved it in time"):
            resumed(operator, waiting, NOBODY, context)
        with pytest.raises(AirflowFailException, match="could not be read"):
            resumed(operator, waiting, {"error": "what?", "error_type": "unknown"}, context)

    def test_a_person_can_overrule_but_silence_cannot_and_the_registry_says_who(
        self, gate, context, airflow, mlflow_uri, mlflow_hook, mlflow_models
    ):
        operator = gate(won=False, approval={"when": "failed", "on_timeout": "approve"})
        waiting = waits(operator, context)
        assert airflow.sent[0].defaults == ["Reject"] and "Overrule" in airflow.sent[0].subject
        result = resumed(operator, waiting, YES, context)
        assert result["passed"] and result["approval"]["overrode"]
        MlflowRegisterOperator(
            task_id="register", model_name="late", model_uri=mlflow_models.poor, gate=result, tracking_uri=mlflow_uri
        ).execute(context)
        tags = mlflow_hook.version("late", "1").tags
        assert (tags["mlops.gate"], tags["mlops.gate_approved_by"]) == ("overruled", "ops")
        assert tags["mlops.gate_approved_at"] == "2026-01-01"

    def test_nobody_is_asked_about_the_other_verdicts(self, gate, context):
        assert gate(approval={"when": "failed"}).execute(context)["passed"]
        with pytest.raises(AirflowFailException, match="improvement in log_loss"):
            gate(won=False, approval=True).execute(context)

    def test_a_question_whose_template_came_out_empty_is_not_left_out(self, gate, context):
        operator = gate(approval="{{ missing }}")
        operator.render_template_fields({"missing": None})
        with pytest.raises(AirflowFailException, match="approval is 'None' after templating"):
            operator.execute(context)

    def test_a_champion_in_doubt_is_not_judged_on_a_bad_approval(self, gate, context, tmp_path):
        with pytest.raises(AirflowFailException, match="on_timeout is 'pass'"):
            gate(approval={"on_timeout": "pass"}).execute(context)
        assert not (tmp_path / "gate").exists()


class TestPromotion:
    @pytest.fixture
    def promotion(self, mlflow_uri, mlflow_hook, mlflow_models, context):
        """Version 1 is champion of ``late``, version 2 a challenger; ``promotion(**changes)`` is a fresh operator."""
        gate = {"passed": True, "reasons": ["gain 0.2"], "metrics": {"challenger": {"auc": 0.9}}}
        for key in ("may", "june"):
            training = {"run_key": key, "model_uri": mlflow_models.good}
            MlflowRegisterOperator(
                task_id="register", model_name="late", training=training, gate=gate, tracking_uri=mlflow_uri
            ).execute(context)
        mlflow_hook.client.set_registered_model_alias("late", "champion", "1")

        def make(**changes):
            arguments = {"model_name": "late", "version": "2", "expected_version": "1", "tracking_uri": mlflow_uri}
            return MlflowPromoteOperator(task_id="promote", **arguments | {"approval": True} | changes)

        return make

    @pytest.fixture
    def champion(self, mlflow_hook):
        return lambda: str(mlflow_hook.version_by_alias("late", "champion").version)

    def test_nothing_moves_before_the_answer_and_then_everything(
        self, promotion, context, airflow, mlflow_hook, champion
    ):
        asset = model_asset("late")
        waiting = waits(promotion(), context)
        (asked,) = airflow.sent
        assert asked.subject == "Make version 2 of late the champion instead of version 1?"
        assert "Training june" in asked.body and "- gain 0.2" in asked.body and "| auc | 0.9 |" in asked.body
        assert champion() == "1" and waiting.timeout == dt.timedelta(days=1)
        result = resumed(promotion(outlets=[asset]), waiting, YES, context)
        assert champion() == "2" and result["changed"]
        assert result["approval"] == {"approved": True, "by": "ops", "user_id": "7", "at": "2026-01-01"}
        tags = mlflow_hook.version("late", "2").tags
        assert (tags["mlops.approved_by"], tags["mlops.approved_at"]) == ("ops", "2026-01-01")
        assert context["outlet_events"][asset].extra == result

    def test_again_nobody_is_asked_and_the_answer_is_known(self, promotion, context, airflow):
        resumed(promotion(), waits(promotion(), context), YES, context)
        again = promotion().execute(context)
        assert not again["changed"] and again["approval"]["by"] == "ops" and len(airflow.sent) == 1

    @pytest.mark.parametrize("dies_in", ["set_model_version_tag", "set_registered_model_alias"])
    def test_a_try_that_died_after_the_answer_asks_again(
        self, promotion, context, airflow, mlflow_hook, champion, monkeypatch, dies_in
    ):
        from mlflow import MlflowClient

        waiting = waits(promotion(), context)
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, dies_in, lambda *_, **__: (_ for _ in ()).throw(SystemExit))
            with pytest.raises(SystemExit):
                resumed(promotion(), waiting, YES, context)
        assert champion() == "1"
        resumed(promotion(), waits(promotion(), context), YES, context)
        assert champion() == "2" and len(airflow.sent) == 2

    @pytest.mark.parametrize(
        ("event", "changes", "error", "message"),
        [
            (NO, {}, AirflowFailException, "rejected by ops"),
            (NO, {"on_reject": "skip"}, AirflowSkipException, "rejected by ops"),
            (SILENCE, {"on_reject": "skip"}, AirflowSkipException, "rejected by a default"),
            (NOBODY, {"on_reject": "skip"}, AirflowFailException, "nobody answered in time"),
        ],
    )
    def test_without_a_yes_nothing_moves(self, promotion, context, airflow, champion, event, changes, error, message):
        waiting = waits(promotion(**changes), context)
        with pytest.raises(error, match=f"version 2 of late stays where it is: {message}"):
            resumed(promotion(**changes), waiting, event, context)
        pushed = context["ti"].pushed["return_value"]
        assert champion() == "1" and not pushed["changed"]

    def test_a_champion_that_moved_meanwhile_is_not_overwritten(
        self, promotion, context, airflow, mlflow_hook, champion, mlflow_models
    ):
        waiting = waits(promotion(), context)
        mlflow_hook.client.create_model_version("late", mlflow_models.good)
        mlflow_hook.client.set_registered_model_alias("late", "champion", "3")
        with pytest.raises(AirflowFailException, match="champion of late is version 3"):
            resumed(promotion(), waiting, YES, context)
        assert champion() == "3" and "mlops.approved_by" not in mlflow_hook.version("late", "2").tags
        # Nor is anybody asked what cannot be done.
        with pytest.raises(AirflowFailException, match="champion of late is version 3"):
            promotion().execute(context)
        assert len(airflow.sent) == 1

    def test_a_version_that_was_rolled_back_meanwhile_is_not_promoted(
        self, promotion, context, airflow, mlflow_hook, champion
    ):
        waiting = waits(promotion(), context)
        mlflow_hook.client.set_model_version_tag("late", "2", "mlops.rolled_back", "x")
        with pytest.raises(AirflowFailException, match="was rolled back"):
            resumed(promotion(), waiting, YES, context)
        assert champion() == "1"

    def test_what_was_asked_about_counts_when_templates_change(self, promotion, context, airflow, champion):
        waiting = waits(promotion(), context)
        resumed(promotion(version="1"), waiting, YES, context)
        assert champion() == "2"

    def test_a_verdict_that_is_lost_is_said(self, promotion, context, airflow, mlflow_hook):
        mlflow_hook.client.delete_model_version_tag("late", "2", "mlops.gate")
        waits(promotion(), context)
        assert "No gate has judged this version." in airflow.sent[0].body

    def test_a_verdict_that_cannot_be_read_is_said(self, promotion, context, airflow, mlflow_hook):
        import pathlib

        run = mlflow_hook.client.get_run(mlflow_hook.version("late", "2").run_id)
        pathlib.Path(run.info.artifact_uri.removeprefix("file://"), "gate/verdict.json").unlink()
        waits(promotion(), context)
        assert "The gate's verdict (passed) cannot be read" in airflow.sent[0].body

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"approval": {"when": "failed"}}, "a promotion always asks"),
            ({"approval": "None"}, "after templating"),
            ({"on_reject": "return"}, "on_reject is 'return'; expected 'fail' or 'skip'"),
        ],
    )
    def test_bad_input_names_the_fix(self, promotion, context, changes, message):
        with pytest.raises(AirflowFailException, match=message):
            promotion(**changes).execute(context)

    def test_a_registry_that_is_down_after_the_answer_is_worth_a_retry(self, promotion, context, airflow, monkeypatch):
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        waiting = waits(promotion(), context)
        with pytest.raises(ExternalSystemError, match=r"MLflow at http://127.0.0.1:9 answered with an error"):
            resumed(promotion(tracking_uri="http://127.0.0.1:9"), waiting, YES, context)


def test_both_dags_name_the_same_asset():
    asset = model_asset("flights delay")
    assert asset == model_asset("flights delay") != model_asset("flights delay", "challenger")
    assert (asset.name, asset.uri) == ("flights delay@champion", "mlflow://models/flights%20delay/champion")
    assert isinstance(asset, Asset) and asset.group == "mlflow_model"
    with pytest.raises(ValueError, match="an asset needs both"):
        model_asset("")
