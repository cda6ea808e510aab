from __future__ import annotations

import functools
import http.server
import json
import multiprocessing
import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from airflow_mlops.exceptions import (
    ConcurrentChangeError,
    DataError,
    ExternalSystemError,
    InvalidInputError,
    RegistryError,
)
from airflow_mlops.hooks.mlflow import MlflowHook


def connection(**fields) -> str:
    return json.dumps({"conn_type": "mlflow", **fields})


class TestUri:
    def test_argument_then_connection_then_environment(self, monkeypatch):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
        assert MlflowHook().tracking_uri == "http://environment"
        monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", connection(host="mlflow.local", port=5000, schema="https"))
        assert MlflowHook().tracking_uri == "https://mlflow.local:5000"
        monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", connection(extra={"tracking_uri": "sqlite:////x/y.db"}))
        assert MlflowHook().tracking_uri == "sqlite:////x/y.db"
        assert MlflowHook(tracking_uri="http://argument").tracking_uri == "http://argument"

    def test_nothing_names_one(self, monkeypatch):
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with pytest.raises(InvalidInputError, match="set it in the connection 'mlflow_default'"):
            _ = MlflowHook().tracking_uri

    def test_a_connection_asked_for_by_name_must_exist(self, monkeypatch):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
        with pytest.raises(InvalidInputError, match="no connection 'mine'"):
            _ = MlflowHook("mine").tracking_uri


