"""Who is asked, what silence means, and that an answer belongs to the decision it was given on."""

from __future__ import annotations

import datetime as dt
import uuid
from types import SimpleNamespace

import pytest
from support.required_actions import RequiredActions

from airflow_mlops.approval import APPROVE, REJECT, Approval, Said, ask_about, said
from airflow_mlops.exceptions import ApprovalError, InvalidInputError
from airflow_mlops.operators._approval import decided, gate_question, markdown_table

CHECKS = [
    {"name": "log_loss", "passed": False, "value": "gain 0.001|0", "limit": "above 0"},
    {"name": "latency", "passed": True, "value": "p99 4.1 ms", "limit": "at most 50 ms"},
]
RESULT = {
    "passed": True,
    "reasons": ["log_loss: gain 0.02"],
    "checks": CHECKS,
    "rows": 100,
    "metrics": {"challenger": {"auc": 0.771234567}, "champion": {"auc": 0.71}},
    "challenger_uri": "/models/june",
    "champion_uri": "models:/late/2",
    "champion_version": "2",
    "report_uri": "/reports/report.html",
}
LOST = RESULT | {"passed": False, "reasons": ["log_loss: gain 0.001; required: above 0"]}


@pytest.fixture
def airflow(monkeypatch):
    found = RequiredActions()
    monkeypatch.setattr("airflow.sdk.execution_time.task_runner.SUPERVISOR_COMMS", found, raising=False)
    return found


class TestApproval:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (True, Approval()),
            ("True", Approval()),
            (False, None),
            ("false", None),
            ({}, Approval()),
            ({"timeout": "60", "on_timeout": "fail"}, Approval(timeout=60.0, on_timeout="fail")),
            ("{'timeout': None}", Approval(timeout=None)),
            ({"assigned_users": "7"}, Approval(assigned_users=({"id": "7", "name": "7"},))),
            (
                Approval(assigned_users=["7", {"id": 8, "name": "ops"}]),
                Approval(assigned_users=({"id": "7", "name": "7"}, {"id": "8", "name": "ops"})),
            ),
        ],
    )
    def test_it_is_itself_a_mapping_a_word_or_their_text(self, value, expected):
        assert Approval.of(value) == expected

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (None, "after templating; give a mapping, True, or False"),
            ("", "after templating"),
            ("None", "after templating"),
            ("carol", "approval is 'carol'; expected a dict"),
            ({"users": ["carol"]}, r"approval has no \['users'\]; it has \['assigned_users'"),
            ({"timeout": 0}, "timeout is 0; expected seconds above 0, or None"),
            ({"timeout": "soon"}, "timeout is 'soon'"),
            ({"timeout": float("nan")}, "timeout is nan"),
            ({"on_timeout": "pass"}, "on_timeout is 'pass'; expected one of"),
            ({"when": "never"}, "when is 'never'; expected one of"),
            ({"assigned_users": [{"name": "carol"}]}, "in assigned_users is no user"),
            ({"assigned_users": [""]}, "in assigned_users is no user"),
        ],
    )
    def test_what_it_is_not_is_said(self, value, message):
        with pytest.raises(InvalidInputError, match=message):
            Approval.of(value)

    @pytest.mark.parametrize(
        ("when", "concerned"),
        [("passed", (True, False)), ("failed", (False, True)), ("always", (True, True))],
    )
    def test_the_verdicts_somebody_is_asked_about(self, when, concerned):
        approval = Approval(when=when)
        assert (approval.concerns(True), approval.concerns(False)) == concerned

    @pytest.mark.parametrize(
        ("on_timeout", "overriding", "default"),
        [
            ("reject", False, REJECT),
            ("reject", True, REJECT),
            ("approve", False, APPROVE),
            ("approve", True, REJECT),
            ("fail", False, None),
            ("fail", True, None),
        ],
    )
    def test_silence_never_overrules_a_verdict(self, on_timeout, overriding, default):
        approval = Approval(on_timeout=on_timeout)
        assert approval.default(overriding=overriding) == default
        assert Approval(on_timeout=on_timeout, timeout=None).default(overriding=overriding) is None


