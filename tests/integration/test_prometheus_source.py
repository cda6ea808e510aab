"""Evidence from a real Prometheus: built-in queries on recorded text, resets, dead pods, the judge's verdicts."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
from support.prometheus import BINARY, INTERVAL, MISSING, Exporter, prometheus, sections

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.hooks.prometheus import PrometheusHook
from airflow_mlops.rollout.judge import PROMOTE, ROLLBACK, Judge
from airflow_mlops.rollout.policy import RolloutPolicy
from airflow_mlops.rollout.sources import PrometheusSource
from airflow_mlops.rollout.sources.prometheus_api import PrometheusApi
from airflow_mlops.rollout.sources.query_sets import QUERY_SETS, queries_of
from airflow_mlops.rollout.targets.book import Book
from airflow_mlops.rollout.targets.protocol import TargetState

pytestmark = pytest.mark.skipif(BINARY is None, reason=MISSING)

METRICS = Path(__file__).parents[1] / "support" / "metrics"


def route_text() -> str:
    book = Book()
    for version, rows in (("1", 40), ("2", 10)):
        for index in range(rows):
            book.record(version, f"{version}-{index}", None if index % 10 == 0 else 0.5, 0.02)
    return book.prometheus("flights")


def pod_text(requests: int, errors: int, *, slow: int = 0) -> str:
    fast = requests - slow
    return f"""# TYPE model_requests_total counter
model_requests_total{{code="200"}} {requests - errors}
model_requests_total{{code="500"}} {errors}
# TYPE model_latency_seconds histogram
model_latency_seconds_bucket{{le="0.1"}} {fast}
model_latency_seconds_bucket{{le="0.2"}} {fast}
model_latency_seconds_bucket{{le="1"}} {requests}
model_latency_seconds_bucket{{le="+Inf"}} {requests}
model_latency_seconds_sum {0.05 * fast + 0.5 * slow}
model_latency_seconds_count {requests}
# TYPE model_value summary
model_value_sum {requests * 2}
model_value_count {requests}
# TYPE model_value_squares counter
model_value_squares {requests * 5}
# TYPE model_share gauge
model_share 0.25
"""


def old_text() -> str:
    return f'model_requests_total{{code="200"}} 5 {(time.time() - 100) * 1000:.0f}\n'


QUERIES = {
    "requests": 'model_requests_total{version="{version}"}',
    "errors": 'model_requests_total{version="{version}",code="500"}',
    "latency": {
        "query": 'model_latency_seconds_bucket{version="{version}"}',
        "sum": 'model_latency_seconds_sum{version="{version}"}',
    },
    "value": {
        "count": 'model_value_count{version="{version}"}',
        "sum": 'model_value_sum{version="{version}"}',
        "squares": 'model_value_squares{version="{version}"}',
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Prometheus that scrapes the recorded text of every system, and four pods whose text tests change."""
    targets, exporters, pods = [], [], {}
    recorded = [section for path in sorted(METRICS.glob("*.prom")) for section in sections(path)]
    for labels, text in [*recorded, ({"instance": "route"}, route_text())]:
        exporters.append(Exporter(text))
        targets.append((exporters[-1].address, labels))
    for pod, version in (("s-1", "1"), ("s-2", "1"), ("c-1", "2"), ("c-2", "2"), ("c-3", "3"), ("old", "9")):
        pods[pod] = Exporter(old_text if pod == "old" else pod_text(100, 0))
        targets.append((pods[pod].address, {"pod": pod, "version": version}))
    for _ in range(2):
        exporters.append(Exporter(pod_text(100, 0)))
        targets.append((exporters[-1].address, {"pod": "t-1", "version": "4"}))
    with prometheus(tmp_path_factory.mktemp("prometheus"), targets) as url:
        yield url, pods
    for exporter in [*exporters, *pods.values()]:
        exporter.stop()


def state(stable="1", canary="2", epoch="1", weight=10.0):
    return TargetState(time.time(), epoch, weight, weight, stable, canary)


