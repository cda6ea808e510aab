from __future__ import annotations

import filecmp
import json
import os
import shutil
import threading

import numpy as np
import pandas as pd
import pytest
import yaml
from airflow.sdk import Asset
from airflow.sdk.exceptions import AirflowFailException
from sklearn.metrics import roc_auc_score

from airflow_mlops import storage
from airflow_mlops.drift import LossReference, Profile
from airflow_mlops.drift.performance import CalibratedEstimate
from airflow_mlops.exceptions import InvalidInputError, RegistryError
from airflow_mlops.hooks.mlflow import MlflowHook
from airflow_mlops.operators.mlflow import MlflowPromoteOperator, MlflowRegisterOperator, MlflowRollbackOperator


@pytest.fixture
def register(mlflow_uri, mlflow_models, task_context):
    """``register(key, **changes)`` runs a fresh operator for the training ``key``."""

    def run(key="run-a", **changes):
        training = {"run_key": key, "model_uri": mlflow_models.good, "metrics": {"auc": 0.8, "bad": float("nan")}}
        arguments = {"model_name": "late", "training": training, "tracking_uri": mlflow_uri} | changes
        return MlflowRegisterOperator(task_id="register", **arguments).execute(task_context("register"))

    return run


@pytest.fixture
def promote(mlflow_uri, task_context):
    def run(version, expected, **changes):
        arguments = {"model_name": "late", "tracking_uri": mlflow_uri} | changes
        operator = MlflowPromoteOperator(task_id="promote", version=version, expected_version=expected, **arguments)
        return operator.execute(task_context("promote"))

    return run


@pytest.fixture
def rollback(mlflow_uri, task_context):
    def run(run_id="run-1", **changes):
        operator = MlflowRollbackOperator(task_id="rollback", model_name="late", tracking_uri=mlflow_uri, **changes)
        return operator.execute(task_context("rollback", run_id))

    return run


def alias(hook, name="champion"):
    found = hook.version_by_alias("late", name, missing_ok=True)
    return None if found is None else str(found.version)


