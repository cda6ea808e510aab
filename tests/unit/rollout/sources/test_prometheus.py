"""The fault matrix of Prometheus: whatever is wrong there is a problem of the look, no number and no error."""

from __future__ import annotations

import json
import math
import time

import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout.sources import PrometheusSource
from airflow_mlops.rollout.sources.prometheus_api import MAX_BYTES, PrometheusApi
from airflow_mlops.rollout.sources.query_sets import queries_of

QUERIES = {"requests": 'requests_total{v="{version}"}', "errors": 'errors_total{v="{version}"}'}
OK = {"status": "success", "data": {"resultType": "vector", "result": []}}


def reader(standin, queries=QUERIES, *, timeout=5.0, headers=None, **options):
    options = {"delay": 0.0, "settle": 0.0, **options}
    return PrometheusSource(
        PrometheusApi(standin.url, timeout=timeout, headers=headers), queries_of(None, queries), **options
    )


def both_arms(standin, **when):
    for arm, n in (("stable", 900), ("canary", 100)):
        standin.give(arm, "requests", {"p1": n, "p2": n}, **when)
        standin.give(arm, "errors", {"p1": 1, "p2": 2}, **when)


async def look(source, state, offset=0.0):
    """A look in an epoch that began long ago."""
    source._epoch, source._since = state.epoch, 0.0
    return await source.observe(state, time.time() + offset)


async def test_counters_by_arm_and_replica_in_one_request(standin, target):
    both_arms(standin)
    seen = await look(reader(standin, headers={"X-Scope-OrgID": "team"}), target(routed=(1800, 200)))
    assert seen.problem is None and seen.routed == (1800, 200) and seen.weight == 10.0 and seen.epoch == "1"
    assert seen.stable["p1"] == {"counts": {"requests": 900, "errors": 1}, "histograms": {}, "moments": {}}
    assert seen.canary["p2"]["counts"] == {"requests": 100, "errors": 2}
    ((method, path, form, headers),) = standin.requests
    assert (method, path, headers["X-Scope-OrgID"]) == ("POST", "/api/v1/query", "team")
    assert form["query"].count('v="1"') == form["query"].count('v="2"') == 4


async def test_each_histogram_and_mean_is_one_more_request_at_the_same_instant(standin, target):
    queries = {
        **QUERIES,
        "latency": 'l_bucket{v="{version}"}',
        "value": {"count": 'c{v="{version}"}', "sum": 's{v="{version}"}', "squares": 'q{v="{version}"}'},
    }
    await look(reader(standin, queries), target())
    assert len(standin.requests) == 3 and len({form["time"] for _, _, form, _ in standin.requests}) == 1


def answer(*result, kind="vector", **extra):
    return 200, json.dumps({**OK, "data": {"resultType": kind, "result": list(result)}, **extra})