def source(server, queries=None, base=None, **options):
    options = {"delay": 0.0, "settle": 0.0, **options}
    return PrometheusSource(PrometheusApi(server[0]), queries_of(base, queries), **options)


async def look(reader, at=None, wait=8.0):
    """The first look without a problem: the first scrape after the start takes a moment."""
    deadline = time.monotonic() + wait
    while True:
        seen = await reader.observe(at or state(), time.time())
        if seen.problem is None or time.monotonic() > deadline:
            return seen
        await asyncio.sleep(INTERVAL / 2)


async def scraped():
    """Everything that exporters say now has reached Prometheus."""
    await asyncio.sleep(4 * INTERVAL)


ENVOY = {arm: f"httproute/ml/flights/rule/0/backend/{index}" for index, arm in enumerate(("stable", "canary"))}
KNATIVE = {"stable": "flights-predictor-00001", "canary": "flights-predictor-00002"}
K_PODS = [f"flights-predictor-0000{v}-deployment-{p}" for v, p in ((1, "5c7d8b9f6-abcde"), (1, "5c7d8b9f6-fghij"))]
K_CANARY = "flights-predictor-00002-deployment-84df6c7b9-klmno"
E_PODS = [f"envoy-default-gateway-e41e7b31-7f9c-{end}" for end in ("aaaaa", "bbbbb")]
#: set: options, and by arm and replica (requests, errors, requests in the latency histogram)
EXPECTED = {
    "kserve": (
        {"namespace": "ml"},
        {
            "flights-v1-predictor-7d9c6b5f4-2xk8p": (600, None, 600),
            "flights-v1-predictor-7d9c6b5f4-9qwzt": (400, None, 400),
        },
        {"flights-v2-predictor-66f7d8c9b-lm4nd": (100, None, 100)},
    ),
    "knative": (
        {"namespace": "ml", "workload": KNATIVE},
        {K_PODS[0]: (600, 10, 600), K_PODS[1]: (400, 0, 400)},
        {K_CANARY: (100, 5, 100)},
    ),
    "knative_opencensus": (
        {"namespace": "ml", "workload": KNATIVE},
        {K_PODS[0]: (600, 10, 600), K_PODS[1]: (400, 0, 400)},
        {K_CANARY: (100, 5, 100)},
    ),
    "istio": (
        {"namespace": "ml"},
        {"flights-v1-5c7d8b9f6-abcde": (600, 10, 600), "flights-v1-5c7d8b9f6-fghij": (400, 0, 400)},
        {"flights-v2-84df6c7b9-klmno": (100, 5, 100)},
    ),
    "envoy_gateway": (
        {"namespace": "ml"},
        {E_PODS[0]: (505, 5, 505), E_PODS[1]: (495, 5, 495)},
        {E_PODS[0]: (53, 3, 53), E_PODS[1]: (47, 2, 47)},
    ),
    "ray_serve": (
        {},
        {"ks0xsurv": (80, 0, 80), "q5z1ed26": (79, 0, 79)},
        {"5fkn9wdr": (23, 3, 23), "ibngld1h": (30, 7, 30)},
    ),
    "route": ({}, {"route": (40, 4, 40)}, {"route": (10, 1, 10)}),
}


def test_every_built_in_set_is_tried():
    assert set(EXPECTED) == set(QUERY_SETS)


@pytest.mark.parametrize("name", QUERY_SETS)
async def test_a_built_in_set_reads_both_arms_from_the_text_of_its_system(server, name):
    options, stable, canary = EXPECTED[name]
    reader = source(server, base=name, name="flights", **options)
    seen = await look(reader)
    assert seen.problem is None
    await reader.check(state(), time.time())
    for arm, expected in ((seen.stable, stable), (seen.canary, canary)):
        got = {
            replica: (
                each["counts"]["requests"],
                each["counts"].get("errors"),
                sum(each["histograms"]["latency"]["counts"]),
            )
            for replica, each in arm.items()
        }
        assert got == expected
        for each in arm.values():
            edges = each["histograms"]["latency"]["edges"]
            assert len(each["histograms"]["latency"]["counts"]) == len(edges) + 1
            assert edges == sorted(edges) and 1e-4 <= edges[0] <= 0.01 and edges[-1] >= 5
            n, total, squares = each["moments"]["latency"]
            assert 0.0005 < total / n < 0.1 and squares >= total * total / n


