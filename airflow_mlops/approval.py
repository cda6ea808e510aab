"""A question to a person among Airflow's required actions, and what they said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

APPROVE, REJECT = "Approve", "Reject"


@dataclass(frozen=True)
class Said:
    """What somebody answered.

    :param approved: whether they approved
    :param by: their name
    """

    approved: bool
    by: str


def ask(ti_id: Any, subject: str, body: str, assigned_users: Any = None) -> None:
    """Ask whether to go on; a question of this task that was answered before is open again, its text as it was.

    :param ti_id: of the task instance that runs
    :param assigned_users: who may answer, as Airflow's human-in-the-loop operators take them; None for anybody who may
        see the task
    """
    from airflow.sdk.execution_time.hitl import upsert_hitl_detail

    # The API server refuses a question whose form is None.
    upsert_hitl_detail(ti_id, [APPROVE, REJECT], subject, body, params={}, assigned_users=assigned_users or None)


def stored(ti_id: Any) -> Said | None:
    """What was answered to the task's question; None so far. On a worker, or in a thread of the triggerer."""
    from airflow.sdk.execution_time.hitl import get_hitl_detail_content_detail

    detail = get_hitl_detail_content_detail(ti_id=ti_id)
    if not detail.response_received or not detail.chosen_options:
        return None
    return said({"chosen_options": detail.chosen_options, "responded_by_user": detail.responded_by_user})


def said(event: Mapping[str, Any]) -> Said:
    """The answer in the event with which Airflow resumes a deferred task."""
    user = event.get("responded_by_user") or {}
    name = user.get("name") if isinstance(user, Mapping) else getattr(user, "name", None)
    return Said(event["chosen_options"] == [APPROVE], str(name or "a default"))