TIMEOUT = '{"status": "error", "errorType": "timeout", "error": "query timed out"}'
BAD_DATA = '{"status": "error", "errorType": "bad_data", "error": "parse error: x"}'
FAULTS = {
    "500": ((500, "oops"), "HTTP 500 and no JSON: oops"),
    "503 as JSON": ((503, TIMEOUT), "timeout: query timed out"),
    "400": ((400, BAD_DATA), "bad_data: parse error: x"),
    "401": ((401, "no"), "refuses the credentials"),
    "403": ((403, "no"), "refuses the credentials"),
    "404": ((404, "404 page not found"), "is the path before /api/v1 right"),
    "a login page": ((302, "<html>"), "does a proxy want a login"),
    "no JSON": ((200, "<html>hello"), "HTTP 200 and no JSON: <html>hello"),
    "cut off": ((200, json.dumps(OK)[:-3]), "no JSON"),
    "a list": ((200, "[]"), "no JSON"),
    "error": ((200, '{"status": "error", "error": "x"}'), "None: x"),
    "warnings": (answer(warnings=["store 3 is away"]), "something may be missing: store 3 is away"),
    "partial": (answer(isPartial=True), "the answer is partial"),
    "a matrix": (answer(kind="matrix"), "gives a matrix"),
    "no data": ((200, '{"status": "success"}'), "form that cannot be read"),
    "odd series": (answer({"metric": {}}), "form that cannot be read"),
    "odd value": (answer({"metric": {}, "value": [1, "x"]}), "form that cannot be read"),
    "not asked for": (answer({"metric": {"pod": "x"}, "value": [1, "1"]}), "form that cannot be read"),
    "empty": (answer(), "Prometheus has no requests of the stable arm"),
    "endless": ((200, "x" * (MAX_BYTES + 1)), "selects too many series"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_faulty_answer_is_a_problem(standin, target, fault):
    standin.answer, message = FAULTS[fault]
    seen = await look(reader(standin), target())
    assert message in seen.problem and seen.stable is None and seen.canary is None and seen.time > 0


async def test_silence_and_absence_are_problems(standin, target):
    standin.delay = 3.0
    seen = await look(reader(standin, timeout=0.2), target())
    assert "has not answered in 0.2 s" in seen.problem
    source = reader(standin)
    source._api = PrometheusApi("http://127.0.0.1:1")
    assert "cannot be reached" in (await look(source, target())).problem


async def test_where_only_get_is_allowed_get_is_sent(standin, target):
    both_arms(standin)
    standin.answer = lambda request: (405, "no") if request.method == "POST" else (200, json.dumps(OK))
    await look(reader(standin), target())
    assert [method for method, *_ in standin.requests] == ["POST", "GET"]
    assert standin.requests[1][2]["query"] == standin.requests[0][2]["query"]


async def test_credentials_are_in_no_message(standin, target):
    standin.answer = (401, "no")
    seen = await look(reader(standin, headers={"Authorization": "Bearer secret-token"}), target())
    assert "secret-token" not in seen.problem


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("NaN", "is nan"),
        ("+Inf", "is inf"),
        ("-Inf", "is -inf"),
        ("-3", "no count"),
        ("0.004", "is 0.004, which is no count"),
    ],
)
async def test_numbers_that_are_no_counts(standin, target, value, message):
    both_arms(standin)
    standin.give("canary", "errors", {"p1": value, "p2": 1})
    seen = await look(reader(standin), target())
    assert f"errors of the canary arm, replica p1 {message}" in seen.problem or message in seen.problem
    assert seen.canary is None


async def test_one_arm_alone_is_a_problem_that_names_the_other(standin, target):
    both_arms(standin)
    standin.parts = {part: values for part, values in standin.parts.items() if part.startswith("stable/")}
    assert (await look(reader(standin), target())).problem == "Prometheus has no requests of the canary arm"
    assert (await look(reader(standin), target(canary=None))).problem == "the target has no canary version"


async def test_a_stale_replica_is_left_out_and_an_arm_of_stale_ones_is_a_problem(standin, target):
    both_arms(standin)
    for metric in ("requests", "errors"):
        standin.parts[f"canary/{metric}/count/time"][0] = ({"pod": "p1"}, time.time() - 120)
    seen = await look(reader(standin), target())
    assert seen.problem is None and set(seen.canary) == {"p2"} and set(seen.stable) == {"p1", "p2"}
    both_arms(standin, age=120)
    seen = await look(reader(standin), target())
    assert seen.problem == "the newest sample of the stable arm is 120 s old, stale after 90 s"
    assert (await look(reader(standin, max_age=200.0), target())).problem is None


async def test_a_replica_with_one_stale_metric_is_left_out(standin, target):
    both_arms(standin)
    standin.parts["canary/errors/count/time"][0] = ({"pod": "p1"}, time.time() - 120)
    assert set((await look(reader(standin), target())).canary) == {"p2"}


async def test_errors_that_nobody_counted_yet_are_a_problem_unless_it_is_the_same_counter(standin, target):
    both_arms(standin)
    standin.parts = {part: values for part, values in standin.parts.items() if not part.startswith("canary/errors")}
    assert (await look(reader(standin), target())).problem == "Prometheus has no errors of the canary arm"
    same = {**QUERIES, "errors": 'requests_total{v="{version}",code=~"5.."}'}
    seen = await look(reader(standin, same), target())
    assert seen.problem is None and seen.canary["p1"]["counts"]["errors"] == 0
    told = {**QUERIES, "errors": {"query": QUERIES["errors"], "zero": True}}
    assert (await look(reader(standin, told), target())).canary["p2"]["counts"]["errors"] == 0


async def test_a_native_histogram_is_explained(standin, target):
    both_arms(standin)
    native = {"histogram": [1.0, {"count": "3", "sum": "1", "buckets": [[0, "1", "2", "3"]]}]}
    standin.parts["canary/errors/count/value"] = [({"pod": "p1"}, native)]
    assert "is a native histogram" in (await look(reader(standin), target())).problem