async def test_istio_counts_what_never_reached_a_pod_when_the_caller_reports(server):
    reader = source(server, base="istio", name="flights", namespace="ml", labels={"reporter": "source"})
    seen = await look(reader)
    assert {pod: each["counts"]["errors"] for pod, each in seen.canary.items()} == {
        "istio-ingressgateway-6d8f-zzzzz": 7
    }


async def test_counters_go_on_and_a_restart_shows_as_smaller_numbers(server):
    _, pods = server
    reader = source(server, QUERIES)
    for pod in ("s-1", "s-2", "c-1", "c-2"):
        pods[pod].text = pod_text(100, 1)
    await scraped()
    first = await look(reader)
    assert {pod: each["counts"] for pod, each in first.canary.items()} == {
        pod: {"requests": 100, "errors": 1} for pod in ("c-1", "c-2")
    }
    assert first.canary["c-1"]["moments"]["value"] == [100, 200, 500]
    assert first.canary["c-1"]["histograms"]["latency"] == {"edges": [0.1, 0.2, 1.0], "counts": [100, 0, 0, 0]}
    pods["c-1"].text = pod_text(250, 5, slow=30)
    pods["c-2"].text = pod_text(7, 0)
    await scraped()
    second = await look(reader)
    assert second.canary["c-1"]["counts"] == {"requests": 250, "errors": 5}
    assert second.canary["c-1"]["histograms"]["latency"]["counts"] == [220, 0, 30, 0]
    assert second.canary["c-2"]["counts"] == {"requests": 7, "errors": 0}
    n, total, squares = second.canary["c-1"]["moments"]["latency"]
    assert (n, total) == (250, pytest.approx(26.0)) and squares == pytest.approx(220 * 0.01 + 30 * 1.0)


async def test_after_the_weights_change_nothing_counts_that_was_scraped_before(server):
    reader = source(server, QUERIES)
    assert (await look(reader)).problem is None
    seen = await reader.observe(state(epoch="2", weight=50.0), time.time())
    assert "not every replica was scraped since" in seen.problem and seen.canary is None
    assert (await look(reader, state(epoch="2", weight=50.0))).weight == 50.0


async def test_a_dead_pod_is_missing_at_once_and_an_old_sample_is_stale(server):
    _, pods = server
    reader = source(server, QUERIES)
    await scraped()
    only_requests = {"requests": QUERIES["requests"]}
    # Prometheus gives the sample of 100 s ago as if it were one of now.
    api = PrometheusApi(server[0])
    async with api.session() as session:
        assert (await api.query(session, 'model_requests_total{version="9"}'))[0].value == 5
    seen = await source(server, only_requests).observe(state(canary="9"), time.time())
    assert "newest sample of the canary arm is 10" in seen.problem and "stale after 90 s" in seen.problem
    patient = source(server, only_requests, max_age=200.0)
    patient._epoch, patient._since = "1", time.time() - 200
    assert (await patient.observe(state(canary="9"), time.time())).problem is None
    assert (await look(reader, state(canary="3"))).problem is None
    pods["c-3"].stop()
    await scraped()
    seen = await reader.observe(state(canary="3"), time.time())
    assert seen.problem == "Prometheus has no requests of the canary arm" and seen.stable is None
    full = await look(reader, state(stable="3", canary="2", epoch="4", weight=100.0))
    assert full.problem is None and full.stable is None and set(full.canary) == {"c-1", "c-2"}