@pytest.fixture
def server():
    """An HTTP server that answers nothing and remembers who asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("Authorization"))
            self.send_response(404)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield httpd.server_address[1], asked
        httpd.shutdown()


class TestCredentials:
    def test_reach_the_server_and_leave_no_trace(self, monkeypatch, server):
        port, asked = server
        fields = {"host": "127.0.0.1", "port": port, "login": "me", "password": "secret"}
        monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", connection(**fields))
        hook = MlflowHook()
        hook.test_connection()  # MLflow's plugins set variables of their own when first imported.
        before = dict(os.environ)
        good, message = hook.test_connection()
        assert not good
        assert asked
        assert asked[0].startswith("Basic ")
        assert "secret" not in message
        assert dict(os.environ) == before

    def test_are_not_sent_to_another_server(self, monkeypatch, server):
        port, asked = server
        fields = {"host": "mlflow.example", "login": "me", "password": "secret"}
        monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", connection(**fields))
        MlflowHook(tracking_uri=f"http://127.0.0.1:{port}").test_connection()
        assert asked
        assert set(asked) == {None}

    def test_environment_is_restored_after_an_error(self, monkeypatch):
        monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", connection(host="h", login="me", password="secret"))
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "other")
        with pytest.raises(ZeroDivisionError), MlflowHook().session():
            assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "secret"
            raise ZeroDivisionError
        assert os.environ["MLFLOW_TRACKING_USERNAME"] == "other"
        assert "MLFLOW_TRACKING_PASSWORD" not in os.environ


def test_connection_of_a_working_store(mlflow_hook):
    assert mlflow_hook.test_connection()[0]


def test_a_broken_server_is_worth_a_retry(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ExternalSystemError):
        MlflowHook(tracking_uri=f"http://127.0.0.1:{server[0]}").version_by_alias("late", "champion")


def _touch(uri: str) -> str:
    try:
        MlflowHook(tracking_uri=uri).ensure_store()
        MlflowHook(tracking_uri=uri).experiment_id("same")
    except Exception as error:
        return repr(error)
    return "ok"


def test_four_processes_may_meet_on_a_fresh_store(tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(_touch, [f"sqlite:///{tmp_path}/new/mlflow.db"] * 4) == ["ok"] * 4


class TestAlias:
    def register(self, hook, tmp_path, count=1):
        hook.client.create_registered_model("late")
        for _ in range(count):
            hook.client.create_model_version("late", str(tmp_path))

    def test_no_model_and_no_version_are_a_first_run(self, mlflow_hook):
        assert mlflow_hook.version_by_alias("late", "champion") is None
        mlflow_hook.client.create_registered_model("late")
        assert mlflow_hook.version_by_alias("late", "champion") is None

    def test_found(self, mlflow_hook, tmp_path):
        self.register(mlflow_hook, tmp_path, 2)
        mlflow_hook.client.set_registered_model_alias("late", "champion", "2")
        assert str(mlflow_hook.version_by_alias("late", "champion").version) == "2"

    def test_never_set(self, mlflow_hook, tmp_path):
        self.register(mlflow_hook, tmp_path)
        with pytest.raises(RegistryError, match=r"no alias 'champion'.*set_registered_model_alias"):
            mlflow_hook.version_by_alias("late", "champion")
        assert mlflow_hook.version_by_alias("late", "champion", missing_ok=True) is None

    def test_a_deleted_champion_is_no_first_run(self, mlflow_hook, tmp_path):
        self.register(mlflow_hook, tmp_path, 2)
        from airflow_mlops.hooks.mlflow import alias_tag

        mlflow_hook.client.set_registered_model_alias("late", "champion", "2")
        mlflow_hook.client.set_registered_model_tag("late", alias_tag("champion"), "2")
        mlflow_hook.client.delete_model_version("late", "2")
        with pytest.raises(RegistryError, match=r"had version 2 as 'champion'.*was deleted"):
            mlflow_hook.version_by_alias("late", "champion", missing_ok=True)

    def test_version_that_does_not_exist(self, mlflow_hook, tmp_path):
        self.register(mlflow_hook, tmp_path, 2)
        with pytest.raises(RegistryError, match=r"no version 9; it has \[1, 2\]"):
            mlflow_hook.version("late", "9")


class TestLease:
    def test_on_a_server_the_second_is_refused(self, mlflow_hook, monkeypatch):
        # The tag protocol of servers, on the same store.
        monkeypatch.setattr(MlflowHook, "_sqlite_path", None)
        monkeypatch.setattr("airflow_mlops.hooks.mlflow.LEASE_SETTLE_SECONDS", 0.1)
        mlflow_hook.client.create_registered_model("late")
        with mlflow_hook.lease("late"):
            with pytest.raises(ConcurrentChangeError, match="right now"), mlflow_hook.lease("late"):
                pytest.fail("two held the lease")
        with mlflow_hook.lease("late"):
            pass

    def test_of_two_at_once_one_wins(self, mlflow_hook, monkeypatch):
        monkeypatch.setattr(MlflowHook, "_sqlite_path", None)
        monkeypatch.setattr("airflow_mlops.hooks.mlflow.LEASE_SETTLE_SECONDS", 0.5)
        mlflow_hook.client.create_registered_model("late")
        start, outcome = threading.Barrier(2), []

        def promote():
            start.wait()
            try:
                with mlflow_hook.lease("late"):
                    outcome.append("held")
                    threading.Event().wait(1.0)
            except ConcurrentChangeError:
                outcome.append("refused")

        threads = [threading.Thread(target=promote) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcome) == ["held", "refused"]

    def test_of_two_first_writes_the_store_refuses_one(self, mlflow_hook, monkeypatch):
        monkeypatch.setattr(MlflowHook, "_sqlite_path", None)
        monkeypatch.setattr("airflow_mlops.hooks.mlflow.LEASE_SETTLE_SECONDS", 0.0)
        mlflow_hook.client.create_registered_model("late")
        write = mlflow_hook.client.set_registered_model_tag

        def refused(name, key, value, first):
            if first:
                write(name, key, f"other {time.time() + 60}")
            raise MlflowException("UNIQUE constraint failed")

        for first, error in ((False, ExternalSystemError), (True, ConcurrentChangeError)):
            monkeypatch.setattr(mlflow_hook.client, "set_registered_model_tag", functools.partial(refused, first=first))
            with pytest.raises(error), mlflow_hook.lease("late"):
                pytest.fail("nobody gave the lease")

    def test_one_left_behind_expires(self, mlflow_hook, monkeypatch):
        monkeypatch.setattr(MlflowHook, "_sqlite_path", None)
        monkeypatch.setattr("airflow_mlops.hooks.mlflow.LEASE_SETTLE_SECONDS", 0.1)
        mlflow_hook.client.create_registered_model("late")
        mlflow_hook.client.set_registered_model_tag("late", "mlops.lease", "dead 1000.0")
        with mlflow_hook.lease("late"):
            pass


class TestModels:
    def test_probabilities_are_the_booster_s_own(self, mlflow_hook, mlflow_models):
        import xgboost

        frame = pd.read_parquet(mlflow_models.data)
        found = mlflow_hook.predict_proba(mlflow_models.good, frame, mlflow_models.features)
        booster = xgboost.Booster(model_file=f"{mlflow_models.good}/model.ubj")
        assert found == pytest.approx(booster.predict(xgboost.DMatrix(frame[mlflow_models.features])))
        assert found.dtype == np.float64

    def test_missing_values_and_integer_columns_are_fine(self, mlflow_hook, mlflow_models):
        frame = pd.DataFrame({"a": [1, 2], "b": [np.nan, 0.5], "c": [0, 1]})
        assert mlflow_hook.predict_proba(mlflow_models.good, frame).shape == (2,)

    @pytest.mark.parametrize(
        ("change", "message"),
        [({"b": None}, r"lacks \['b'\]"), ({"b": np.inf}, r"\['b'\] hold infinite"), ({"b": "x"}, "must be numeric")],
    )
    def test_frames_that_do_not_fit(self, mlflow_hook, mlflow_models, change, message):
        frame = pd.DataFrame({"a": [1.0], "b": [1.0], "c": [1.0]}).assign(**change)
        frame = frame.drop(columns="b") if change == {"b": None} else frame
        with pytest.raises(DataError, match=message):
            mlflow_hook.predict_proba(mlflow_models.good, frame)

    def test_a_classifier_answers_with_probabilities(self, mlflow_hook, mlflow_models, tmp_path):
        import mlflow
        import xgboost

        frame = pd.read_parquet(mlflow_models.train)
        model = xgboost.XGBClassifier(n_estimators=3, n_jobs=1).fit(frame[["a"]], frame["late"])
        mlflow.xgboost.save_model(model, str(tmp_path / "m"), pip_requirements=["xgboost"], model_format="ubj")
        found = mlflow_hook.predict_proba(str(tmp_path / "m"), frame, ["a"])
        assert found == pytest.approx(model.predict_proba(frame[["a"]])[:, 1])
        with pytest.raises(InvalidInputError, match="give `features`"):
            mlflow_hook.predict_proba(str(tmp_path / "m"), frame)

    def test_a_model_that_answers_with_margins_is_refused(self, mlflow_hook, mlflow_models, tmp_path):
        import mlflow
        import xgboost

        frame = pd.read_parquet(mlflow_models.train)
        data = xgboost.DMatrix(frame[["a"]], label=frame["late"])
        model = xgboost.train({"objective": "binary:logitraw", "nthread": 1}, data, 5)
        mlflow.xgboost.save_model(model, str(tmp_path / "m"), pip_requirements=["xgboost"], model_format="ubj")
        with pytest.raises(InvalidInputError, match="are not probabilities"):
            mlflow_hook.predict_proba(str(tmp_path / "m"), frame, ["a"])

    def test_pickles_are_never_loaded(self, mlflow_hook, mlflow_models, tmp_path):
        class Gotcha:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "ran"),))

        for number, name in enumerate(["model.pkl", "extra.bin"]):
            folder = tmp_path / f"m{number}"
            shutil.copytree(mlflow_models.good, folder)
            (folder / name).write_bytes(pickle.dumps(Gotcha()))
            with pytest.raises(InvalidInputError, match=f"is pickled.*{name}"):
                mlflow_hook.load(str(folder))
        assert not (tmp_path / "ran").exists()

    def test_a_flavour_that_deserialises_code_is_refused(self, mlflow_hook, tmp_path):
        # Its file is a zip with a pickle inside, which only MLflow itself knows.
        torch = pytest.importorskip("torch", reason="needs PyTorch")
        import mlflow

        options = {"serialization_format": "pickle", "pip_requirements": ["torch"]}
        mlflow.pytorch.save_model(torch.nn.Linear(1, 1), str(tmp_path / "m"), **options)
        before = dict(os.environ)
        with pytest.raises(InvalidInputError, match=r"is pickled.*Save the model in a format that is only data"):
            mlflow_hook.load(str(tmp_path / "m"))
        assert dict(os.environ) == before

    def test_folders_without_a_model(self, mlflow_hook, tmp_path):
        with pytest.raises(InvalidInputError, match="no file MLmodel"):
            mlflow_hook.load(str(tmp_path))
        with pytest.raises(InvalidInputError, match="no model folder"):
            mlflow_hook.load(str(tmp_path / "gone"))

    def test_every_kind_of_uri_leads_to_the_same_model(self, mlflow_hook, mlflow_models):
        run = mlflow_hook.run_for_key("flights", "k")
        mlflow_hook.client.log_artifacts(run.info.run_id, mlflow_models.good, "model")
        mlflow_hook.client.create_registered_model("late")
        source = f"{run.info.artifact_uri}/model"
        mlflow_hook.client.create_model_version("late", source, run.info.run_id)
        mlflow_hook.client.set_registered_model_alias("late", "champion", "1")
        for uri in ("models:/late/1", "models:/late@champion", f"runs:/{run.info.run_id}/model", f"file://{source}"):
            assert Path(mlflow_hook.model_dir(uri)) == Path(source)
        with pytest.raises(RegistryError, match="has no version 2"):
            mlflow_hook.model_dir("models:/late/2")


class TestRuns:
    def test_one_run_for_a_key(self, mlflow_hook):
        first = mlflow_hook.run_for_key("flights", "k", tags={"x": "y"})
        assert mlflow_hook.run_for_key("flights", "k").info.run_id == first.info.run_id
        assert mlflow_hook.run_for_key("flights", "other").info.run_id != first.info.run_id
        assert first.data.tags["x"] == "y"

    def test_artifacts_stay_beside_the_database_wherever_a_task_runs(self, mlflow_hook, tmp_path, monkeypatch):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert str(tmp_path / "mlartifacts") in mlflow_hook.run_for_key("flights", "k").info.artifact_uri

    def test_a_deleted_experiment_is_named(self, mlflow_hook):
        mlflow_hook.client.delete_experiment(mlflow_hook.experiment_id("flights"))
        with pytest.raises(RegistryError, match="mlflow experiments restore"):
            mlflow_hook.experiment_id("flights")

    def test_a_quote_cannot_break_out_of_a_search(self, mlflow_hook):
        with pytest.raises(InvalidInputError, match="holds a quote"):
            mlflow_hook.versions_tagged("late", "k", "x' OR name LIKE '%")
