"""Tells people of a rollout that they should know of, through whatever notifier they use."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseNotifier

from airflow_mlops.exceptions import InvalidInputError

if TYPE_CHECKING:
    from airflow.sdk import Context

VERDICTS = ("PROMOTE", "ROLLBACK", "CONCLUDE")
_WORDS = {"PROMOTE": "promoted", "ROLLBACK": "rolled back", "CONCLUDE": "test concluded"}


class RolloutNotifier(BaseNotifier):
    """Passes the result of a :class:`~airflow_mlops.operators.canary.CanaryPromoteOperator` on to another notifier,
    when it is one of the verdicts that are worth a message.

    For the operator's ``on_success_callback``, ``on_failure_callback`` and ``on_skipped_callback``: how a rollback
    ends the task is the operator's ``on_rollback``. The other notifier's templates know ``rollout``, the result, and
    ``rollout_subject`` and ``rollout_text``, a line and a few about it::

        tell = RolloutNotifier(
            SmtpNotifier(to="ml@x.com", subject="{{ rollout_subject }}", html_content="<pre>{{ rollout_text }}</pre>")
        )
        CanaryPromoteOperator(..., on_success_callback=tell, on_failure_callback=tell, on_skipped_callback=tell)

    :param notifier: any notifier of any provider
    :param verdicts: those to tell of
    :param failures: tell also of a task that failed before there was a verdict; ``rollout`` is then empty
    """

    def __init__(
        self, notifier: BaseNotifier, *, verdicts: Sequence[str] = ("ROLLBACK", "CONCLUDE"), failures: bool = True
    ) -> None:
        super().__init__()
        self.notifier = notifier
        self.verdicts = verdicts
        self.failures = failures

    def notify(self, context: Context) -> None:
        """Render and send, or stay silent."""
        if isinstance(self.verdicts, str) or set(self.verdicts) - set(VERDICTS):
            raise InvalidInputError(f"verdicts is {self.verdicts!r}; expected a list of {', '.join(VERDICTS)}")
        ti = context["ti"]
        result = ti.xcom_pull(task_ids=ti.task_id, map_indexes=ti.map_index)
        if isinstance(result, Mapping) and result.get("verdict") in VERDICTS:
            if result["verdict"] in self.verdicts:
                self._send(context, result, subject(result), text(result))
            else:
                self.log.info("%s is not worth a message", result["verdict"])
        elif self.failures and context.get("exception") is not None:
            heading = f"{ti.dag_id}.{ti.task_id}: the rollout failed without a verdict"
            self._send(context, {}, heading, f"{heading}\n\n{context['exception']}")
        else:
            self.log.warning("the task has no verdict to tell of; is this the callback of a CanaryPromoteOperator?")

    def _send(self, context: Context, result: Mapping[str, Any], heading: str, body: str) -> None:
        # A notifier keeps what its templates rendered to, so each message gets one of its own.
        notifier = copy.copy(self.notifier)
        notifier({**context, "rollout": result, "rollout_subject": heading, "rollout_text": body})


def subject(result: Mapping[str, Any]) -> str:
    """The result in one line."""
    previous = f" against version {result['previous']}" if result.get("previous") else ""
    return f"{result['model']}, version {result['version']}{previous}: {_WORDS[result['verdict']]}"


def text(result: Mapping[str, Any]) -> str:
    """The result in a few lines: reasons, and where to read on."""
    lines = [subject(result), "", *(f"- {reason}" for reason in result.get("reasons") or ())]
    places = {"report": "html_uri", "image": "png_uri", "MLflow": "mlflow_url"}
    found = [f"{name}: {result[key]}" for name, key in places.items() if result.get(key)]
    return "\n".join([*lines, "", *found] if found else lines)
