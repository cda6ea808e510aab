"""A stand-in for Prometheus's API whose answers tests write by hand."""

from __future__ import annotations

import asyncio
import re
import time

import pytest
from aiohttp import web

from airflow_mlops.rollout.targets.protocol import TargetState


class StandIn:
    """Answers a query part by part, ``parts[part]`` giving a list of (labels, value); or with ``answer`` as it is."""

    def __init__(self):
        self.parts, self.answer, self.requests, self.delay, self.extra = {}, None, [], 0.0, {}
        self.url = ""

    async def handle(self, request):
        form = dict(await request.post()) if request.method == "POST" else dict(request.query)
        self.requests.append((request.method, request.path, form, dict(request.headers)))
        await asyncio.sleep(self.delay)
        if self.answer is not None:
            status, text = self.answer(request) if callable(self.answer) else self.answer
            headers = {"Location": "/login"} if 300 <= status < 400 else {}
            return web.Response(status=status, text=text, headers=headers)
        result = []
        for part in re.findall(r'"mlops_part", "([^"]+)"', form["query"]):
            for labels, value in self.parts.get(part, []):
                element = value if isinstance(value, dict) else {"value": [float(form["time"]), str(value)]}
                result.append({"metric": {**labels, "mlops_part": part}, **element})
        return web.json_response(
            {"status": "success", "data": {"resultType": "vector", "result": result}, **self.extra}
        )

    def give(self, arm, metric, values, *, part=None, age=0.0, now=None):
        """Values by replica, and the times of their samples."""
        key = f"{arm}/{metric}/{part or 'count'}"
        stamp = (time.time() if now is None else now) - age
        self.parts[f"{key}/value"] = [({"pod": pod} if pod else {}, value) for pod, value in values.items()]
        self.parts[f"{key}/time"] = [({"pod": pod} if pod else {}, stamp) for pod in values]


@pytest.fixture
async def standin():
    made = StandIn()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    yield made
    await runner.cleanup()


@pytest.fixture
def target():
    """``target(**changes)``: a canary with a tenth of the traffic."""

    def make(**changes):
        fields = {"time": time.time(), "epoch": "1", "weight": 10.0, "configured": 10.0, "stable": "1", "canary": "2"}
        return TargetState(**{**fields, **changes})

    return make