async def test_several_series_name_what_to_aggregate_by(standin, target):
    both_arms(standin)
    standin.parts["canary/errors/count/value"] = [
        ({"pod": "p1", "code": code, "zone": "a"}, 1) for code in ("500", "503")
    ]
    source = reader(standin)
    message = r"'errors' gives several series for the canary arm of replica 'p1': they differ in code, zone"
    with pytest.raises(InvalidInputError, match=message + r".*sum by \(pod\)"):
        await source.check(target(), time.time())
    assert "several series" in (await look(source, target())).problem


async def test_the_change_of_weights_waits_for_new_samples(standin, target):
    now = 1_760_000_000.0
    source = reader(standin, settle=2.0)
    steps = [("1", 0.0, -3.0, "5.0"), ("1", 1.0, 1.0, "1.0"), ("1", 3.0, 2.5, None), ("2", 6.0, 5.0, "3.0")]
    for epoch, at, sampled, missing in steps:
        both_arms(standin, now=now + sampled)
        seen = await source.observe(target(epoch=epoch), now + at)
        if missing is None:
            assert seen.problem is None
        else:
            assert f"not every replica was scraped since (missing {missing} s)" in seen.problem and seen.canary is None


async def test_one_replica_not_scraped_since_the_change_keeps_all_waiting(standin, target):
    both_arms(standin, age=-1)
    source = reader(standin)
    for metric in ("requests", "errors"):
        standin.parts[f"stable/{metric}/count/time"][1] = ({"pod": "p2"}, time.time() - 5)
    assert "not every replica" in (await source.observe(target(), time.time())).problem


async def test_a_problem_of_the_target_is_that_of_the_look_and_nothing_is_asked(standin, target):
    seen = await look(reader(standin), target(problem="the gateway refuses the route"))
    assert seen.problem == "the gateway refuses the route" and standin.requests == []


class _Named:
    """A state whose target knows the names of its workloads."""

    def __init__(self, state, workloads):
        self._state, self.workloads = state, workloads

    def __getattr__(self, name):
        return getattr(self._state, name)


async def test_the_target_names_the_arms_workloads(standin, target):
    queries = {"requests": 'r{w="{workload}",n="{name}",i="{index}",x="{extra}"}'}
    source = reader(
        standin,
        queries,
        name="flights",
        labels={"extra": "y"},
        workload={"stable": "{name}-a", "canary": "{name}-{version}"},
    )
    await look(source, target())
    query = standin.requests[0][2]["query"]
    assert 'r{w="flights-a",n="flights",i="0",x="y"}' in query and 'r{w="flights-2",n="flights",i="1",x="y"}' in query
    standin.requests.clear()
    await look(
        reader(standin, {"requests": 'r{w="{workload}"}'}), _Named(target(), {"stable": "rev-1", "canary": "rev-2"})
    )
    assert 'r{w="rev-1"}' in standin.requests[0][2]["query"] and 'r{w="rev-2"}' in standin.requests[0][2]["query"]
    missing = reader(standin, {"requests": 'r{w="{workload}"}'})
    assert "{workload}" in (await look(missing, target())).problem


async def test_what_cannot_be_told_before_the_rollout_passes_the_check(standin, target):
    standin.answer = (503, "starting")
    await reader(standin).check(target(), time.time())
    standin.answer = (401, "")
    with pytest.raises(InvalidInputError, match="refuses the credentials"):
        await reader(standin).check(target(), time.time())


@pytest.mark.parametrize(
    "option", [{"max_age": 0}, {"max_age": math.nan}, {"delay": -1}, {"settle": math.inf}, {"delay": "5"}]
)
def test_options_out_of_range(standin, option):
    with pytest.raises(InvalidInputError, match="expected seconds"):
        PrometheusSource(PrometheusApi("http://x"), queries_of(None, QUERIES), **option)


async def test_a_mean_takes_its_variance_from_buckets(standin, target):
    queries = {
        "requests": QUERIES["requests"],
        "value": {"count": 'c{v="{version}"}', "sum": 's{v="{version}"}', "buckets": 'b_bucket{v="{version}"}'},
    }
    both_arms(standin)
    for arm in ("stable", "canary"):
        standin.give(arm, "value", {"p1": 10}, part="count")
        standin.give(arm, "value", {"p1": 12.5}, part="sum")
        standin.give(arm, "value", {"p1": 0}, part="buckets")
        standin.parts[f"{arm}/value/buckets/value"] = [
            ({"pod": "p1", "le": edge}, n) for edge, n in (("1", 4), ("2", 10), ("+Inf", 10))
        ]
    seen = await look(reader(standin, queries), target())
    assert seen.problem is None and seen.canary["p1"]["moments"]["value"] == [10, 12.5, 4 * 1 + 6 * 4]
