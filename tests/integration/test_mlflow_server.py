"""The registry operators against a real MLflow server: two at once, its webhooks, and none there at all."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import requests
from airflow.sdk.exceptions import AirflowFailException
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec

from airflow_mlops import storage
from airflow_mlops.embedded.processes import free_port
from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError
from airflow_mlops.hooks.mlflow import MlflowHook
from airflow_mlops.operators.mlflow import MlflowPromoteOperator, MlflowRegisterOperator, MlflowRollbackOperator


@pytest.fixture(scope="module")
def server(tmp_path_factory, _mlflow_template):
    """The URI of a tracking server on SQLite that keeps the artifacts itself, and may call webhooks on this machine."""
    root, port = tmp_path_factory.mktemp("mlflow-server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{root}/mlflow.db",
        "--artifacts-destination",
        str(root / "artifacts"),
    ]
    (root / "mlflow.db").write_bytes(_mlflow_template.read_bytes())
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    webhooks = {"ALLOWED_SCHEMES": "http", "ALLOW_PRIVATE_IPS": "true", "CACHE_TTL": "1"}
    env |= {f"MLFLOW_WEBHOOK_{name}": value for name, value in webhooks.items()}
    with open(root / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    uri, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                if requests.get(f"{uri}/health", timeout=2).ok:
                    break
            except requests.RequestException:
                pass
            assert process.poll() is None and time.monotonic() < deadline, (root / "log").read_text()[-4000:]
            time.sleep(0.3)
        yield uri
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


@pytest.fixture
def hook(server):
    return MlflowHook(tracking_uri=server)


def at_once(*calls):
    """What each call returned, or the text of the error with which it ended; all started together."""
    barrier, outcome = threading.Barrier(len(calls)), {}

    def run(number, call):
        barrier.wait()
        try:
            outcome[number] = call()
        except AirflowFailException as error:
            outcome[number] = str(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcome[number] for number in range(len(calls))]


def registration(server, context, name, model, **changes):
    training = {"run_key": "june", "model_uri": model}
    arguments = {"model_name": name, "training": training, "tracking_uri": server} | changes
    return lambda: MlflowRegisterOperator(task_id="register", **arguments).execute(context("register"))


def versions(server, context, name, model, count):
    for number in range(count):
        training = {"run_key": f"run-{number}", "model_uri": model}
        assert registration(server, context, name, model, training=training)()["version"] == str(number + 1)


def promotion(server, context, name, version, expected):
    arguments = {"model_name": name, "version": version, "expected_version": expected, "tracking_uri": server}
    return lambda: MlflowPromoteOperator(task_id="promote", **arguments).execute(context("promote"))


def test_two_promotions_at_once_end_with_one_winner_and_one_clear_refusal(server, hook, task_context, mlflow_models):
    versions(server, task_context, "race", mlflow_models.good, 3)
    promotion(server, task_context, "race", "1", "")()
    calls = [promotion(server, task_context, "race", version, "1") for version in "23"]
    results = at_once(*calls)
    won = [result for result in results if not isinstance(result, str)]
    lost = [result for result in results if isinstance(result, str)]
    assert len(won) == 1 and won[0]["changed"] and won[0]["previous"] == "1"
    assert len(lost) == 1 and ("somebody else" in lost[0])
    assert str(hook.version_by_alias("race", "champion").version) == won[0]["version"]
    assert str(hook.version_by_alias("race", "previous_champion").version) == "1"
    # The loser's retry is refused with what it would have to do.
    loser = calls[results.index(lost[0])]
    with pytest.raises(AirflowFailException, match="Run the gate again against the new champion"):
        loser()


def test_two_registrations_of_one_training_at_once_make_one_version(server, hook, task_context, mlflow_models):
    call = registration(server, task_context, "twins", mlflow_models.good)
    results = at_once(call, call)
    assert [result["version"] for result in results] == ["1", "1"]
    assert sorted(result["created"] for result in results) == [False, True]
    assert [str(v.version) for v in hook.client.search_model_versions("name='twins'")] == ["1"]


def test_a_server_that_keeps_the_artifacts_needs_a_place_for_the_evidence(
    server, hook, task_context, mlflow_models, tmp_path
):
    data = {"training_set": {"uri": mlflow_models.train, "features": mlflow_models.features}}
    with pytest.raises(AirflowFailException, match="give evidence_uri"):
        registration(server, task_context, "kept", mlflow_models.good, **data)()
    result = registration(server, task_context, "kept", mlflow_models.good, evidence_uri=str(tmp_path), **data)()
    tags = hook.version("kept", result["version"]).tags
    assert storage.exists(tags["mlops.profile_uri"])
    from mlflow.artifacts import load_dict

    with hook.session():
        example = load_dict(tags["mlops.input_example_uri"])
    assert example["columns"] == mlflow_models.features and len(example["data"]) == 5


@pytest.fixture
def receiver():
    """An HTTP server that remembers what was posted to it, as (headers, body)."""
    got: list = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{httpd.server_address[1]}/", got=got)
        httpd.shutdown()


def test_the_server_s_webhook_tells_others_of_a_promotion(server, hook, task_context, mlflow_models, receiver):
    versions(server, task_context, "told", mlflow_models.good, 1)
    made = hook.client.create_webhook(
        name="promotions", url=receiver.url, events=["model_version_alias.created"], secret="shared"
    )
    try:
        promotion(server, task_context, "told", "1", "")()
        deadline = time.monotonic() + 30
        while not receiver.got and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        hook.client.delete_webhook(made.webhook_id)
    (headers, body), *_ = receiver.got
    told = json.loads(body)
    assert (told["entity"], told["action"]) == ("model_version_alias", "created")
    assert told["data"] == {"name": "told", "alias": "champion", "version": "1"}
    signed = f"{headers['X-MLflow-Delivery-Id']}.{headers['X-MLflow-Timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(b"shared", signed, hashlib.sha256).digest()).decode()
    assert headers["X-MLflow-Signature"] == f"v1,{expected}"


@pytest.mark.parametrize("kind", ["register", "promote", "roll back"])
def test_a_registry_that_is_down_is_named_and_worth_a_retry(kind, task_context, mlflow_models, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{free_port()}"
    calls = {
        "register": registration(uri, task_context, "late", mlflow_models.good),
        "promote": promotion(uri, task_context, "late", "1", ""),
        "roll back": lambda: MlflowRollbackOperator(task_id="back", model_name="late", tracking_uri=uri).execute(
            task_context("back")
        ),
    }
    with pytest.raises(ExternalSystemError, match=rf"MLflow at {uri} answered with an error.*mlflow_default"):
        calls[kind]()


def test_what_the_registry_refuses_is_not_tried_again(server, task_context, mlflow_models):
    with pytest.raises(AirflowFailException, match="MLflow refuses it: "):
        registration(server, task_context, "a/b", mlflow_models.good)()


def test_a_model_that_only_the_server_can_read_is_fetched_by_hook_and_slot_and_signed_elsewhere(
    server, hook, task_context, mlflow_models, monkeypatch, tmp_path
):
    from airflow_mlops.model_files.digest import model_digest
    from airflow_mlops.rollout.targets.ray_serve import Slot

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    key = ec.generate_private_key(ec.SECP256R1())
    text = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()).decode()
    monkeypatch.setenv("AIRFLOW_CONN_SIGNER", json.dumps({"conn_type": "model_signing", "password": text}))
    run = hook.client.create_run(hook.client.create_experiment("fetched"))
    hook.client.log_artifacts(run.info.run_id, mlflow_models.good, "model")
    uri, digest = f"runs:/{run.info.run_id}/model", model_digest(mlflow_models.good)
    assert hook.artifact_location(uri).startswith("mlflow-artifacts:/")
    hook.client.create_registered_model("fetched")
    tags = {"mlops.run_key": "k", "mlops.model_digest": digest}
    hook.client.create_model_version("fetched", hook.artifact_location(uri), run.info.run_id, tags=tags)
    for place in (uri, "models:/fetched/1"):
        assert model_digest(hook.model_dir(place)) == digest
        slot = Slot.func_or_class()
        slot.reconfigure({"version": "1", "uri": place, "digest": digest})
        assert slot.describe()["ready"], slot.describe()["error"]
    with pytest.raises(InvalidInputError, match="only its server can read; give evidence_uri"):
        hook.sign_version("fetched", "1", "signer")
    assert not list(tmp_path.iterdir())
    hook.sign_version("fetched", "1", "signer", evidence_uri=f"{tmp_path}/evidence/")
    assert hook.version("fetched", "1").tags["mlops.signature_uri"] == f"{tmp_path}/evidence/fetched-1.sig"
    assert MlflowHook(tracking_uri=server, signing_conn_id="signer").models.open("models:/fetched/1").digest == digest
