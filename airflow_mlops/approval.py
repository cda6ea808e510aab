"""A question to a person among Airflow's required actions, and what they said."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from airflow_mlops.exceptions import ApprovalError, InvalidInputError
from airflow_mlops.shell import as_mapping, is_blank

APPROVE, REJECT = "Approve", "Reject"
ON_TIMEOUT = ("reject", "approve", "fail")
WHEN = ("passed", "failed", "always")


@dataclass(frozen=True)
class Approval:
    """Who has to agree, until when, and what their silence means.

    :param assigned_users: who may answer: ids of Airflow users, or mappings of ``id`` and ``name``; empty for anybody
        who may see the task
    :param timeout: seconds from the question on; None to wait without end
    :param on_timeout: what silence is after that: ``"reject"``, ``"approve"``, or ``"fail"``, which fails the task
        whatever a rejection does
    :param when: of the gate, the verdicts that somebody is asked about: ``"passed"``, ``"failed"`` (they may override
        it; silence never does), ``"always"``
    """

    assigned_users: Sequence[Mapping[str, str] | str] = ()
    timeout: float | None = 86_400.0
    on_timeout: str = "reject"
    when: str = "passed"

    @classmethod
    def of(cls, value: Any) -> Approval | None:
        """The approval that an argument asks for: an :class:`Approval`, a mapping of its fields, True, or the text
        that Jinja makes of one; None where it is False.

        :raises InvalidInputError: it is something else; a value that came out empty is no way to skip the question
        """
        if isinstance(value, cls):
            return value.validate()
        word = str(value).strip().lower()
        if word in ("true", "false"):
            return cls() if word == "true" else None
        if is_blank(value):
            raise InvalidInputError(
                f"approval is {value!r} after templating; give a mapping, True, or False to go on without a question"
            )
        fields, known = as_mapping(value, "approval"), [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise InvalidInputError(f"approval has no {unknown}; it has {known}")
        return cls(**fields).validate()

    def validate(self) -> Approval:
        """This approval, its numbers as numbers and its users as mappings.

        :raises InvalidInputError: a field is not what it may be
        """
        for name, allowed in (("on_timeout", ON_TIMEOUT), ("when", WHEN)):
            if getattr(self, name) not in allowed:
                raise InvalidInputError(f"approval: {name} is {getattr(self, name)!r}; expected one of {allowed}")
        timeout = None
        if not is_blank(self.timeout):
            try:
                timeout = float(self.timeout)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                timeout = math.nan
            if not 0 < timeout < math.inf:
                raise InvalidInputError(f"approval: timeout is {self.timeout!r}; expected seconds above 0, or None")
        return dataclasses.replace(self, timeout=timeout, assigned_users=tuple(_users(self.assigned_users)))

    def concerns(self, passed: bool) -> bool:
        """Whether somebody is asked about such a verdict."""
        return self.when == "always" or (self.when == "passed") == passed

    def default(self, *, overriding: bool = False) -> str | None:
        """What Airflow answers at the deadline; None where the task fails then."""
        if self.timeout is None or self.on_timeout == "fail":
            return None
        return APPROVE if self.on_timeout == "approve" and not overriding else REJECT


@dataclass(frozen=True)
class Said:
    """What somebody answered.

    :param approved: whether they approved
    :param by: their name; ``"a default"`` where it was silence
    :param user_id: their id in Airflow; None where it was silence
    :param at: when, ISO 8601
    """

    approved: bool
    by: str
    user_id: str | None = None
    at: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


def ask(ti_id: Any, subject: str, body: str, assigned_users: Any = None) -> None:
    """Ask whether to go on; a question of this task that was answered before is open again, its text as it was.

    :param ti_id: of the task instance that runs
    :param assigned_users: who may answer, as Airflow's human-in-the-loop operators take them; None for anybody who may
        see the task
    """
    from airflow.sdk.execution_time.hitl import upsert_hitl_detail

    # The API server refuses a question whose form is None.
    upsert_hitl_detail(ti_id, [APPROVE, REJECT], subject, body, params={}, assigned_users=assigned_users or None)


def ask_about(
    ti_id: Any, subject: str, body: str, facts: Any, approval: Approval, *, overriding: bool = False
) -> dt.timedelta | None:
    """Ask about one decision, and make sure that it is this one that people are shown.

    Airflow keeps one question for a task of a run, over its tries, with the text, the users and the default it was
    first asked with. The text ends with a mark of all of them, so that nobody agrees to what an earlier try had found.

    :param facts: what the decision rests on, plain JSON types; the same facts are the same decision
    :param overriding: whether approval would go against a verdict, which silence must not do
    :return: until when to wait, from now; None without end
    :raises ApprovalError: Airflow shows the question of another decision
    """
    from airflow.sdk.api.datamodels._generated import HITLUser
    from airflow.sdk.execution_time.comms import CreateHITLDetailPayload
    from airflow.sdk.execution_time.task_runner import SUPERVISOR_COMMS

    default = approval.default(overriding=overriding)
    signed = json.dumps([subject, facts, default, approval.assigned_users], sort_keys=True, default=str)
    mark = f"Decision `{hashlib.sha256(signed.encode()).hexdigest()[:12]}`"
    shown = SUPERVISOR_COMMS.send(
        CreateHITLDetailPayload(
            ti_id=ti_id,
            options=[APPROVE, REJECT],
            subject=subject,
            body=f"{body}\n\n{mark}",
            defaults=None if default is None else [default],
            params={},  # the API server refuses a question whose form is None
            assigned_users=[HITLUser.model_validate(user) for user in approval.assigned_users],
        )
    )
    if not str(getattr(shown, "body", None) or "").endswith(mark):
        raise ApprovalError(
            "Airflow keeps one question for a task of a run, and shows that of an earlier try, which was about other "
            "numbers, other users or another deadline's answer. Nobody was asked; trigger a new run."
        )
    return None if approval.timeout is None else dt.timedelta(seconds=approval.timeout)


def stored(ti_id: Any) -> Said | None:
    """What was answered to the task's question; None so far. On a worker, or in a thread of the triggerer."""
    from airflow.sdk.execution_time.hitl import get_hitl_detail_content_detail

    detail = get_hitl_detail_content_detail(ti_id=ti_id)
    if not detail.response_received or not detail.chosen_options:
        return None
    return said({"chosen_options": detail.chosen_options, "responded_by_user": detail.responded_by_user})


def said(event: Mapping[str, Any]) -> Said:
    """The answer in the event with which Airflow resumes a task that waited."""
    user = event.get("responded_by_user") or {}
    read = user.get if isinstance(user, Mapping) else lambda name: getattr(user, name, None)
    at = event.get("responded_at")
    return Said(
        event["chosen_options"] == [APPROVE],
        str(read("name") or read("id") or "a default"),
        None if read("id") is None else str(read("id")),
        at.isoformat() if isinstance(at, dt.datetime) else at,
    )


def _users(given: Any) -> list[dict[str, str]]:
    users = [given] if isinstance(given, str | Mapping) else list(given or ())
    found = []
    for user in users:
        named = {"id": user, "name": user} if isinstance(user, str) else dict(user) if isinstance(user, Mapping) else {}
        if is_blank(named.get("id")):
            raise InvalidInputError(
                f"approval: {user!r} in assigned_users is no user; expected an id, or a mapping of id and name"
            )
        found.append({"id": str(named["id"]), "name": str(named.get("name") or named["id"])})
    return found
