"""A stand-in for a Ray dashboard: its Jobs API as Ray 2.60 answers it, with the faults a test asks for.

What it copies from Ray: a duplicate submission id is a 500, a job that is not known a 404 in plain text, a log socket
sends the log from its start and closes with 1000 at the end, missing tokens are 401 and wrong ones 403.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import WSCloseCode, web

FINAL = ("SUCCEEDED", "FAILED", "STOPPED")
#: Where an API server passes requests on to a service, with this service's name.
PROXY = "/api/v1/namespaces/training/services/cluster-head-svc:8265/proxy"
CHUNK = 100


class RayDashboard:
    """Serves on a free port of the loopback address while its ``with`` block lasts.

    :param token: of the cluster's token authentication; None accepts everybody
    :param gate: bearer token of an API server that stands before it, which then serves under :data:`PROXY`
    """

    def __init__(self, token: str | None = "secret-token", gate: str | None = None) -> None:
        self.token, self.gate = token, gate
        self.jobs: dict[str, dict[str, Any]] = {}
        self.log: dict[str, str] = {}
        self.submitted: list[dict[str, Any]] = []
        self.stopped: list[str] = []
        self.requests: Counter[str] = Counter()
        #: Called with the body of a submission; returns the job's state.
        self.play: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: {"status": "RUNNING"}
        #: What a stop makes of a running job; None: nothing.
        self.on_stop: Callable[[str], dict[str, Any]] | None = lambda name: {"status": "STOPPED"}
        #: The next requests get these statuses instead of an answer, a POST after it took effect.
        self.failures: list[int] = []
        #: Bytes after which the next log sockets break, and whether they then pretend to have ended well.
        self.cuts: list[int] = []
        self.cut_politely = False
        self.delay = 0.0
        self.down = False
        self.open_sockets = 0

    @property
    def address(self) -> str:
        """What a connection's host would say."""
        return f"http://127.0.0.1:{self.port}"

    def connection(self, **extra: Any) -> str:
        """An ``AIRFLOW_CONN_...`` value."""
        value = {"conn_type": "ray", "host": self.address, "password": self.token, "extra": extra}
        return json.dumps(value)

    def finish(self, name: str, status: str = "SUCCEEDED", **fields: Any) -> None:
        """End a job."""
        self.jobs[name] = {**self.jobs.get(name, {}), "status": status, "end_time": _now(), **fields}

    def write(self, name: str, text: str) -> None:
        """Append to a job's log."""
        self.log[name] = self.log.get(name, "") + text

    def __enter__(self) -> RayDashboard:
        started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        started.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        app = web.Application(middlewares=[self._door])
        root = PROXY if self.gate else ""
        app.add_routes(
            [
                web.get(f"{root}/api/version", self._version),
                web.get(f"{root}/api/jobs/", self._list),
                web.post(f"{root}/api/jobs/", self._submit),
                web.get(f"{root}/api/jobs/{{name}}", self._get),
                web.post(f"{root}/api/jobs/{{name}}/stop", self._stop),
                web.get(f"{root}/api/jobs/{{name}}/logs", self._logs),
                web.get(f"{root}/api/jobs/{{name}}/logs/tail", self._tail),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    @web.middleware
    async def _door(self, request: web.Request, handler: Any) -> web.StreamResponse:
        kind = request.path.removeprefix(PROXY).rsplit("/", 1)[-1]
        what = "list" if kind == "" else kind if kind in ("stop", "logs", "tail", "version") else "get"
        self.requests[what if request.method == "GET" or what == "stop" else "submit"] += 1
        if self.delay:
            await asyncio.sleep(self.delay)
        if self.down:
            return web.Response(status=503, text="starting")
        if self.gate and request.headers.get("Authorization") != f"Bearer {self.gate}":
            status = {"kind": "Status", "apiVersion": "v1", "message": "Unauthorized", "code": 401}
            return web.json_response(status, status=401)
        # Ray takes the second header where a proxy has used up the first.
        first = None if self.gate else request.headers.get("Authorization")
        given = request.headers.get("X-Ray-Authorization") or first
        if self.token and given is None:
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        if self.token and given != f"Bearer {self.token}":
            return web.Response(status=403, text="Forbidden: Invalid authentication token")
        if self.failures and request.method == "GET":
            return web.Response(status=self.failures.pop(0), text="No available agent, please try again later.")
        answer = await handler(request)
        if self.failures and request.method == "POST":
            return web.Response(status=self.failures.pop(0), text="No available agent, please try again later.")
        return answer

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"ray_version": "2.60.0"})

    async def _list(self, request: web.Request) -> web.Response:
        driver = {"submission_id": None, "job_id": "01000000", "type": "DRIVER", "status": "RUNNING"}
        return web.json_response([*(self._details(name) for name in self.jobs), driver])

    async def _get(self, request: web.Request) -> web.Response:
        return self._known(request) or web.json_response(self._details(request.match_info["name"]))

    async def _submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = body["submission_id"]
        if name in self.jobs:
            return web.Response(status=500, text=f"ValueError: Job with submission_id {name} already exists.")
        self.submitted.append(body)
        began = {"start_time": _now(), "metadata": body.get("metadata", {})}
        self.jobs[name] = {**began, **self.play(body)}
        return web.json_response({"job_id": name, "submission_id": name})

    async def _stop(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if unknown := self._known(request):
            return unknown
        self.stopped.append(name)
        running = self.jobs[name]["status"] not in FINAL
        if running and self.on_stop is not None:
            self.jobs[name] = {**self.jobs[name], **self.on_stop(name)}
        return web.json_response({"stopped": running})

    async def _logs(self, request: web.Request) -> web.Response:
        return self._known(request) or web.json_response({"logs": self.log.get(request.match_info["name"], "")})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if unknown := self._known(request):
            return unknown
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        cut = self.cuts.pop(0) if self.cuts else None
        sent, self.open_sockets = 0, self.open_sockets + 1
        try:
            while request.transport is not None and not request.transport.is_closing():
                over = self.jobs[name]["status"] in FINAL
                data = self.log.get(name, "").encode()
                until = min(len(data), sent + CHUNK, len(data) if cut is None else cut)
                # Whole characters only, as Ray reads its file as text.
                text = data[sent:until].decode(errors="ignore")
                if not text and cut is None and until < len(data):
                    text = data[sent : until + 4].decode(errors="ignore")[:1]
                if text:
                    await socket.send_str(text)
                    sent += len(text.encode())
                elif cut is not None and cut <= len(data):
                    if self.cut_politely:
                        await socket.close(code=WSCloseCode.OK)
                    elif request.transport is not None:
                        request.transport.abort()
                    return socket
                elif over:
                    await socket.close(code=WSCloseCode.OK)
                    return socket
                else:
                    await asyncio.sleep(0.01)
            return socket
        finally:
            self.open_sockets -= 1

    def _known(self, request: web.Request) -> web.Response | None:
        name = request.match_info["name"]
        return None if name in self.jobs else web.Response(status=404, text=f"Job {name} does not exist")

    def _details(self, name: str) -> dict[str, Any]:
        return {"submission_id": name, "type": "SUBMISSION", "message": "", "driver_exit_code": None, **self.jobs[name]}


def _now() -> int:
    return int(time.time() * 1000)
