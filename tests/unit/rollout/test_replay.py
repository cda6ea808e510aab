"""The replay against a real HTTP server that answers as a route does."""

from __future__ import annotations

import asyncio

import numpy as np
import pandas as pd
import pytest
from aiohttp import web

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError
from airflow_mlops.rollout.replay import areplay, frame_rows, rollout_begun, rollout_settled


@pytest.fixture
async def route():
    """Records what it gets; request ids that end in 7 fail."""
    seen = {
        "single": [],
        "batched": [],
        "labels": [],
        "busy": 0,
        "most_busy": 0,
        "sent_before_labels": [],
        "state": {"rollout": {}},
    }

    def answer(item):
        failed = item["request_id"].endswith("7")
        return {"error": "unknown carrier"} if failed else {"request_id": item["request_id"], "arm": "stable"}

    async def predict(request):
        seen["busy"] += 1
        seen["most_busy"] = max(seen["most_busy"], seen["busy"])
        await asyncio.sleep(0.005)
        seen["busy"] -= 1
        body = await request.json()
        if "items" in body:
            seen["batched"] += [item["request_id"] for item in body["items"]]
            return web.json_response({"results": [answer(item) for item in body["items"]]})
        seen["single"].append(body["request_id"])
        return web.json_response(answer(body), status=500 if "error" in answer(body) else 200)

    async def feedback(request):
        seen["sent_before_labels"].append(len(seen["single"]) + len(seen["batched"]))
        seen["labels"] += [(item["request_id"], item["label"]) for item in (await request.json())["items"]]
        return web.json_response({})

    async def state(request):
        return web.json_response(seen["state"])

    app = web.Application()
    app.add_routes([web.post("/m", predict), web.post("/m/feedback", feedback), web.get("/m/state", state)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    seen["url"] = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/m"
    yield seen
    await runner.cleanup()


def rows(count):
    return [{"request_id": f"r{i}", "features": {"a": i}, "label": i % 2} for i in range(count)]


async def test_every_row_is_sent_once_and_labelled_unless_it_failed(route):
    report = await areplay(route["url"], rows(100), concurrency=4, batch_size=10, single_share=0.2)
    ids = [f"r{i}" for i in range(100)]
    assert sorted(route["single"] + route["batched"]) == sorted(ids) and len(route["single"]) == 20
    good = [(name, float(i % 2)) for i, name in enumerate(ids) if not name.endswith("7")]
    assert sorted(route["labels"]) == sorted(good)
    assert (report.requests, report.failed, report.labels, report.arms) == (100, 10, 90, {"stable": 90})
    assert 1 < route["most_busy"] <= 4 and "unknown carrier" in report.errors[0]


async def test_labels_follow_their_requests_while_the_replay_goes_on(route):
    """A judge of losses would else see no label before the traffic is over."""
    await areplay(route["url"], rows(400), concurrency=2, labels_per_call=50)
    assert len(route["sent_before_labels"]) >= 8
    assert 50 <= route["sent_before_labels"][0] < 100 and route["sent_before_labels"][3] < 300


async def test_it_stops_when_the_rollout_is_settled_and_waits_for_its_beginning(route):
    task = asyncio.create_task(
        areplay(
            route["url"],
            rows(10**6),
            start_when=rollout_begun("3"),
            stop_when=rollout_settled("3"),
            check_every=0.05,
        )
    )
    await asyncio.sleep(0.2)
    assert not route["single"]
    route["state"] = {"rollout": {"version": "3"}}
    await asyncio.sleep(0.3)
    assert route["single"] and not task.done()
    route["state"] = {"rollout": {"version": "3", "finished": {"verdict": "PROMOTE"}}}
    report = await asyncio.wait_for(task, 10)
    assert report.stopped and report.requests == len(route["single"])


async def test_rate_and_time_are_limits(route):
    report = await areplay(route["url"], rows(10**6), rate=50, max_seconds=0.6, check_every=0.05)
    assert 5 <= report.requests <= 60


async def test_a_route_that_never_answers_is_an_error():
    with pytest.raises(ExternalSystemError, match="does not answer"):
        await areplay("http://127.0.0.1:9/m", rows(1), wait_seconds=0.2, check_every=0.05)


def test_frames_become_rows_without_nan():
    frame = pd.DataFrame({"a": [1, 2], "b": [0.5, np.nan], "late": [1, 0]})
    assert frame_rows(frame, ["a", "b"], "late", "x") == [
        {"request_id": "x0", "features": {"a": 1, "b": 0.5}, "label": 1},
        {"request_id": "x1", "features": {"a": 2, "b": None}, "label": 0},
    ]
    with pytest.raises(InvalidInputError, match="lacks the columns"):
        frame_rows(frame, ["a", "c"], "late")