class TestAsking:
    def ask(self, facts=("v3",), **changes):
        approval = Approval(**{"assigned_users": ["carol"], "timeout": 60} | changes).validate()
        return ask_about(uuid.UUID(int=1), "Go on?", "The numbers.", list(facts), approval)

    def test_the_question_names_options_users_and_default(self, airflow):
        assert self.ask() == dt.timedelta(seconds=60)
        (sent,) = airflow.sent
        assert (sent.options, sent.defaults, sent.multiple) == ([APPROVE, REJECT], [REJECT], False)
        assert [(user.id, user.name) for user in sent.assigned_users] == [("carol", "carol")]
        assert sent.body.startswith("The numbers.\n\nDecision `")

    def test_without_a_deadline_there_is_no_default(self, airflow):
        assert self.ask(timeout=None) is None
        assert airflow.sent[0].defaults is None

    def test_the_same_decision_may_be_asked_about_again(self, airflow):
        self.ask(), self.ask(timeout=90)
        assert len(airflow.sent) == 2

    @pytest.mark.parametrize(
        "changes", [{"facts": ["v4"]}, {"assigned_users": ["dave"]}, {"on_timeout": "approve"}, {"timeout": None}]
    )
    def test_the_question_of_another_decision_is_not_answered_for_this_one(self, airflow, changes):
        self.ask()
        with pytest.raises(ApprovalError, match="shows that of an earlier try"):
            self.ask(**changes)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            {"chosen_options": [APPROVE], "responded_by_user": {"id": "7", "name": "ops"}},
            Said(True, "ops", "7"),
        ),
        (
            {
                "chosen_options": [REJECT],
                "responded_by_user": SimpleNamespace(id="7", name="ops"),
                "responded_at": dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc),
            },
            Said(False, "ops", "7", "2026-01-01T00:00:00+00:00"),
        ),
        ({"chosen_options": [APPROVE], "responded_by_user": None}, Said(True, "a default")),
        ({"chosen_options": [], "responded_by_user": None}, Said(False, "a default")),
        ({"chosen_options": [APPROVE, REJECT]}, Said(False, "a default")),
    ],
)
def test_an_answer_is_read(event, expected):
    assert said(event) == expected


class TestDecided:
    OPS = Said(True, "ops", "7", "2026-01-01")
    NO = Said(False, "ops", "7", "2026-01-01")

    def test_an_approval_leaves_the_verdict_and_says_whose_it_is(self):
        found = decided(RESULT, self.OPS)
        assert found["passed"] and found["reasons"] == RESULT["reasons"]
        assert found["approval"] == {**self.OPS.to_json(), "overrode": False}

    def test_an_approval_against_the_verdict_is_on_record(self):
        found = decided(LOST, self.OPS)
        assert found["passed"] and found["approval"]["overrode"]
        assert found["reasons"] == ["approved by ops against the verdict", *LOST["reasons"]]

    @pytest.mark.parametrize(
        ("result", "reasons"), [(RESULT, ["rejected by ops"]), (LOST, ["rejected by ops", *LOST["reasons"]])]
    )
    def test_a_rejection_is_a_verdict_that_did_not_pass(self, result, reasons):
        found = decided(result, self.NO)
        assert found["passed"] is False and found["reasons"] == reasons and not found["approval"]["overrode"]

    def test_silence_without_a_default_is_no_pass(self):
        found = decided(RESULT, None)
        assert found["passed"] is False and found["reasons"][0] == "nobody approved it in time"


class TestGateQuestion:
    def test_it_shows_the_verdict(self):
        subject, body, _ = gate_question(LOST, "gate")
        assert subject == "The challenger did NOT pass gate against champion 2. Overrule the gate?"
        assert "| log_loss | gain 0.001\\|0 | above 0 | **no** |" in body
        assert "| metric | challenger | champion |" in body and "| auc | 0.77123 | 0.71 |" in body
        assert "Report: `/reports/report.html`" in body
        assert gate_question(RESULT, "gate")[0].endswith("May it go on?")

    def test_a_page_that_a_browser_reaches_is_a_link(self):
        assert "[https://r/x](https://r/x)" in gate_question(RESULT | {"report_uri": "https://r/x"}, "gate")[1]

    def test_measured_times_make_no_other_decision(self):
        slower = [CHECKS[0], CHECKS[1] | {"value": "p99 4.3 ms"}]
        facts = gate_question(RESULT, "gate")[2]
        assert gate_question(RESULT | {"checks": slower}, "gate")[2] == facts
        other = RESULT | {"metrics": {"challenger": {"auc": 0.6}}}
        assert gate_question(other, "gate")[2] != facts
        assert gate_question(RESULT | {"champion_version": "3"}, "gate")[2] != facts

    def test_a_long_table_is_cut_and_says_so(self):
        text = markdown_table(["a"], [[i] for i in range(40)])
        assert "| 29 |" in text and "| 30 |" not in text and text.endswith("and 10 more in the report")
