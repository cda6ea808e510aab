"""The operators put their decisions on record, once, and do not go on without."""

from __future__ import annotations

import pytest

from airflow_mlops.exceptions import ExternalSystemError
from airflow_mlops.operators._audit import DECISIONS, audited, configured_log
from airflow_mlops.operators.mlflow import MlflowPromoteOperator, MlflowRollbackOperator
from airflow_mlops.provenance import AuditLog, verify
from airflow_mlops.provenance.record import read


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW__MLOPS__AUDIT_URI", str(tmp_path / "audit"))
    return AuditLog(str(tmp_path / "audit"))


def promote(world, version, expected):
    arguments = {"model_name": "late", "tracking_uri": world.hook.tracking_uri}
    operator = MlflowPromoteOperator(task_id="promote", version=version, expected_version=expected, **arguments)
    return operator.execute(world.context("promote"))


def test_without_a_log_nothing_changes(world):
    assert configured_log() is None
    result = {"passed": True}
    assert audited(world.context("gate"), "gate", result) is result


def test_what_the_registry_operators_decide_is_on_record(world, log):
    first = world.register()
    second = world.register(training={**world.training, "run_key": "july"})
    promote(world, first["version"], "")
    promoted = promote(world, second["version"], first["version"])
    operator = MlflowRollbackOperator(task_id="rollback", model_name="late", tracking_uri=world.hook.tracking_uri)
    operator.execute(world.context("rollback"))
    entries = list(log.entries())
    assert [entry.kind for entry in entries] == ["register", "register", "promote", "promote", "rollback"]
    assert entries[3].body["previous"] == "1" and entries[3].body["version"] == "2"
    assert entries[3].body["by"] == {"task": "training/run-1/promote/-1", "user": "ada"}
    assert entries[4].body["rolled_back"] == "2" and entries[4].body["version"] == "1"
    assert promoted["audit"] == {"kind": "promote", **entries[3].to_anchor()}
    assert log.verify([promoted["audit"]]).intact


def test_a_retry_logs_nothing_twice(world, log):
    assert world.register()["audit"] == world.register()["audit"]
    promote(world, "1", "")
    promote(world, "1", "")
    assert [entry.kind for entry in log.entries()] == ["register", "promote"]


def test_another_decision_of_the_same_task_is_another_entry(world, log):
    context = world.context("gate")
    audited(context, "gate", {"passed": False, "reasons": ["auc"], "latency": {"p99": 1.0}})
    audited(context, "gate", {"passed": True, "reasons": [], "latency": {"p99": 2.0}})
    audited(context, "gate", {"passed": True, "reasons": [], "latency": {"p99": 3.0}})
    assert [entry.body["passed"] for entry in log.entries()] == [False, True]


def test_a_decision_that_cannot_be_logged_is_an_error(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AIRFLOW__MLOPS__AUDIT_URI", str(tmp_path / "file" / "audit"))
    with pytest.raises(ExternalSystemError, match="nothing was logged"):
        world.register()


def test_the_record_keeps_where_its_decisions_are_logged(world, log):
    registration = world.register()
    promotion = promote(world, "1", "")
    record = read(world.record(registration, promotion=promotion)["record_uri"])
    assert [one["kind"] for one in record.audit] == ["register", "promote"]
    assert "audit" not in record.promotion
    assert verify(log.uri, record.audit).intact


def test_every_kind_tells_what_was_decided():
    assert set(DECISIONS) == {"drift", "gate", "register", "canary", "promote", "refuse", "rollback"}
    assert all(DECISIONS.values())
