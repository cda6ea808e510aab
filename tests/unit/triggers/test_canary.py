"""The trigger's round trip, its errors, and that it leaves the triggerer's loop free."""

from __future__ import annotations

import asyncio
import json
import time
import uuid

import pytest
from airflow.sdk.api.datamodels._generated import HITLDetailResponse
from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType
from airflow.sdk.execution_time.comms import ErrorResponse

from airflow_mlops.rollout.judge import APPROVE, Verdict
from airflow_mlops.rollout.spec import RolloutSpec
from airflow_mlops.triggers.canary import CanaryTrigger


def arguments(**changes):
    spec = RolloutSpec("flights", "2", "/models/2", "1", "/models/1", "owner").to_json()
    target = {"kind": "ray_serve", "name": "flights", "serve_url": "http://127.0.0.1:9"}
    return {"spec": {**spec, "guardrails": None, **changes}, "place": {"target": target}}


def trigger(**changes):
    return CanaryTrigger(**arguments(**changes))


def test_serialization_round_trip():
    path, kwargs = trigger().serialize()
    assert path == "airflow_mlops.triggers.canary.CanaryTrigger"
    assert CanaryTrigger(**json.loads(json.dumps(kwargs))).serialize() == (path, kwargs)


async def test_an_unreachable_ray_becomes_a_retryable_error(monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps({"conn_type": "ray", "host": "http://127.0.0.1:9"}))
    event = (await anext(trigger().run())).payload
    assert event["status"] == "error" and event["retryable"] is True and "Is Ray running" in event["error"]


async def test_a_bad_specification_becomes_a_permanent_error():
    event = (await anext(trigger(policy={"steps": [100]}).run())).payload
    assert event["status"] == "error" and event["retryable"] is False and "steps" in event["error"]


async def test_killing_without_ray_does_not_raise(monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps({"conn_type": "ray", "host": "http://127.0.0.1:9"}))
    await trigger().on_kill()


async def test_waiting_for_a_silent_server_leaves_the_loop_free(monkeypatch):
    async def never(reader, writer):
        await asyncio.sleep(60)

    server = await asyncio.start_server(never, "127.0.0.1", 0)
    host = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps({"conn_type": "ray", "host": host}))
    await anext(trigger(policy={"steps": [100]}).run())  # imports, which may block once
    task = asyncio.ensure_future(anext(trigger().run()))
    started = time.monotonic()
    for _ in range(20):
        await asyncio.sleep(0.01)
    # A blocking call would hold the loop for the client's whole time-out of 15 s.
    assert time.monotonic() - started < 5 and not task.done()
    task.cancel()
    server.close()


class Question:
    """Airflow's side of one task's question: what it stores, and that nobody may read it on the triggerer's loop."""

    def __init__(self, ti_id, chosen):
        self.detail = HITLDetailResponse(
            response_received=bool(chosen),
            chosen_options=chosen,
            responded_at="2026-01-01T00:00:00Z" if chosen else None,
            responded_by_user={"id": "7", "name": "ops"} if chosen else None,
            params_input={},
        )
        self.ti_id = ti_id

    def send(self, msg):
        assert str(msg.ti_id) == self.ti_id
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return self.detail


@pytest.mark.parametrize(
    ("chosen", "found"), [(["Approve"], (2, True, "ops")), (["Reject"], (2, False, "ops")), ([], None)]
)
async def test_an_answer_that_came_before_the_task_was_deferred_is_found(monkeypatch, chosen, found):
    ti_id = str(uuid.uuid4())
    comms = Question(ti_id, chosen)
    monkeypatch.setattr("airflow.sdk.execution_time.task_runner.SUPERVISOR_COMMS", comms, raising=False)
    waiting = CanaryTrigger(**arguments(), asked=2, ti_id=ti_id)
    answer = await waiting._ask(Verdict(APPROVE, 50, 2, 7, []))
    assert (answer and (answer.step, answer.approved, answer.by)) == found


async def test_an_api_server_that_is_away_does_not_end_the_rollout(monkeypatch):
    class Away:
        def send(self, msg):
            raise AirflowRuntimeError(ErrorResponse(error=ErrorType.API_SERVER_ERROR, detail={"status_code": 502}))

    monkeypatch.setattr("airflow.sdk.execution_time.task_runner.SUPERVISOR_COMMS", Away(), raising=False)
    waiting = CanaryTrigger(**arguments(), asked=2, ti_id=str(uuid.uuid4()))
    assert await waiting._ask(Verdict(APPROVE, 50, 2, 7, [])) is None
