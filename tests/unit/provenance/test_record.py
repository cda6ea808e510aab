"""What a record answers, what it admits not to know, and what writing it twice must not do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from airflow_mlops import environment, storage
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.model_files.digest import model_digest
from airflow_mlops.provenance import ModelRecord
from airflow_mlops.provenance.code import code_state, entry_source
from airflow_mlops.provenance.record import QUESTIONS, cost_of, plain, read, seeds_of

IMAGE = "sha256:" + "ab" * 32


def record_of(result):
    return read(result["record_uri"])


class TestOperator:
    def test_everything_but_the_connection_is_templated(self):
        import inspect

        from airflow_mlops.operators.provenance import ModelRecordOperator

        own = set(inspect.signature(ModelRecordOperator.__init__).parameters) - {"self", "kwargs"}
        assert own <= set(ModelRecordOperator.template_fields)

    def test_every_question_is_answered(self, recorded, monkeypatch):
        world, record = recorded.world, record_of(recorded.papers)
        assert record.who == {
            "user": "ada", "dag_id": "training", "run_id": "run-1", "run_type": "manual",
            "bundle": None, "bundle_version": None,
        }  # fmt: skip
        assert record.when["started"] == "2026-01-01T06:00:00+00:00" and record.when["registered"].endswith("+00:00")
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        assert record.get("code.revision") == head.stdout.strip() and record.get("code.dirty") in (True, False)
        assert record.get("code.entry") == "airflow_mlops.examples.xgboost_loop:train_loop_per_worker"
        assert len(record.get("code.entry_sha256")) == 64
        assert record.get("data.snapshot") == world.snapshot
        assert record.get("data.training_set.sha256") == world.training_set["sha256"]
        assert record.get("data.training_set.rows") == 300 and record.get("data.views")[0]["view"] == "weather"
        assert record.get("data.profile.digest") and record.get("data.feature_service") == "late_v1"
        assert record.seeds == {"params.seed": 7} and record.parameters["params"] == {"seed": 7, "eta": 0.1}
        assert record.get("environment.lock.packages") == list(environment.packages())
        assert record.cluster["nodes"] == 2 and record.cluster["num_workers"] == 2
        assert record.cost == {
            "wall_seconds": 60.0, "cpu_hours": 0.033333, "gpu_hours": 0.01, "gpu_cost": 0.02, "attempts": 1,
        }  # fmt: skip
        assert record.gate["passed"] is True and record.canary["verdict"] == "PROMOTE"
        assert record.approvals == [{"about": "rollout, step 1", "approved": True, "by": "ada", "time": 1.0}]
        assert {file["path"] for file in record.artifacts} >= {"MLmodel", "model.ubj"}
        assert set(record.unknown) <= {"environment.image_digest"}

    def test_a_secret_in_the_config_is_masked_and_a_number_is_none(self, recorded):
        papers = [storage.read_bytes(recorded.papers[name]).decode() for name in ("record_uri", "bom_uri", "card_uri")]
        assert not any("open-sesame" in paper for paper in papers)
        parameters = record_of(recorded.papers).parameters
        assert (parameters["api_token"], parameters["max_tokens"]) == ("***", 5)

    def test_a_run_directory_whose_name_holds_a_secret_is_read_all_the_same(self, world):
        from airflow.sdk.log import mask_secret

        # Any password may happen to be part of a path.
        mask_secret(world.root.name)
        assert record_of(world.record(world.register())).parameters["params"] == {"seed": 7, "eta": 0.1}

    def test_the_papers_lie_in_the_run_and_the_version_names_them(self, recorded):
        world = recorded.world
        run_id, client = recorded.registration["run_id"], world.hook.client
        names = {file.path for file in client.list_artifacts(run_id, "papers")}
        assert names == {
            f"papers/{name}" for name in ("record.json", "bom.json", "card.md", "card.html", "openlineage.json")
        }
        tags = world.hook.version("late", "1").tags
        for name in ("record_uri", "bom_uri", "card_uri"):
            assert tags[f"mlops.{name}"] == recorded.papers[name] and storage.exists(tags[f"mlops.{name}"])

    def test_again_changes_nothing(self, recorded):
        world = recorded.world
        names = ("record_uri", "bom_uri", "card_uri")
        before = [storage.read_bytes(recorded.papers[name]) for name in names]
        later = {"triggering_user_name": "bob", "run_type": "backfill"}
        assert world.record(recorded.registration, run=later) == recorded.papers
        assert [storage.read_bytes(recorded.papers[name]) for name in names] == before

    def test_a_later_task_completes_the_record(self, world):
        registration = world.register()
        first = record_of(world.record(registration, canary=None, promotion=None, approvals=[]))
        assert first.canary is None and first.unknown[-1] == "canary.verdict" and first.approvals == []
        nothing = dict.fromkeys(("snapshot", "training_set", "training", "gate", "documentation", "feature_service"))
        second = record_of(world.record(registration, **nothing))
        assert second.canary["verdict"] == "PROMOTE" and len(second.approvals) == 1
        for name in ("who", "when", "code", "data", "cost", "gate", "documentation", "parameters", "artifacts"):
            assert getattr(second, name) == getattr(first, name), name

    def test_what_people_said_in_the_gate_and_before_the_promotion_is_put_down(self, world):
        gate = {**world.gate, "approval": {"approved": True, "by": "ann", "overrode": True}}
        promotion = {**world.promotion, "approval": {"approved": True, "by": "bob"}}
        canary = {**world.canary, "approvals": {}}
        result = world.record(world.register(), gate=gate, canary=canary, promotion=promotion)
        record = record_of(result)
        assert [(said["about"], said["by"]) for said in record.approvals] == [("gate", "ann"), ("promotion", "bob")]
        assert record.get("gate.approval.overrode") is True
        card = storage.read_bytes(result["card_uri"]).decode()
        assert "approved against the verdict by ann (gate); approved by bob (promotion)" in card

    def test_a_later_task_that_was_told_of_no_approvals_forgets_none(self, world):
        registration = world.register()
        asked = {**world.gate, "approval": {"approved": True, "by": "ann"}}
        said = [{"about": "risk", "approved": True, "by": "eve"}]
        world.record(registration, gate=asked, canary=None, promotion=None, approvals=said)
        nobody = {**world.canary, "approvals": {}}
        assert [one["by"] for one in record_of(world.record(registration, canary=nobody)).approvals] == ["eve", "ann"]
        record = record_of(world.record(registration))
        assert [one["by"] for one in record.approvals] == ["eve", "ann", "ada"]
        assert record_of(world.record(registration)).approvals == record.approvals

    def test_that_nobody_was_asked_completes_a_record_that_did_not_know(self, world):
        registration = world.register()
        first = record_of(world.record(registration, canary=None, promotion=None))
        assert first.approvals is None
        second = record_of(world.record(registration, canary={**world.canary, "approvals": {}}))
        assert second.approvals == []

    def test_papers_go_to_s3_too(self, world, s3):
        result = world.record(world.register(), evidence_uri="s3://runs/papers")
        assert result["record_uri"] == "s3://runs/papers/late/1/record.json"
        assert record_of(result).version == "1"

    def test_files_that_changed_after_the_registration_are_found(self, recorded):
        world = recorded.world
        model = Path(world.hook.model_dir("models:/late/1"))
        (model / "model.ubj").write_bytes(b"another model")
        with pytest.raises(AirflowFailException, match=r"version 1 of late has the digest sha256:.* was recorded"):
            world.record(recorded.registration)

    def test_files_of_a_version_without_a_digest_are_held_against_the_record(self, recorded):
        world = recorded.world
        world.hook.client.delete_model_version_tag("late", "1", "mlops.model_digest")
        model = Path(world.hook.model_dir("models:/late/1"))
        (model / "model.ubj").write_bytes(b"another model")
        with pytest.raises(AirflowFailException, match=r"the files \['model.ubj'\] of late version 1 are not those"):
            world.record(recorded.registration)

    def test_files_that_changed_before_the_first_record_are_found(self, world):
        registration = world.register()
        model = Path(world.hook.model_dir("models:/late/1"))
        (model / "model.ubj").write_bytes(b"another model")
        with pytest.raises(AirflowFailException, match=r"version 1 of late has the digest sha256:.* was recorded"):
            world.record(registration)
        assert "mlops.record_uri" not in world.hook.version("late", "1").tags

    def test_digest_and_signature_are_in_all_papers(self, world):
        registration, client = world.register(), world.hook.client
        unsigned = world.record(registration)
        digest = model_digest(world.hook.model_dir("models:/late/1"))
        assert record_of(unsigned).integrity == {"digest": digest, "signature_uri": None, "signed_by": None}
        assert re.search(r"Signed by</td><td[^>]*>nobody", storage.read_bytes(unsigned["card_uri"]).decode())
        client.set_model_version_tag("late", "1", "mlops.signature_uri", "/evidence/model.sig")
        client.set_model_version_tag("late", "1", "mlops.signed_by", "release@example.com")
        signed = world.record(registration)
        facts = {"digest": digest, "signature_uri": "/evidence/model.sig", "signed_by": "release@example.com"}
        assert record_of(signed).integrity == facts
        properties = storage.read_json(signed["bom_uri"])["components"][0]["properties"]
        told = {one["name"].removeprefix("mlops:"): one["value"] for one in properties}
        assert facts.items() <= {**told, "digest": told.get("model_digest")}.items()
        card = storage.read_bytes(signed["card_uri"]).decode()
        assert all(fact in card for fact in facts.values())

    def test_a_record_that_is_gone_is_written_anew(self, recorded):
        world, uri = recorded.world, recorded.papers["record_uri"]
        before = record_of(recorded.papers)
        os.unlink(uri)
        with structlog.testing.capture_logs() as logged:
            assert world.record(recorded.registration) == recorded.papers
        assert record_of(recorded.papers) == before
        assert any(f"is not at {uri} any more" in line["event"] for line in logged)

    def test_a_record_that_is_damaged_is_not_overwritten(self, recorded):
        storage.write_bytes(recorded.papers["record_uri"], b"{")
        with pytest.raises(AirflowFailException, match="is no JSON"):
            recorded.world.record(recorded.registration)

    def test_nothing_registered_is_nothing_to_put_down(self, world):
        with pytest.raises(AirflowSkipException, match="no version was registered"):
            world.record(None)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"model_name": "late"}, "model_name is 'late' and version None; give both"),
            ({"model_name": "late", "version": "9"}, "late has no version 9"),
            ({"documentation": "prose"}, "documentation is 'prose'; expected a dict"),
        ],
    )
    def test_what_is_wrong_is_said(self, recorded, arguments, message):
        registration = recorded.registration if "documentation" in arguments else None
        with pytest.raises(AirflowFailException, match=message):
            recorded.world.record(registration, **arguments)

    def test_what_makes_no_valid_document_is_refused(self, recorded):
        with pytest.raises(AirflowFailException, match=r"does not fit CycloneDX 1\.6"):
            recorded.world.record(recorded.registration, documentation={"users": [7]})

    def test_artifacts_that_only_a_server_reads_need_another_place(self, recorded):
        from types import SimpleNamespace

        from airflow_mlops.operators.provenance import ModelRecordOperator

        run = SimpleNamespace(info=SimpleNamespace(artifact_uri="mlflow-artifacts:/1/2/artifacts"))
        found = SimpleNamespace(name="late", version="1")
        with pytest.raises(InvalidInputError, match="only its server can read; give evidence_uri"):
            ModelRecordOperator(task_id="papers")._folder(found, run)
        elsewhere = ModelRecordOperator(task_id="papers", evidence_uri="s3://b/p")
        assert elsewhere._folder(found, run) == "s3://b/p/late/1"


class TestRecord:
    def test_it_survives_json(self, recorded):
        record = record_of(recorded.papers)
        assert ModelRecord.from_json(json.loads(json.dumps(record.to_json()))) == record

    def test_an_empty_record_knows_nothing_and_says_so(self):
        record = ModelRecord("m", "1")
        assert record.unknown == [path for paths in QUESTIONS.values() for path in paths]
        assert record.to_json()["unknown"] == record.unknown

    @pytest.mark.parametrize("answer", [{}, [], False, 0, 0.0])
    def test_an_answer_of_nothing_is_an_answer(self, answer):
        assert "seeds" not in replace(ModelRecord("m", "1"), seeds=answer).unknown

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({}, "no model record"),
            ([], "no model record"),
            ({"schema": 2, "model": "m", "version": "1"}, "has schema 2, and this version reads up to 1"),
        ],
    )
    def test_what_is_no_record_is_refused(self, tmp_path, content, message):
        (tmp_path / "r.json").write_text(json.dumps(content))
        with pytest.raises(InvalidInputError, match=message):
            read(str(tmp_path / "r.json"))

    def test_a_record_that_is_gone_or_broken_is_said(self, tmp_path):
        with pytest.raises(InvalidInputError, match="there is no record at"):
            read(str(tmp_path / "none.json"))
        (tmp_path / "half.json").write_text("{")
        with pytest.raises(InvalidInputError, match="is no JSON"):
            read(str(tmp_path / "half.json"))

    def test_seeds_are_found_at_every_depth(self):
        config = {"seed": 1, "model": {"random_state": 2, "layers": [{"dropout_seed": 3}, {"x": 4}]}, "data_seeds": [5]}
        assert seeds_of(config) == {
            "seed": 1, "model.random_state": 2, "model.layers[0].dropout_seed": 3, "data_seeds": [5],
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("training", "cost"),
        [
            ({"gpu_seconds": 0.0}, 0.0),
            ({"gpu_seconds": 7200.0}, None),
            ({"gpu_seconds": 7200.0, "cost": 8.0}, 8.0),
            ({}, None),
        ],
    )
    def test_gpus_without_a_price_have_no_cost_and_none_cost_nothing(self, training, cost):
        assert cost_of(training)["gpu_cost"] == cost

    def test_plain_leaves_no_nan(self):
        import numpy as np

        value = plain({"a": np.float32(0.5), "b": [np.nan, float("inf")], "c": (np.int64(3), True, None), 4: Path("x")})
        assert value == {"a": 0.5, "b": [None, None], "c": [3, True, None], "4": "x"}
        json.dumps(value, allow_nan=False)


class TestCode:
    @pytest.fixture
    def repository(self, tmp_path):
        def git(*arguments):
            identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
            subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

        git("init", "-q")
        (tmp_path / ".gitignore").write_text("ignored\n")
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "train.py").write_text("x = 1\n")
        git("add", ".")
        git("commit", "-qm", "first")
        git("remote", "add", "origin", "https://me:secret@host/team/repo.git")
        return tmp_path

    def test_a_clean_checkout(self, repository):
        state = code_state(str(repository / "sub"), {})
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True)
        assert state == {
            "revision": head.stdout.strip(), "dirty": False, "changed": [],
            "repository": "https://host/team/repo.git", "source": "git",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("name", "dirty"), [("sub/train.py", True), ("sub/new.py", True), ("ignored", False), ("staged", True)]
    )
    def test_what_git_would_show_makes_it_dirty(self, repository, name, dirty):
        (repository / name).write_text("x = 2\n")
        if name == "staged":
            subprocess.run(["git", "add", name], cwd=repository, check=True)
        state = code_state(str(repository / "sub"), {})
        assert state["dirty"] is dirty and state["changed"] == ([name] if dirty else [])

    @pytest.mark.parametrize(
        ("given", "revision", "dirty"), [("abc", "abc", False), ("abc-dirty", "abc", True), ("", None, None)]
    )
    def test_without_a_checkout_the_image_says(self, tmp_path, given, revision, dirty):
        state = code_state(str(tmp_path), {"MLOPS_GIT_REVISION": given})
        assert (state["revision"], state["dirty"]) == (revision, dirty)

    def test_the_loop_is_hashed_and_one_that_is_not_here_is_not(self):
        found = entry_source("airflow_mlops.examples.xgboost_loop:train_loop_per_worker")
        assert len(found["entry_sha256"]) == 64
        for absent in ("no.such:f", "pickle:s3://b/f", "python train.py", None):
            assert entry_source(absent) == {"entry": absent, "entry_sha256": None}


class TestEnvironment:
    @pytest.mark.parametrize(
        ("environ", "digest"),
        [
            ({"MLOPS_IMAGE_DIGEST": IMAGE}, IMAGE),
            ({"MLOPS_IMAGE": f"host/train@{IMAGE}"}, IMAGE),
            ({"MLOPS_IMAGE_DIGEST": f"host/train@{IMAGE}", "MLOPS_IMAGE": "train:1"}, IMAGE),
            ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
            ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "MLOPS_IMAGE": "train:1"}, None),
        ],
    )
    def test_the_image_is_known_by_its_digest_alone(self, environ, digest):
        assert environment.describe(environ)["image_digest"] == digest

    def test_outside_a_container_there_is_no_image(self, monkeypatch):
        monkeypatch.setattr(os.path, "exists", lambda path: False)
        assert environment.describe({})["image_digest"] == "none"

    def test_the_lock_is_of_every_distribution(self):
        lock = environment.describe({})["lock"]
        assert f"mlflow=={importlib.metadata.version('mlflow')}" in lock["packages"]
        assert len(set(lock["packages"])) == len(lock["packages"])
        assert environment.lock(("a==1",))["sha256"] != environment.lock(("a==2",))["sha256"]