class TestRegister:
    def test_a_version_carries_its_papers(self, register, mlflow_hook, mlflow_models, tmp_path):
        predictions = pd.read_parquet(mlflow_models.data).rename(columns={"late": "label"})
        chances = 0.1 + 0.6 * np.random.default_rng(3).random(len(predictions))
        predictions["challenger"] = np.where(predictions["label"] == 1, chances**0.8, chances)
        predictions.to_parquet(tmp_path / "predictions.parquet")
        (tmp_path / "report.html").write_text("<p>fine")
        gate = {
            "passed": True,
            "predictions_uri": str(tmp_path / "predictions.parquet"),
            "report_uri": str(tmp_path / "report.html"),
            "metrics": {"challenger": {"auc": 0.77}, "champion": None},
        }
        window = {"start": "2013-01-01", "end": "2013-04-01"}
        result = register(
            training_set={"uri": mlflow_models.train, "features": mlflow_models.features, "window": window},
            gate=gate,
            snapshot={"md5": "abc.dir"},
            parameters={"depth": 3},
            tags={"team": "ops"},
        )
        assert result["model_uri"] == "models:/late/1"
        assert result["created"]
        version = mlflow_hook.version("late", "1")
        assert version.tags["mlops.run_key"] == "run-a"
        assert version.tags["mlops.window_end"] == "2013-04-01"
        assert version.tags["mlops.dataset_md5"] == "abc.dir"
        assert version.tags["mlops.gate"] == "passed"
        assert version.tags["team"] == "ops"
        profile = Profile.from_json(storage.read_json(version.tags["mlops.profile_uri"]))
        assert set(profile.columns) == set(mlflow_models.features)
        LossReference.from_json(storage.read_json(version.tags["mlops.loss_reference_uri"]))
        estimator = CalibratedEstimate.from_json(storage.read_json(version.tags["mlops.performance_uri"]))
        held_out = pd.read_parquet(tmp_path / "predictions.parquet")
        assert estimator.estimate(held_out["challenger"]).metrics["auc"].reference == pytest.approx(
            roc_auc_score(held_out["label"], held_out["challenger"])
        )
        run = mlflow_hook.client.get_run(result["run_id"])
        assert run.info.status == "FINISHED"
        assert run.data.metrics == {"auc": 0.8, "gate_challenger_auc": 0.77}
        assert run.data.params == {"depth": "3"}
        dataset = run.inputs.dataset_inputs[0]
        assert json.loads(dataset.dataset.source) == {"uri": mlflow_models.train}
        assert (dataset.dataset.source_type, dataset.dataset.digest) == ("local", profile.digest[:32])
        assert json.loads(dataset.dataset.profile) == {"num_rows": 4000, "num_elements": 4000 * 6}
        columns = {c["name"]: c["type"] for c in json.loads(dataset.dataset.schema)["mlflow_colspec"]}
        assert columns["a"] == "double" and columns["origin"] == "string" and columns["event_timestamp"] == "datetime"
        assert version.description == "Training run-a for 2013-01-01 to 2013-04-01 on 4,000 rows. Gate passed."
        assert {tag.key: tag.value for tag in dataset.tags}["dvc_md5"] == "abc.dir"
        assert {file.path for file in mlflow_hook.client.list_artifacts(result["run_id"])} >= {"model", "gate"}
        frame = pd.read_parquet(mlflow_models.data)
        served = mlflow_hook.predict_proba("models:/late/1", frame)
        assert (served == mlflow_hook.predict_proba(mlflow_models.good, frame)).all()
        assert mlflow_hook.load("models:/late/1").metadata.signature is not None

    def test_an_input_example_lies_beside_the_model_that_has_none(self, register, mlflow_hook, mlflow_models):
        result = register(training_set=mlflow_models.train, example_rows=3)
        tags = mlflow_hook.version("late", "1").tags
        shown = storage.read_json(tags["mlops.input_example_uri"])
        rows = pd.read_parquet(mlflow_models.train)[mlflow_models.features].head(3)
        assert shown["columns"] == mlflow_models.features
        assert np.array(shown["data"]) == pytest.approx(rows.to_numpy(), rel=1e-12)
        folder = tags["mlops.input_example_uri"].rpartition("/")[0]
        serving = storage.read_json(f"{folder}/serving_input_example.json")
        served = mlflow_hook.predict_proba(mlflow_models.good, pd.DataFrame(**serving["dataframe_split"]))
        assert served == pytest.approx(mlflow_hook.predict_proba(mlflow_models.good, rows))
        # The model's own bytes are those that were judged.
        stored = mlflow_hook.model_dir(result["model_uri"])
        comparison = filecmp.cmpfiles(mlflow_models.good, stored, os.listdir(mlflow_models.good), shallow=False)
        assert comparison[1:] == ([], []) and sorted(os.listdir(stored)) == sorted(os.listdir(mlflow_models.good))

    def test_rows_of_the_training_set_can_be_kept_out_of_the_registry(self, register, mlflow_hook, mlflow_models):
        result = register(training_set=mlflow_models.train, example_rows=0)
        assert "mlops.input_example_uri" not in mlflow_hook.version("late", "1").tags
        assert "input_example" not in {f.path for f in mlflow_hook.client.list_artifacts(result["run_id"])}

    def test_a_model_s_own_example_is_the_example(self, register, mlflow_hook, mlflow_models, tmp_path):
        import mlflow
        import xgboost

        frame = pd.read_parquet(mlflow_models.train)[mlflow_models.features]
        booster = xgboost.Booster(model_file=f"{mlflow_models.good}/model.ubj")
        options = {"pip_requirements": ["xgboost"], "model_format": "ubj", "input_example": frame.head(2)}
        mlflow.xgboost.save_model(booster, str(tmp_path / "m"), **options)
        register(model_uri=str(tmp_path / "m"), training_set=mlflow_models.train)
        uri = mlflow_hook.version("late", "1").tags["mlops.input_example_uri"]
        assert uri.endswith("/model/input_example.json") and storage.exists(uri)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: m.pop("signature"), "has no signature, so nobody can tell its inputs"),
            (lambda m: m["signature"].update(inputs=None), "has no signature"),
            (lambda m: m["flavors"].pop("python_function"), r"has no python_function \(flavours: \['xgboost'\]\)"),
            (
                lambda m: m["flavors"]["python_function"].update(loader_module="mlflow.caffe"),
                "flavour is unknown here: there is no module 'mlflow.caffe'",
            ),
            (lambda m: m.update(flavors=None), r"has no python_function \(flavours: none\)"),
            (lambda m: m["signature"].update(inputs=None, outputs=None), "the file MLmodel of .* cannot be read"),
        ],
    )
    def test_a_model_that_others_could_not_use_is_refused(
        self, register, mlflow_hook, mlflow_models, tmp_path, change, message
    ):
        shutil.copytree(mlflow_models.good, tmp_path / "m")
        described = yaml.safe_load((tmp_path / "m/MLmodel").read_text())
        change(described)
        (tmp_path / "m/MLmodel").write_text(yaml.safe_dump(described))
        with pytest.raises(AirflowFailException, match=message):
            register(model_uri=str(tmp_path / "m"))
        assert mlflow_hook.registered_model("late") is None

    def test_a_signature_can_be_done_without(self, register, mlflow_models, tmp_path):
        shutil.copytree(mlflow_models.good, tmp_path / "m")
        described = yaml.safe_load((tmp_path / "m/MLmodel").read_text())
        del described["signature"]
        (tmp_path / "m/MLmodel").write_text(yaml.safe_dump(described))
        data = {"training_set": mlflow_models.train, "features": ["a"]}
        assert register(model_uri=str(tmp_path / "m"), require_signature=False, **data)["created"]

    def test_a_description_of_one_s_own_and_the_data_s_own_digest(self, register, mlflow_hook, mlflow_models):
        result = register(training_set={"uri": mlflow_models.train, "sha256": "5" * 64}, description="for June")
        assert mlflow_hook.version("late", "1").description == "for June"
        dataset = mlflow_hook.client.get_run(result["run_id"]).inputs.dataset_inputs[0].dataset
        assert dataset.digest == "5" * 32

    def test_a_hold_out_too_short_for_an_estimator_costs_only_the_estimator(
        self, register, mlflow_hook, mlflow_models, tmp_path, capsys
    ):
        predictions = pd.read_parquet(mlflow_models.data).rename(columns={"late": "label"}).iloc[::10]
        predictions.assign(challenger=0.3).to_parquet(tmp_path / "predictions.parquet")
        register(gate={"passed": True, "predictions_uri": str(tmp_path / "predictions.parquet")})
        tags = mlflow_hook.version("late", "1").tags
        assert "mlops.loss_reference_uri" in tags and "mlops.performance_uri" not in tags
        assert "chunks need at least 500" in "".join(capsys.readouterr())

    def test_again_is_the_same_version(self, register, mlflow_hook):
        first, again, other = register(), register(), register("run-b")
        assert (again["version"], again["created"], again["run_id"]) == ("1", False, first["run_id"])
        assert other["version"] == "2"
        assert len(mlflow_hook.client.search_model_versions("name='late'")) == 2

    @pytest.mark.parametrize("dies_in", ["create_model_version", "log_artifacts", "set_registered_model_alias"])
    def test_a_try_that_died_is_taken_up(self, register, mlflow_hook, monkeypatch, dies_in):
        from mlflow import MlflowClient

        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, dies_in, lambda *_, **__: (_ for _ in ()).throw(SystemExit))
            with pytest.raises(SystemExit):
                register()
        result = register()
        assert result["version"] == "1"
        assert len(mlflow_hook.client.search_model_versions("name='late'")) == 1
        assert len(mlflow_hook.client.search_runs([mlflow_hook.experiment_id("late")])) == 1
        assert alias(mlflow_hook, "challenger") == "1"

    def test_two_tries_at_once_make_one_version(self, register, mlflow_hook, monkeypatch):
        # Both look for a known version before either has made one.
        barrier, found = threading.Barrier(2), MlflowHook.versions_tagged
        waited = threading.local()

        def together(self, *arguments):
            answer = found(self, *arguments)
            if not getattr(waited, "done", False):
                waited.done = True
                barrier.wait(30)
            return answer

        monkeypatch.setattr(MlflowHook, "versions_tagged", together)
        results = []
        threads = [threading.Thread(target=lambda: results.append(register())) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [result["version"] for result in results] == ["1", "1"]
        assert sorted(result["created"] for result in results) == [False, True]
        assert len(mlflow_hook.client.search_model_versions("name='late'")) == 1

    def test_an_old_training_does_not_take_the_alias_back(self, register, mlflow_hook):
        register("run-a"), register("run-b"), register("run-a")
        assert alias(mlflow_hook, "challenger") == "2"

    def test_evidence_can_be_kept_elsewhere(self, register, mlflow_hook, mlflow_models, tmp_path):
        register(training_set=mlflow_models.train, features="['a']", evidence_uri=str(tmp_path / "papers"))
        uri = mlflow_hook.version("late", "1").tags["mlops.profile_uri"]
        assert uri == str(tmp_path / "papers/run-a/profile.json")
        assert set(Profile.from_json(storage.read_json(uri)).columns) == {"a"}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"training": {"model_uri": None, "run_key": "k"}}, "saves no MLflow model"),
            ({"gate": {"passed": False, "reasons": ["auc too low"]}}, "did not pass: auc too low"),
            ({"gate": {"predictions_uri": "x"}}, "did not pass: no verdict"),
            ({"gate": "yes"}, "gate is 'yes'; expected a dict"),
            ({"model_uri": "/nowhere"}, "no model folder /nowhere"),
        ],
    )
    def test_what_cannot_be_registered(self, register, mlflow_hook, changes, message):
        with pytest.raises(AirflowFailException, match=message):
            register(**changes)
        assert mlflow_hook.registered_model("late") is None


