"""How the operators put their decisions into the audit log, where one is configured."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from airflow_mlops.shell import is_blank

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_mlops.provenance.audit import AuditLog

#: Of each kind of decision, what goes on record of the task's result: what was decided, about what, and why.
DECISIONS: dict[str, tuple[str, ...]] = {
    "drift": ("verdict", "retrain", "model", "version", "window", "reasons", "report_uri"),
    "gate": (
        "passed",
        "first_model",
        "reasons",
        "rows",
        "challenger_uri",
        "champion_uri",
        "champion_version",
        "policy",
        "approval",
    ),
    "register": ("name", "version", "run_id", "model_uri"),
    "canary": ("verdict", "model", "version", "previous", "compared", "reasons", "approvals"),
    "promote": ("name", "version", "previous", "alias", "approval"),
    "refuse": ("name", "version", "previous", "alias", "approval"),
    "rollback": ("name", "version", "rolled_back", "alias"),
}


def audited(context: Context, kind: str, result: dict[str, Any]) -> dict[str, Any]:
    """Put a task's decision into the log at ``[mlops] audit_uri``; what is decided the same again is not logged again.

    A log that cannot be written fails the task: what is not on record was not decided.

    :return: the result; where there is a log with ``audit``: ``kind``, ``number`` and ``sha256`` of the entry
    :raises MlopsError: the log cannot be written
    """
    log = configured_log()
    if log is None:
        return result
    from airflow_mlops.provenance.record import plain

    ti = context["ti"]
    run = context.get("dag_run")
    decision = plain({name: result[name] for name in DECISIONS[kind] if name in result})
    task = "/".join([ti.dag_id, ti.run_id, ti.task_id, str(getattr(ti, "map_index", -1))])
    digest = hashlib.sha256(json.dumps(decision, sort_keys=True).encode()).hexdigest()
    by = {"task": task, "user": getattr(run, "triggering_user_name", None)}
    entry = log.append(kind, f"{kind}/{task}/{digest}", {**decision, "by": by})
    return {**result, "audit": {"kind": kind, **entry.to_anchor()}}


def configured_log() -> AuditLog | None:
    """The audit log of this Airflow, None where none is configured."""
    from airflow.sdk.configuration import conf

    uri = conf.get("mlops", "audit_uri", fallback="")
    if is_blank(uri):
        return None
    from airflow_mlops.provenance.audit import AuditLog

    return AuditLog(str(uri), retain_days=conf.getint("mlops", "audit_retain_days", fallback=0))
