"""A decision that waits for a person: the question, the wait, and the words for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import BaseOperator

from airflow_mlops.approval import Approval, Said, ask_about, said
from airflow_mlops.exceptions import ApprovalError
from airflow_mlops.shell import is_blank

if TYPE_CHECKING:
    from airflow.sdk import BaseNotifier, Context

MAX_ROWS = 30


class ApprovalMixin(BaseOperator):
    """An operator one of whose decisions may need a person.

    It waits in Airflow's state ``awaiting_input``, without a worker or a trigger, and goes on in ``execute_complete``
    with what was answered in the UI or by the REST API, before or after it began to wait, or at the deadline.

    :param approval: an :class:`airflow_mlops.approval.Approval`, a mapping of its fields, or True; None for none
        (templated)
    :param approval_notifiers: told when somebody is asked
    """

    def __init__(
        self,
        *,
        approval: Approval | Mapping[str, Any] | bool | str | None = None,
        approval_notifiers: Sequence[BaseNotifier] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.approval = approval
        self.approval_notifiers = approval_notifiers
        # A template that came out empty must not do away with the question.
        self._approval_given = approval is not None

    def _approval(self) -> Approval | None:
        """The approval that is wanted, checked."""
        return Approval.of(self.approval) if self._approval_given else None

    def _ask(
        self,
        context: Context,
        approval: Approval,
        subject: str,
        body: str,
        facts: Any,
        *,
        overriding: bool = False,
        **kept: Any,
    ) -> NoReturn:
        """Ask, tell who wants to be told, and wait.

        :param kept: arguments of ``execute_complete`` besides ``context`` and ``event``
        :raises TaskAwaitingInput: always
        """
        from airflow.sdk.exceptions import TaskAwaitingInput

        wait = ask_about(context["ti"].id, subject, body, facts, approval, overriding=overriding)
        for notifier in self.approval_notifiers:
            notifier(context)
        self.log.info("%s Waiting for an answer %s", subject, f"for {wait}" if wait else "without end")
        raise TaskAwaitingInput(method_name="execute_complete", kwargs=kept, timeout=wait)

    def _answer(self, event: Mapping[str, Any]) -> Said | None:
        """What was said; None where nobody answered in time and silence is no answer.

        :raises ApprovalError: Airflow could not read the answer
        """
        if event.get("error_type") == "timeout":
            return None
        if "chosen_options" not in event:
            raise ApprovalError(f"the answer could not be read: {event.get('error') or event}")
        answer = said(event)
        self.log.info("%s by %s", "approved" if answer.approved else "rejected", answer.by)
        return answer


def decided(result: Mapping[str, Any], answer: Said | None) -> dict[str, Any]:
    """A gate's result after a person's word: ``passed`` is theirs, ``approval`` says whose.

    :param answer: None where nobody answered
    """
    passed, reasons = result["passed"], list(result.get("reasons") or ())
    if answer is None:
        return {**result, "passed": False, "reasons": ["nobody approved it in time", *reasons], "approval": None}
    record = {**answer.to_json(), "overrode": answer.approved and not passed}
    if not answer.approved:
        reasons = [f"rejected by {answer.by}", *(reasons if not passed else ())]
    elif not passed:
        reasons = [f"approved by {answer.by} against the verdict", *reasons]
    return {**result, "passed": answer.approved, "reasons": reasons, "approval": record}


def gate_question(result: Mapping[str, Any], task: str) -> tuple[str, str, Any]:
    """Subject, body (Markdown) and facts of the question about a gate's result."""
    word = "passed" if result["passed"] else "did NOT pass"
    champion = result.get("champion_version") or result.get("champion_uri")
    against = f"against champion {champion}" if champion else "without a champion"
    subject = f"The challenger {word} {task} {against}. May it go on?"
    if not result["passed"]:
        subject = f"The challenger {word} {task} {against}. Overrule the gate?"
    body = "\n\n".join([f"Challenger: {_code(result.get('challenger_uri'))}", verdict_text(result)])
    # Times differ between two tries of one decision.
    told = ("passed", "challenger_uri", "challenger_digest", "champion_uri", "champion_version", "rows")
    facts = {key: result.get(key) for key in told}
    # So do the last digits on another machine.
    facts["metrics"] = {
        arm: {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in (found or {}).items()}
        for arm, found in (result.get("metrics") or {}).items()
    }
    facts["checks"] = [[check["name"], check["passed"], check["limit"]] for check in result.get("checks") or ()]
    return subject, body, facts


def verdict_text(result: Mapping[str, Any]) -> str:
    """A gate's verdict as Markdown: reasons, checks, metrics of both arms, where the report is."""
    parts = [f"**The gate {'passed' if result.get('passed') is True else 'did not pass'}.**"]
    parts.append("\n".join(f"- {_cell(reason)}" for reason in result.get("reasons") or ()))
    checks = [
        [check["name"], check["value"], check["limit"], "yes" if check["passed"] else "**no**"]
        for check in result.get("checks") or ()
    ]
    parts.append(markdown_table(["check", "found", "required", "holds"], checks))
    metrics = result.get("metrics") or {}
    arms = {arm: metrics[arm] for arm in ("challenger", "champion") if metrics.get(arm)}
    names = list(next(iter(arms.values()), {}))
    rows = [[name, *(values.get(name) for values in arms.values())] for name in names]
    parts.append(markdown_table(["metric", *arms], rows))
    if not is_blank(report := result.get("report_uri")):
        parts.append(f"Report: {_link(str(report))}")
    return "\n\n".join(part for part in parts if part)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; empty without rows, cut after thirty."""
    if not rows:
        return ""
    lines = [list(header), ["---"] * len(header), *rows[:MAX_ROWS]]
    text = "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)
    return text if len(rows) <= MAX_ROWS else f"{text}\n\nand {len(rows) - MAX_ROWS} more in the report"


def _cell(value: Any) -> str:
    text = "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _code(value: Any) -> str:
    return f"`{str(value).replace('`', '')}`"


def _link(uri: str) -> str:
    return f"[{uri}]({uri})" if uri.startswith(("http://", "https://")) else _code(uri)