class TestPromote:
    def test_the_champion_moves_and_the_previous_one_is_kept(self, register, promote, mlflow_hook):
        register("run-a"), register("run-b")
        assert promote("1", "")["previous"] is None
        assert promote("2", "1") == {
            "name": "late",
            "version": "2",
            "previous": "1",
            "alias": "champion",
            "changed": True,
        }
        assert (alias(mlflow_hook), alias(mlflow_hook, "previous_champion")) == ("2", "1")

    def test_again_changes_nothing(self, register, promote, mlflow_hook):
        register("run-a"), register("run-b")
        promote("1", ""), promote("2", "1")
        assert not promote("2", "1")["changed"]
        assert alias(mlflow_hook, "previous_champion") == "1"

    def test_a_try_that_died_before_its_record_is_finished(self, register, promote, mlflow_hook, monkeypatch):
        from mlflow import MlflowClient

        register("run-a")
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "set_registered_model_tag", lambda *_: (_ for _ in ()).throw(SystemExit))
            with pytest.raises(SystemExit):
                promote("1", "")
        promote("1", "")
        mlflow_hook.client.delete_registered_model_alias("late", "champion")
        with pytest.raises(RegistryError, match="had version 1 as 'champion'"):
            mlflow_hook.version_by_alias("late", "champion", missing_ok=True)

    @pytest.mark.parametrize("expected", ["", "None", "2"])
    def test_another_champion_than_expected(self, register, promote, mlflow_hook, expected):
        register("run-a"), register("run-b"), register("run-c")
        promote("1", "")
        with pytest.raises(AirflowFailException, match="is version 1, but this promotion was decided against"):
            promote("3", expected)
        assert alias(mlflow_hook) == "1"

    def test_two_at_once_end_with_one_winner(self, register, promote, mlflow_hook):
        register("run-a"), register("run-b"), register("run-c")
        promote("1", "")
        start, outcome = threading.Barrier(2), {}

        def run(version):
            start.wait()
            try:
                outcome[version] = promote(version, "1")["changed"]
            except AirflowFailException as error:
                outcome[version] = str(error)

        threads = [threading.Thread(target=run, args=[version]) for version in "23"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winner, loser = sorted(outcome, key=lambda version: outcome[version] is not True)
        assert outcome[winner] is True
        assert f"is version {winner}, but this promotion was decided against 1" in outcome[loser]
        assert (alias(mlflow_hook), alias(mlflow_hook, "previous_champion")) == (winner, "1")

    def test_a_version_that_does_not_exist(self, register, promote):
        register()
        with pytest.raises(AirflowFailException, match="no version 7"):
            promote("7", "")
        with pytest.raises(AirflowFailException, match="version is empty"):
            promote("None", "")

    def test_a_deleted_champion_stops_the_loop(self, register, promote, mlflow_hook):
        register("run-a"), register("run-b")
        promote("1", "")
        mlflow_hook.client.delete_model_version("late", "1")
        with pytest.raises(AirflowFailException, match="had version 1 as 'champion'"):
            promote("2", "")

    def test_the_asset_event_names_the_version(self, register, mlflow_uri, task_context):
        register()
        asset, context = Asset("model://late"), task_context("promote")
        arguments = {"model_name": "late", "version": "1", "expected_version": "", "tracking_uri": mlflow_uri}
        MlflowPromoteOperator(task_id="promote", outlets=[asset], **arguments).execute(context)
        assert context["outlet_events"][asset].extra["version"] == "1"


class TestRollback:
    @pytest.fixture(autouse=True)
    def two_champions(self, register, promote):
        register("run-a"), register("run-b")
        promote("1", ""), promote("2", "1")

    def test_the_previous_champion_serves_again(self, rollback, promote, mlflow_hook):
        assert rollback()["version"] == "1"
        assert (alias(mlflow_hook), alias(mlflow_hook, "previous_champion")) == ("1", None)
        with pytest.raises(AirflowFailException, match="version 2 was rolled back"):
            promote("2", "1")

    def test_a_retry_does_not_roll_forward(self, rollback, mlflow_hook):
        rollback()
        assert not rollback()["changed"]
        assert alias(mlflow_hook) == "1"

    @pytest.mark.parametrize("dies_in", ["set_registered_model_alias", "delete_registered_model_alias"])
    def test_a_try_that_died_is_finished(self, rollback, mlflow_hook, monkeypatch, dies_in):
        from mlflow import MlflowClient

        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, dies_in, lambda *_, **__: (_ for _ in ()).throw(SystemExit))
            with pytest.raises(SystemExit):
                rollback()
        rollback()
        assert (alias(mlflow_hook), alias(mlflow_hook, "previous_champion")) == ("1", None)

    def test_clearing_an_old_rollback_leaves_the_way_back_of_a_later_promotion(
        self, register, rollback, promote, mlflow_hook
    ):
        rollback()
        register("run-c")
        promote("3", "1")
        assert not rollback()["changed"]
        assert (alias(mlflow_hook), alias(mlflow_hook, "previous_champion")) == ("3", "1")

    def test_nothing_to_go_back_to(self, rollback):
        rollback("run-1")
        with pytest.raises(AirflowFailException, match="no 'previous_champion' to roll back to"):
            rollback("run-2")

    def test_only_from_the_version_that_was_meant(self, rollback, mlflow_hook):
        with pytest.raises(AirflowFailException, match="version 1 is not the champion"):
            rollback(version="1")
        assert alias(mlflow_hook) == "2"


class TestCanaryAlias:
    """What a rollout does to the alias, and when it does not begin."""

    @pytest.fixture
    def champion(self, register, mlflow_hook):
        from airflow_mlops.operators._canary import ChampionAlias

        for key in ("run-a", "run-b", "run-c"):
            register(key)
        mlflow_hook.client.set_registered_model_alias("late", "champion", "2")
        mlflow_hook.client.set_registered_model_alias("late", "previous_champion", "1")
        return ChampionAlias(mlflow_hook, "late", "champion", "previous_champion", version="3", expected="2")

    def test_a_challenger_taken_back_is_not_the_way_back(self, champion, mlflow_hook):
        champion.move()
        assert (alias(mlflow_hook), alias(mlflow_hook, "previous_champion")) == ("3", "2")
        champion.take_back()
        assert (alias(mlflow_hook), alias(mlflow_hook, "previous_champion")) == ("2", None)

    def test_what_was_rolled_back_gets_no_canary(self, champion, mlflow_hook):
        champion.check()
        mlflow_hook.client.set_model_version_tag("late", "3", "mlops.rolled_back", "by hand")
        with pytest.raises(InvalidInputError, match="late version 3 was rolled back; delete its tag"):
            champion.check()
