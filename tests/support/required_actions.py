"""Airflow's side of the questions of one task, where a test has no API server."""

from __future__ import annotations

from typing import Any

from airflow.sdk import BaseNotifier
from airflow.sdk.execution_time.comms import CreateHITLDetailPayload, HITLDetailRequestResult

YES = {"chosen_options": ["Approve"], "responded_by_user": {"id": "7", "name": "ops"}, "responded_at": "2026-01-01"}
NO = {**YES, "chosen_options": ["Reject"]}
SILENCE = {"chosen_options": ["Reject"], "responded_by_user": None, "timedout": True}
NOBODY = {"error": "the timeout has passed", "error_type": "timeout"}


class RequiredActions:
    """Stands for the supervisor of a task: it keeps a question's first text, as the API server does."""

    def __init__(self) -> None:
        self.sent: list[CreateHITLDetailPayload] = []

    def send(self, msg: Any) -> HITLDetailRequestResult:
        assert isinstance(msg, CreateHITLDetailPayload)
        self.sent.append(msg)
        first = self.sent[0].model_dump(exclude={"type", "ti_id"})
        return HITLDetailRequestResult(**first, ti_id=msg.ti_id)


class Told(BaseNotifier):
    """Counts how often it was told."""

    template_fields = ()

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def notify(self, context: Any) -> None:
        self.times += 1
