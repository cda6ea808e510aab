"""The rollout's loop against an HTTP server that answers as Serve's REST API and a route do, with the route's books."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from aiohttp import web

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError
from airflow_mlops.rollout.controller import Answer, Hands, abort, run_rollout
from airflow_mlops.rollout.policy import Guardrail, RolloutPolicy
from airflow_mlops.rollout.sources import TargetCounters
from airflow_mlops.rollout.spec import RolloutSpec
from airflow_mlops.rollout.targets.book import SLOTS, Book
from airflow_mlops.rollout.targets.client import IMPORT_PATH, RayServeClient, Route

SPEC = RolloutSpec(
    "m",
    "2",
    "/models/2",
    "1",
    "/models/1",
    "dag/task/run/-1",
    RolloutPolicy(steps=(20, 50, 100), min_requests=50, deadline_seconds=600),
    (Guardrail.errors(tolerance=0.05),),
    poll_interval=0.02,
    ttl=20.0,
)


class FakeServe:
    """Applications, their books, and some traffic before every reading of a route's state."""

    def __init__(self) -> None:
        self.configs: dict[str, dict] = {}
        self.books: dict[str, Book] = {}
        self.down = False
        self.traffic = 200
        self.sent = 0
        self.lag = 0.0
        self.start = 0.0

    def lose(self) -> None:
        """What a new head knows of an old one: nothing."""
        self.configs, self.books = {}, {}

    async def applications(self, request: web.Request) -> web.Response:
        if request.method == "PUT":
            wanted = {config["name"]: config for config in (await request.json())["applications"]}
            await asyncio.sleep(0.0 if self.configs else self.start)
            self.configs = wanted
            for name, config in wanted.items():
                assert config["import_path"] == IMPORT_PATH
                config = self.part(name, "router")
                if name not in self.books:
                    self.books[name] = Book()
                    self.books[name].configure(config)
                elif config != self.books[name].config:
                    asyncio.get_running_loop().call_later(self.lag, self.books[name].configure, config)
        apps = {name: {"status": "RUNNING", "deployed_app_config": config} for name, config in self.configs.items()}
        return web.json_response({"applications": apps})

    def part(self, name: str, deployment: str) -> dict:
        found = next(item for item in self.configs[name]["deployments"] if item["name"] == deployment)
        return found["user_config"]

    async def state(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        book = self.books[name]
        for _ in range(self.traffic):
            self.sent += 1
            slot = book.route(str(self.sent), time.time())
            book.record(str(book.config["versions"][slot]), str(self.sent), 0.3, 0.01)
        slots = {slot: {**self.part(name, f"slot_{slot}"), "ready": True, "error": None} for slot in SLOTS}
        return web.json_response({**book.state(time.time()), "slots": slots})

    async def change(self, request: web.Request) -> web.Response:
        try:
            self.books[request.match_info["name"]].change(await request.json(), time.time())
        except ConcurrentChangeError as error:
            return web.json_response({"error": str(error)}, status=409)
        return web.json_response({})

    @web.middleware
    async def away(self, request: web.Request, handler) -> web.StreamResponse:
        if self.down or ("name" in request.match_info and request.match_info["name"] not in self.configs):
            return web.Response(status=503, text="nobody is there")
        return await handler(request)


@pytest.fixture
async def serve():
    fake = FakeServe()
    app = web.Application(middlewares=[fake.away])
    app.add_routes([web.route("*", "/api/serve/applications/", fake.applications)])
    app.add_routes([web.get("/{name}/state", fake.state), web.post("/{name}/rollout", fake.change)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    async with RayServeClient(url, url, timeout=2.0) as client:
        yield SimpleNamespace(fake=fake, route=Route(client, "m", load_timeout=20, startup_timeout=20))
    await runner.cleanup()


async def roll_out(serve, spec, on_look=lambda verdict: None, **options):
    return await run_rollout(serve.route, TargetCounters(), spec, Hands(on_look=on_look), **options)


async def begun(serve, looks: int = 2, attempt: int = 1) -> None:
    """Wait until a rollout has been looked at so often by this attempt."""
    for _ in range(2000):
        book = serve.fake.books.get("m")
        annotation = book.annotation if book else {}
        if annotation.get("attempt") == attempt and (annotation.get("judge") or {}).get("looks", 0) >= looks:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the rollout did not begin")


def endless(spec: RolloutSpec = SPEC) -> RolloutSpec:
    return replace(spec, policy=replace(spec.policy, min_requests=10**9))


async def test_a_good_version_is_promoted_and_the_verdict_stays(serve):
    result = await roll_out(serve, SPEC)
    assert (result["verdict"], result["previous"]) == ("PROMOTE", "1")
    state = await serve.route.report()
    assert state["versions"][state["stable"]] == "2" and state["owner"] is None
    assert await roll_out(serve, replace(SPEC, attempt=2)) == result


async def test_a_head_that_is_away_for_a_while_neither_promotes_nor_ends_the_rollout(serve):
    verdicts = []
    running = asyncio.create_task(roll_out(serve, endless(), verdicts.append))
    await begun(serve)
    serve.fake.down = True
    seen = len(verdicts)
    while len(verdicts) < seen + 5:
        await asyncio.sleep(0.01)
    assert not running.done()
    assert {verdict.decision for verdict in verdicts[seen + 1 :]} == {"HOLD"}
    assert "nobody is there" in verdicts[-1].reasons[0]
    serve.fake.down = False
    seen = len(verdicts)
    while len(verdicts) < seen + 3 or "min_requests" in verdicts[-1].reasons[0]:
        await asyncio.sleep(0.01)
    assert not running.done() and sum(verdicts[-1].requests.values()) > sum(verdicts[seen - 1].requests.values())
    running.cancel()


async def test_a_lost_head_makes_the_next_attempt_deploy_the_champion_and_begin_anew(serve):
    running = asyncio.create_task(roll_out(serve, endless()))
    await begun(serve)
    serve.fake.lose()
    with pytest.raises(ExternalSystemError, match="nobody is there"):
        await asyncio.wait_for(running, 60)
    result = await roll_out(serve, replace(SPEC, attempt=2))
    assert result["verdict"] == "PROMOTE" and result["previous"] == "1"


async def test_a_lost_worker_is_continued_with_its_evidence(serve):
    running = asyncio.create_task(roll_out(serve, endless()))
    await begun(serve, looks=4)
    running.cancel()
    verdicts = []
    second = asyncio.create_task(roll_out(serve, replace(endless(), attempt=2), verdicts.append))
    await begun(serve, looks=5, attempt=2)
    second.cancel()
    assert verdicts[0].look > 4 and verdicts[0].requests["canary"] > 0


async def test_a_cleared_task_is_not_ended_by_the_kill_of_its_earlier_try(serve):
    first = asyncio.create_task(roll_out(serve, endless()))
    await begun(serve)
    second = asyncio.create_task(roll_out(serve, replace(endless(), attempt=2)))
    await begun(serve, attempt=2)
    assert await abort(serve.route, SPEC) is False
    with pytest.raises(ConcurrentChangeError, match=r"took the target|attempt 2 of .* has taken"):
        await asyncio.wait_for(first, 60)
    await asyncio.sleep(0.2)
    assert not second.done() and (await serve.route.report())["weight"] == 20
    assert await abort(serve.route, replace(SPEC, attempt=2)) is True
    with pytest.raises(ConcurrentChangeError):
        await asyncio.wait_for(second, 60)
    assert (await serve.route.report())["weight"] == 0


async def test_a_verdict_holds_before_the_next_rollout_begins_however_late_serve_passes_it_on(serve):
    serve.fake.lag = 0.3
    first = replace(SPEC, owner="dag/task/first/-1", version="1", stable_version="", stable_uri="")
    assert (await roll_out(serve, first))["verdict"] == "PROMOTE"
    assert (await serve.route.report())["owner"] is None
    assert (await roll_out(serve, SPEC))["verdict"] == "PROMOTE"


async def test_a_serve_that_is_slow_to_start_is_waited_for(serve):
    serve.fake.start = 3.0
    assert (await roll_out(serve, SPEC))["verdict"] == "PROMOTE"


async def test_a_rollout_that_was_killed_between_two_calls_does_not_take_the_traffic_back(serve):
    """The loop has looked and judged; then its task is killed, and only then it acts."""

    def kill(verdict) -> None:
        if verdict.look == 3:
            serve.fake.books["m"].change({"action": "stop", "owner": SPEC.owner}, time.time())

    with pytest.raises(ConcurrentChangeError, match="ended from outside"):
        await roll_out(serve, SPEC, kill)
    assert (await serve.route.report())["weight"] == 0


async def test_evidence_is_not_continued_under_other_rules(serve):
    """A Dag changed between two tries: three steps have become two, so the old step would not even exist."""
    undecided = replace(SPEC, policy=replace(SPEC.policy, beta=1e-200))
    running = asyncio.create_task(roll_out(serve, undecided))
    await begun(serve)
    while (await serve.route.report())["weight"] != 50:
        assert not running.done()
        await asyncio.sleep(0.01)
    await begun(serve, looks=len(SPEC.policy.steps) + 2)
    running.cancel()
    changed = replace(SPEC, attempt=2, policy=replace(SPEC.policy, steps=(5, 100)))
    result = await roll_out(serve, changed)
    assert result["verdict"] == "PROMOTE" and [step["weight"] for step in result["steps"]] == [5]


async def test_another_rollout_is_refused_while_one_runs(serve):
    running = asyncio.create_task(roll_out(serve, endless()))
    await begun(serve)
    with pytest.raises(ConcurrentChangeError, match="two rollouts of one model"):
        await roll_out(serve, replace(SPEC, owner="dag/task/other/-1"))
    running.cancel()


async def test_a_refusal_acts_at_once_also_while_the_step_has_come_to_wait_for_numbers_again(serve):
    policy = {"steps": [{"weight": 20, "approval": True}, 100], "min_requests": 10**9, "deadline_seconds": 600}
    spec = replace(SPEC, policy=RolloutPolicy.from_json(policy))
    for step in (0, None):
        refused = Hands(answer=Answer(step, False, "ops"))
        owned = replace(spec, owner=f"dag/task/{step}/-1")
        result = await run_rollout(serve.route, TargetCounters(), owned, refused)
        assert result["verdict"] == "ROLLBACK" and "refused by ops" in result["reasons"][0]


async def test_who_was_asked_is_heard_at_every_look_from_then_on(serve):
    policy = {"steps": [{"weight": 20, "approval": True}, 100], "min_requests": 50, "deadline_seconds": 600}
    spec, asked = replace(SPEC, policy=RolloutPolicy.from_json(policy)), []

    async def ask(verdict):
        asked.append(verdict.decision)
        serve.fake.traffic = 0  # from here on every look holds
        return Answer(0, False, "ops") if len(asked) == 3 else None

    result = await run_rollout(serve.route, TargetCounters(), spec, Hands(ask=ask))
    assert result["verdict"] == "ROLLBACK" and asked == ["APPROVE", "HOLD", "HOLD"]
