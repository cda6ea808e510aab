"""Signed at registration, verified before gate, canary and load: what an attacker may do to a version is named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec

from airflow_mlops import storage
from airflow_mlops.exceptions import InvalidInputError, RegistryError
from airflow_mlops.hooks._rollout import verify_signatures, with_digests
from airflow_mlops.hooks.mlflow import MlflowHook
from airflow_mlops.hooks.signing import SigningHook
from airflow_mlops.model_files.digest import model_digest
from airflow_mlops.operators.canary import CanaryPromoteOperator
from airflow_mlops.operators.gate import ModelGateOperator, ModelScoreOperator
from airflow_mlops.operators.mlflow import MlflowPromoteOperator, MlflowRegisterOperator, MlflowRollbackOperator
from airflow_mlops.operators.rollback import RollbackOperator

SIGNER, OTHER = "signer", "other_signer"


def new_key() -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()).decode()


@pytest.fixture(autouse=True)
def signers(monkeypatch):
    """Connections with two keys; a private key in one line, as a form makes of it."""
    for name in (SIGNER, OTHER):
        value = {"conn_type": "model_signing", "password": new_key().replace("\n", "\\n")}
        monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}", json.dumps(value))


@pytest.fixture
def register(mlflow_uri, mlflow_models, task_context):
    def run(key="run-a", uri=None, **changes):
        training = {"run_key": key, "model_uri": uri or mlflow_models.good}
        arguments = {"model_name": "late", "training": training, "tracking_uri": mlflow_uri} | changes
        return MlflowRegisterOperator(task_id="register", **arguments).execute(task_context("register"))

    return run


@pytest.fixture
def signed(register):
    return register(signing_conn_id=SIGNER)


@pytest.fixture
def trusting(mlflow_uri):
    return MlflowHook(tracking_uri=mlflow_uri, signing_conn_id=SIGNER)


@pytest.fixture
def frame(mlflow_models):
    return pd.read_parquet(mlflow_models.data).head(50)


def files_of(hook, version="1", name="late") -> Path:
    return Path(hook.model_dir(f"models:/{name}/{version}"))


class TestRegistration:
    def test_a_version_is_signed_once(self, signed, register, mlflow_hook, mlflow_models):
        tags = mlflow_hook.version("late", "1").tags
        assert tags["mlops.model_digest"] == model_digest(mlflow_models.good) == model_digest(files_of(mlflow_hook))
        assert tags["mlops.signed_by"].startswith("key:sha256:")
        assert tags["mlops.model_formats"] == "xgboost-ubjson"
        content = storage.read_bytes(tags["mlops.signature_uri"])
        found = SigningHook(SIGNER).verify(files_of(mlflow_hook), content, "late", "run-a")
        assert (found.digest, found.signed_by) == (tags["mlops.model_digest"], tags["mlops.signed_by"])
        again = register(signing_conn_id=SIGNER)
        assert (again["version"], again["created"]) == ("1", False)
        assert storage.read_bytes(tags["mlops.signature_uri"]) == content

    def test_a_try_that_died_after_it_signed_is_taken_up(self, register, trusting, monkeypatch, frame):
        from mlflow import MlflowClient

        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "create_model_version", lambda *_, **__: (_ for _ in ()).throw(SystemExit))
            with pytest.raises(SystemExit):
                register(signing_conn_id=SIGNER)
        assert register(signing_conn_id=SIGNER)["version"] == "1"
        assert len(trusting.predict_proba("models:/late/1", frame)) == 50

    def test_no_secret_reaches_the_registry(self, signed, mlflow_hook):
        run = mlflow_hook.client.get_run(signed["run_id"])
        said = json.dumps([mlflow_hook.version("late", "1").tags, run.data.tags, run.data.params])
        signature = storage.read_bytes(mlflow_hook.version("late", "1").tags["mlops.signature_uri"])
        assert "PRIVATE" not in said and b"PRIVATE" not in signature

    def test_what_was_judged_is_what_is_registered(self, register, mlflow_models, tmp_path):
        spoiled = shutil.copytree(mlflow_models.good, tmp_path / "spoiled")
        gate = {"passed": True, "challenger_digest": model_digest(spoiled)}
        (spoiled / "requirements.txt").write_text("other")
        with pytest.raises(AirflowFailException, match=r"the gate judged a model with the digest sha256:\w+, but"):
            register(uri=str(spoiled), gate=gate)
        assert register(gate={"passed": True, "challenger_digest": model_digest(mlflow_models.good)})["created"]

    def test_a_connection_that_cannot_sign(self, register, monkeypatch, mlflow_hook):
        monkeypatch.setenv("AIRFLOW_CONN_EMPTY", json.dumps({"conn_type": "model_signing"}))
        for name, message in (("empty", "a private key is needed"), ("absent", "there is no connection 'absent'")):
            with pytest.raises(AirflowFailException, match=message):
                register(signing_conn_id=name)
        assert mlflow_hook.newest_version("late") is None

    def test_an_old_version_can_be_signed_later(self, register, trusting, mlflow_hook, frame):
        register()
        with pytest.raises(InvalidInputError, match=r"sign_version\('late', '1', 'signer'\)"):
            trusting.load("models:/late/1")
        who = mlflow_hook.sign_version("late", "1", SIGNER)
        assert mlflow_hook.version("late", "1").tags["mlops.signed_by"] == who
        assert len(trusting.predict_proba("models:/late/1", frame)) == 50

    def test_a_run_key_does_not_return_other_files_than_were_judged(self, signed, register):
        with pytest.raises(AirflowFailException, match=r"made version 1 before, .* but the gate judged sha256:other"):
            register(signing_conn_id=SIGNER, gate={"passed": True, "challenger_digest": "sha256:other"})

    def test_files_that_an_earlier_try_left_are_named(self, register, mlflow_hook, tmp_path):
        run = mlflow_hook.run_for_key("late", "run-a")
        (tmp_path / "model.other").write_text("x")
        mlflow_hook.client.log_artifact(run.info.run_id, str(tmp_path / "model.other"), "model")
        with pytest.raises(AirflowFailException, match=r"holds \['model.other'\] of another model"):
            register()
        assert mlflow_hook.newest_version("late") is None

    def test_what_is_unsigned_is_neither_promoted_nor_gone_back_to(
        self, register, mlflow_uri, task_context, mlflow_hook
    ):
        register()
        register("run-b", signing_conn_id=SIGNER)
        options = {"model_name": "late", "tracking_uri": mlflow_uri, "signing_conn_id": SIGNER}
        promote = MlflowPromoteOperator(task_id="promote", version="1", expected_version="", **options)
        with pytest.raises(AirflowFailException, match="version 1 of late is not signed"):
            promote.execute(task_context("promote"))
        mlflow_hook.client.set_registered_model_alias("late", "champion", "2")
        mlflow_hook.client.set_registered_model_alias("late", "previous_champion", "1")
        back = MlflowRollbackOperator(task_id="back", **options)
        with pytest.raises(AirflowFailException, match="version 1 of late is not signed"):
            back.execute(task_context("back"))
        assert mlflow_hook.version("late", "2").tags.get("mlops.rolled_back") is None

    def test_two_versions_of_one_run_have_signatures_of_their_own(self, signed, trusting, mlflow_hook, frame):
        first = mlflow_hook.version("late", "1")
        mlflow_hook.client.create_model_version("late", first.source, first.run_id, tags={"mlops.run_key": "another"})
        mlflow_hook.sign_version("late", "2", SIGNER)
        for version in ("1", "2"):
            assert len(trusting.predict_proba(f"models:/late/{version}", frame)) == 50

    def test_an_old_version_that_was_changed_is_not_signed(self, register, mlflow_hook):
        register()
        (files_of(mlflow_hook) / "requirements.txt").write_text("other")
        with pytest.raises(InvalidInputError, match="was recorded when it was registered"):
            mlflow_hook.sign_version("late", "1", SIGNER)


def change(hook, _):
    path = files_of(hook) / "model.ubj"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def add(hook, _):
    (files_of(hook) / "added.txt").write_text("x")


def remove(hook, _):
    (files_of(hook) / "conda.yaml").unlink()


def lose_signature(hook, _):
    os.unlink(hook.version("late", "1").tags["mlops.signature_uri"])


def unsign(hook, _):
    hook.client.delete_model_version_tag("late", "1", "mlops.signature_uri")


def change_digest(hook, _):
    hook.client.set_model_version_tag("late", "1", "mlops.model_digest", "sha256:" + 64 * "0")


def forge(hook, models):
    """Other files, signed by somebody else, with tags to match."""
    folder = files_of(hook)
    shutil.rmtree(folder)
    shutil.copytree(models.poor, folder)
    signed = SigningHook(OTHER).sign(folder, "late", "run-a")
    storage.write_bytes(hook.version("late", "1").tags["mlops.signature_uri"], signed.content)
    hook.client.set_model_version_tag("late", "1", "mlops.model_digest", signed.digest)


def move(hook, models):
    """The files and the signature of another model, which the right signer has signed."""
    folder = files_of(hook)
    shutil.rmtree(folder)
    shutil.copytree(models.poor, folder)
    signed = SigningHook(SIGNER).sign(folder, "early", "run-e")
    storage.write_bytes(hook.version("late", "1").tags["mlops.signature_uri"], signed.content)
    hook.client.set_model_version_tag("late", "1", "mlops.model_digest", signed.digest)


ATTACKS = {
    change: r"not the one that was signed: model\.ubj changed",
    add: r"not the one that was signed: added\.txt added",
    remove: r"not the one that was signed: conda\.yaml removed",
    lose_signature: r"the signature of version 1 of late is gone",
    unsign: r"version 1 of late is not signed \(it has no tag 'mlops\.signature_uri'\)",
    change_digest: r"somebody changed the tag",
    forge: r"does not hold",
    move: r"is that of the model 'early' from the training 'run-e', but 'late' from 'run-a'",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
class TestAttacks:
    @pytest.fixture
    def attacked(self, signed, attack, mlflow_hook, mlflow_models):
        attack(mlflow_hook, mlflow_models)
        return ATTACKS[attack]

    def test_nothing_is_loaded(self, attacked, trusting, frame):
        for use in (trusting.load, lambda uri: trusting.predict_proba(uri, frame)):
            with pytest.raises(InvalidInputError, match=attacked):
                use("models:/late/1")

    def test_no_gate_no_score_no_canary_and_no_rollback(
        self, attacked, mlflow_uri, mlflow_hook, mlflow_models, tmp_path, task_context, register
    ):
        common = {"tracking_uri": mlflow_uri, "signing_conn_id": SIGNER}
        judge = {"data_uri": mlflow_models.data, "label_column": "late"}
        places = {"report_dir": str(tmp_path / "gate"), "predictions_uri": str(tmp_path / "p.parquet")}
        gate = ModelGateOperator(
            task_id="gate",
            challenger_uri=mlflow_models.good,
            champion_uri="models:/late/1",
            report_dir=places["report_dir"],
            **judge,
            **common,
        )
        score = ModelScoreOperator(
            task_id="score",
            models={"m": "models:/late/1"},
            predictions_uri=places["predictions_uri"],
            **judge,
            **common,
        )
        canary = CanaryPromoteOperator(
            task_id="canary",
            model_name="late",
            version="1",
            model_uri="models:/late/1",
            mlflow_tracking_uri=mlflow_uri,
            signing_conn_id=SIGNER,
        )
        register("run-b", signing_conn_id=SIGNER)
        for alias, version in (("champion", "2"), ("previous_champion", "1")):
            mlflow_hook.client.set_registered_model_alias("late", alias, version)
        back = RollbackOperator(task_id="back", model_name="late", **common)
        for operator in (gate, score, canary, back):
            with pytest.raises(AirflowFailException, match=attacked):
                operator.execute(task_context(operator.task_id))
        assert not list(tmp_path.glob("gate/*")) and not list(tmp_path.glob("p.parquet"))


def test_an_alias_on_a_version_with_another_one_s_papers(signed, register, trusting, mlflow_hook, mlflow_models):
    """A copy of a good version, registered anew: every file and tag is right, and it is not what was registered."""
    papers = mlflow_hook.version("late", "1")
    copy = mlflow_hook.client.create_model_version("late", papers.source, papers.run_id, tags=dict(papers.tags))
    mlflow_hook.client.set_registered_model_alias("late", "champion", copy.version)
    with pytest.raises(RegistryError, match="from the training 'run-a', which made version 1"):
        trusting.load("models:/late@champion")


def test_an_alias_on_a_version_of_another_model_s_files(signed, register, trusting, mlflow_hook, mlflow_models):
    register("run-e", mlflow_models.poor, model_name="early", signing_conn_id=SIGNER)
    papers = mlflow_hook.version("early", "1")
    copy = mlflow_hook.client.create_model_version("late", papers.source, papers.run_id, tags=dict(papers.tags))
    mlflow_hook.client.set_registered_model_alias("late", "champion", copy.version)
    with pytest.raises(InvalidInputError, match="is that of the model 'early'"):
        trusting.load("models:/late@champion")


class TestWithoutASigner:
    def test_the_digest_still_counts(self, register, mlflow_hook, frame):
        register()
        assert len(mlflow_hook.predict_proba("models:/late/1", frame)) == 50
        add(mlflow_hook, None)
        fresh = MlflowHook(tracking_uri=mlflow_hook.tracking_uri)
        with pytest.raises(InvalidInputError, match=r"version 1 of late has the digest .* was recorded"):
            fresh.load("models:/late/1")

    def test_a_version_from_before_digests_is_loaded(self, mlflow_hook, mlflow_models, frame):
        mlflow_hook.client.create_registered_model("late")
        mlflow_hook.client.create_model_version("late", mlflow_models.good)
        assert len(mlflow_hook.predict_proba("models:/late/1", frame)) == 50

    def test_a_folder_is_loaded_but_not_where_signatures_are_asked_for(self, mlflow_hook, trusting, mlflow_models):
        mlflow_hook.load(mlflow_models.good)
        with pytest.raises(InvalidInputError, match="no version of a registered model, so it has no signature"):
            trusting.load(mlflow_models.good)


class TestCanary:
    def test_the_digests_go_to_ray_serve(self, signed, register, mlflow_hook, trusting, mlflow_models):
        target = {"kind": "ray_serve", "name": "late"}
        digest = mlflow_hook.version("late", "1").tags["mlops.model_digest"]
        found = with_digests(mlflow_hook, target, {"1": "models:/late/1", "": ""})
        assert found == {**target, "digests": {"1": digest}, "require_digest": False}
        assert with_digests(mlflow_hook, target, {"7": mlflow_models.good})["digests"] == {}
        verified = verify_signatures(trusting, "late", {"1": "models:/late/1", "": ""})
        assert verified == {"1": digest}
        mlflow_hook.client.set_model_version_tag("late", "1", "mlops.model_digest", "sha256:" + 64 * "0")
        asked = with_digests(mlflow_hook, target, {"1": "models:/late/1"}, verified)
        assert asked == {**target, "digests": {"1": digest}, "require_digest": True}

    def test_names_that_are_labels_only(self, signed, mlflow_hook, mlflow_models):
        digest = mlflow_hook.version("late", "1").tags["mlops.model_digest"]
        logged = mlflow_hook.client.create_logged_model(experiment_id="0")
        models = {"v7": "models:/late/1", "v8": f"models:/{logged.model_id}"}
        assert with_digests(mlflow_hook, {"kind": "ray_serve"}, models)["digests"] == {"v7": digest}

    def test_a_task_that_waited_keeps_the_digests_that_were_verified(
        self, signed, mlflow_uri, mlflow_hook, task_context
    ):
        digest = mlflow_hook.version("late", "1").tags["mlops.model_digest"]
        canary = CanaryPromoteOperator(
            task_id="canary",
            model_name="late",
            version="1",
            model_uri="models:/late/1",
            mlflow_tracking_uri=mlflow_uri,
            signing_conn_id=SIGNER,
            deferrable=True,
        )
        context = task_context("canary")
        context["ti"].id = "0198"
        with pytest.raises(TaskDeferred) as first:
            canary.execute(context)
        mlflow_hook.client.set_model_version_tag("late", "1", "mlops.model_digest", "sha256:" + 64 * "0")
        answer = {"chosen_options": ["Approve"], "responded_by_user": {"id": "1", "name": "ann"}, "status": "done"}
        with pytest.raises(TaskDeferred) as second:
            canary.execute_complete(context, answer, **first.value.kwargs)
        for deferred in (first, second):
            target = deferred.value.trigger.serialize()[1]["place"]["target"]
            assert (target["digests"], target["require_digest"]) == ({"1": digest}, True)
        with pytest.raises(AirflowFailException, match="somebody changed the tag"):
            canary.execute_complete(context, answer)

    def test_a_rollback_to_an_unsigned_version_marks_nothing(self, register, mlflow_uri, mlflow_hook, task_context):
        register("run-a")
        register("run-b", signing_conn_id=SIGNER)
        for alias, version in (("champion", "2"), ("previous_champion", "1")):
            mlflow_hook.client.set_registered_model_alias("late", alias, version)
        back = RollbackOperator(task_id="back", model_name="late", tracking_uri=mlflow_uri, signing_conn_id=SIGNER)
        with pytest.raises(AirflowFailException, match="version 1 of late is not signed"):
            back.execute(task_context("back"))
        tags = mlflow_hook.version("late", "2").tags
        assert not [tag for tag in tags if tag.startswith("mlops.rolled_back")]

    def test_files_that_change_after_their_signature_was_read(self, signed, trusting, mlflow_hook, monkeypatch):
        mlflow_hook.client.delete_model_version_tag("late", "1", "mlops.model_digest")
        verify = SigningHook.verify

        def then_changed(*arguments):
            found = verify(*arguments)
            add(mlflow_hook, None)
            return found

        monkeypatch.setattr(SigningHook, "verify", then_changed)
        with pytest.raises(InvalidInputError, match="changed while it was checked"):
            trusting.load("models:/late/1")

    def test_the_folder_that_will_be_served_is_the_one_that_is_verified(self, signed, trusting, mlflow_models):
        verify_signatures(trusting, "late", {"1": mlflow_models.good})
        with pytest.raises(InvalidInputError, match="not the one that was signed"):
            verify_signatures(trusting, "late", {"1": mlflow_models.poor})


@pytest.fixture(scope="module")
def pickled(tmp_path_factory, mlflow_models):
    import mlflow
    from mlflow.models import infer_signature
    from sklearn.linear_model import LogisticRegression

    frame = pd.read_parquet(mlflow_models.train)
    model = LogisticRegression().fit(frame[mlflow_models.features], frame["late"])
    folder = tmp_path_factory.mktemp("pickled") / "model"
    mlflow.sklearn.save_model(
        model,
        folder,
        serialization_format="cloudpickle",
        pyfunc_predict_fn="predict_proba",
        signature=infer_signature(frame[mlflow_models.features], np.array([0.5])),
        pip_requirements=[],
    )
    return str(folder), model


@pytest.mark.usefixtures("isolation")
class TestPickles:
    def test_one_that_was_allowed_answers_from_a_sandbox(self, register, pickled, mlflow_uri, mlflow_hook, frame):
        folder, model = pickled
        with pytest.raises(AirflowFailException, match=r"is pickled \(model\.pkl"):
            register(uri=folder)
        register(uri=folder, allow_pickle=True, signing_conn_id=SIGNER)
        tags = mlflow_hook.version("late", "1").tags
        assert tags["mlops.allow_pickle"] == "true" and tags["mlops.model_formats"] == "pickle"
        findings = storage.read_json(tags["mlops.pickle_findings_uri"])
        assert {finding["scanner"] for finding in findings} == {"fickling", "modelscan"}
        with pytest.raises(InvalidInputError, match="is pickled"):
            mlflow_hook.predict_proba("models:/late/1", frame)
        allowing = MlflowHook(tracking_uri=mlflow_uri, signing_conn_id=SIGNER, allow_pickle=True)
        found = allowing.predict_proba("models:/late/1", frame)
        assert found == pytest.approx(model.predict_proba(frame[["a", "b", "c"]])[:, 1])
        assert allowing.models.latency("models:/late/1", frame)["calls"] == 200
        with pytest.raises(InvalidInputError, match="is pickled"):
            allowing.load("models:/late/1")

    def test_permission_needs_the_version_s_word_and_the_task_s(self, mlflow_uri, mlflow_hook, pickled, frame):
        mlflow_hook.client.create_registered_model("late")
        mlflow_hook.client.create_model_version("late", pickled[0])
        allowing = MlflowHook(tracking_uri=mlflow_uri, allow_pickle=True)
        with pytest.raises(InvalidInputError, match="is pickled"):
            allowing.predict_proba("models:/late/1", frame)

    def test_one_that_runs_code_is_refused_though_allowed(self, register, pickled, tmp_path, mlflow_hook):
        class Gotcha:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "ran"),))

        folder = shutil.copytree(pickled[0], tmp_path / "bad")
        (folder / "model.pkl").write_bytes(pickle.dumps(Gotcha()))
        with pytest.raises(AirflowFailException, match=r"would run code: model\.pkl: it looks up posix\.mkdir"):
            register(uri=str(folder), allow_pickle=True)
        assert not (tmp_path / "ran").exists()
        assert mlflow_hook.newest_version("late") is None


def test_the_connection_s_test_says_who_signs(monkeypatch):
    good, said = SigningHook(SIGNER).test_connection()
    assert good and said.startswith("signs and verifies as key:sha256:")
    key = pem.load_pem_private_key(SigningHook(SIGNER).keys.private_key.encode(), None).public_key()
    public = key.public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo).decode()
    monkeypatch.setenv(
        "AIRFLOW_CONN_READER", json.dumps({"conn_type": "model_signing", "extra": {"public_key": public}})
    )
    good, said = SigningHook("reader").test_connection()
    assert good and "has no private key to sign with" in said
    for extra in ({"method": "magic"}, {"public_key": "none"}, {"method": "sigstore"}):
        monkeypatch.setenv("AIRFLOW_CONN_BAD", json.dumps({"conn_type": "model_signing", "extra": extra}))
        assert SigningHook("bad").test_connection()[0] is False
    assert SigningHook("absent").test_connection()[0] is False