BAD = {
    "several series": (
        {"errors": 'sum by (pod, code) (model_requests_total{version="{version}"})'},
        r"'errors' gives several series for the stable arm of replica 's-[12]': they differ in code.*sum by \(pod\)",
    ),
    "unknown metric": ({"errors": 'model_failures_total{version="{version}"}'}, "no series at all"),
    "a ratio": ({"errors": 'model_share{version="{version}"}'}, "0.25, which is no count"),
    "no PromQL": ({"errors": 'sum by (pod (model_requests_total{version="{version}"})'}, "parse error"),
    "no le": (
        {"latency": 'sum by (pod) (model_latency_seconds_bucket{version="{version}"})'},
        "has no label le; keep it",
    ),
    "arms not told apart": ({"errors": 'sum by (pod) (model_requests_total{code="500"})'}, "does not tell the arms"),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_queries_are_explained_before_the_rollout_and_held_within_it(server, case):
    queries, message = BAD[case]
    reader = source(server, {**QUERIES, **queries})
    with pytest.raises(InvalidInputError, match=message):
        await reader.check(state(), time.time())
    seen = await reader.observe(state(), time.time())
    assert seen.problem and seen.stable is None and seen.canary is None


async def test_a_pod_that_is_scraped_twice_is_found(server):
    twice = source(server, QUERIES)
    with pytest.raises(InvalidInputError, match=r"replica 't-1' are in Prometheus 2 times: \{instance=.*one job"):
        await twice.check(state(canary="4"), time.time())
    await source(server, QUERIES).check(state(), time.time())
    summed = {
        **QUERIES,
        "requests": 'max by (pod) (sum by (pod, instance) (model_requests_total{version="{version}"}))',
    }
    await source(server, summed, metrics=["requests"]).check(state(canary="4"), time.time())


async def test_one_query_for_both_arms_tells_them_by_a_label(server):
    query = 'sum by (version, pod) (model_requests_total{version=~"{stable}|{canary}"})'
    per_arm, both = source(server, QUERIES), source(server, {**QUERIES, "requests": query})
    expected, seen = await look(per_arm), await look(both)
    assert seen.problem is None and set(seen.canary) == {"c-1", "c-2"} and set(seen.stable) == {"s-1", "s-2"}
    assert seen.canary["c-1"]["counts"] == expected.canary["c-1"]["counts"]


async def test_an_arm_whose_metric_is_missing_or_aggregated_otherwise_is_named(server):
    seen = await look(source(server, {**QUERIES, "timeouts": 'model_timeouts_total{version="{version}"}'}), wait=1.5)
    assert seen.problem == "Prometheus has no timeouts of the stable arm"
    total = 'sum(model_failures_total{version="{version}"} or model_value_count{version="{version}"})'
    seen = await look(source(server, {**QUERIES, "timeouts": total}), wait=1.5)
    assert "timeouts has ['']; aggregate all queries by pod" in seen.problem
    mean = {"count": QUERIES["value"]["count"], "sum": QUERIES["value"]["sum"]}
    seen = await look(source(server, {**QUERIES, "value": mean}), wait=1.5)
    assert "has no variance" in seen.problem


async def test_of_the_metrics_only_those_that_guardrails_read_are_asked_for(server):
    queries = {**QUERIES, "timeouts": 'model_timeouts_total{version="{version}"}'}
    seen = await look(source(server, queries, metrics=["errors"]))
    assert seen.problem is None and set(seen.canary["c-1"]) >= {"counts"} and not seen.canary["c-1"]["histograms"]
    with pytest.raises(InvalidInputError, match="no query is known for the metric log_loss"):
        source(server, queries, metrics=["log_loss"])


class Traffic:
    """Two pods an arm, each with counters of its own; requests follow the weight."""

    def __init__(self, pods, *, errors=(0.01, 0.01), slow=(0.02, 0.02), requests=20_000, seed=1):
        self.pods, self.errors, self.slow, self.requests = pods, errors, slow, requests
        self.served = {"stable": 0, "canary": 0}
        self.rng = np.random.default_rng(seed)
        self.totals = {pod: np.zeros(3, int) for pod in ("s-1", "s-2", "c-1", "c-2")}

    def serve(self, weight):
        canary = int(self.rng.binomial(self.requests, weight / 100))
        self.served = {
            "stable": self.served["stable"] + self.requests - canary,
            "canary": self.served["canary"] + canary,
        }
        for arm, (prefix, n) in enumerate((("s", self.requests - canary), ("c", canary))):
            first = int(self.rng.binomial(n, 0.5))
            for pod, share in ((f"{prefix}-1", first), (f"{prefix}-2", n - first)):
                failed, slow = self.rng.binomial(share, (self.errors[arm], self.slow[arm]))
                self.totals[pod] += np.array([share, failed, slow])
        self.show()

    def restart(self, pod):
        self.totals[pod] = np.zeros(3, int)

    def show(self):
        for pod, (requests, failed, slow) in self.totals.items():
            self.pods[pod].text = pod_text(int(requests), int(failed), slow=int(slow))


async def judged(server, traffic, looks=24, restarts=()):
    """The last verdict of a rollout whose evidence comes through Prometheus, and all observations.

    :param restarts: pods that are restarted, one after each look that was judged
    """
    policy = RolloutPolicy(steps=(20, 50, 100), min_requests=1000, deadline_seconds=3600)
    # With two pods an arm, what pods differ by leaves the ratio open for long: shares below a tolerance do not matter.
    judge = Judge(policy, [{"kind": "errors", "tolerance": 0.02}, "latency"])
    reader = source(server, QUERIES, metrics=["errors", "latency"])
    traffic.show()
    seen, restarts = [], list(restarts)
    for _ in range(looks):
        traffic.serve(judge.weight)
        await asyncio.sleep(2.5 * INTERVAL)
        weight = float(judge.weight)
        seen.append(await reader.observe(state(epoch=f"at {weight}", weight=weight), time.time()))
        verdict = judge.observe(seen[-1])
        assert len(json.dumps(judge.state())) < 32_000
        if verdict.final:
            break
        if restarts and verdict.requests["canary"]:
            traffic.restart(restarts.pop(0))
    return verdict, seen


async def test_an_equal_canary_is_promoted_though_its_pods_restart(server):
    traffic = Traffic(server[1], requests=3000)
    verdict, seen = await judged(server, traffic, restarts=["c-2", "s-1"])
    assert verdict.decision == PROMOTE, verdict
    for pod in ("c-2", "s-1"):
        counts = [
            arm[pod]["counts"]["requests"] for each in seen for arm in (each.canary, each.stable) if pod in (arm or {})
        ]
        assert any(after < before for before, after in itertools.pairwise(counts))
    assert {account["status"] for account in verdict.guardrails.values()} == {"ok"}
    # Never more than was served, although counters began anew.
    assert all(verdict.requests[arm] <= served for arm, served in traffic.served.items())


@pytest.mark.parametrize(
    ("worse", "guardrail"), [({"errors": (0.01, 0.04)}, "errors"), ({"slow": (0.02, 0.3)}, "latency")]
)
async def test_a_failing_or_slow_canary_is_rolled_back(server, worse, guardrail):
    verdict, _ = await judged(server, Traffic(server[1], **worse))
    assert verdict.decision == ROLLBACK and verdict.guardrails[guardrail]["status"] == "harm", verdict
    assert f"{guardrail}: the canary is worse" in verdict.reasons[0]


def test_the_connection_is_tested_against_a_real_server(server, monkeypatch):
    value = {"conn_type": "prometheus", "host": server[0], "extra": {"timeout": "2.5"}}
    monkeypatch.setenv("AIRFLOW_CONN_PROMETHEUS_DEFAULT", json.dumps(value))
    ok, message = PrometheusHook().test_connection()
    assert ok and "targets" in message
