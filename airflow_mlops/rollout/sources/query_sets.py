"""Queries for the systems that serve models, each with the source of its metric names.

A query is a series selector, summed up by replica, or an expression that gives one series per arm and replica.
Placeholders within its strings: ``{name}``, ``{namespace}``, ``{stable}`` and ``{canary}`` (model versions), and of the
arm that is asked for ``{arm}``, ``{version}`` and ``{workload}``, the name that the metrics know it by.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout.sources.promql import check_counts, metric_of, selectors

COUNT, HISTOGRAM, MOMENTS = "count", "histogram", "moments"
UNITS = {"seconds": 1.0, "milliseconds": 1e-3, "microseconds": 1e-6, "none": 1.0}
MOMENT_PARTS = ("count", "sum", "squares", "buckets")


@dataclass(frozen=True)
class Metric:
    """How one metric of an arm is read.

    :param kind: ``count``, ``histogram`` (the ``_bucket`` series) or ``moments``
    :param parts: part to query: ``count``; ``histogram`` and, if its mean is wanted too, ``sum``; or for ``moments``
        ``count``, ``sum`` and, for the variance, ``squares`` (the sum of squares) or ``buckets``, which bound it from
        above
    :param unit: one of :data:`UNITS`; edges, sums and squares are turned into seconds
    :param zero: whether a replica that has requests and no such series has none of it, as with a counter by status
        code that no failure has made yet
    """

    kind: str
    parts: Mapping[str, str]
    unit: str = "seconds"
    zero: bool = False

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise InvalidInputError(f"the unit {self.unit!r} is unknown; expected one of {', '.join(UNITS)}")

    @property
    def scale(self) -> float:
        """Seconds per unit."""
        return UNITS[self.unit]


@dataclass(frozen=True)
class QuerySet:
    """The metrics of one system.

    :param metrics: name to :class:`Metric`; ``requests`` must be among them
    :param replica: labels that together name a replica
    :param workload: template of ``{workload}`` for each arm
    :param settle: seconds from a change of the weights until all traffic follows it
    :param labels: values of further placeholders
    """

    metrics: Mapping[str, Metric]
    replica: tuple[str, ...] = ("pod",)
    workload: str = "{name}-v{version}"
    settle: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)


def counter(query: str, *, zero: bool = False) -> Metric:
    """A counter of requests."""
    return Metric(COUNT, {COUNT: query}, zero=zero)


def histogram(name: str, matchers: str, unit: str = "seconds") -> Metric:
    """A classic histogram and its sum."""
    return Metric(HISTOGRAM, {HISTOGRAM: f"{name}_bucket{{{matchers}}}", "sum": f"{name}_sum{{{matchers}}}"}, unit)


def _status_set(name: str, matchers: str, code: str, latency: str, unit: str, **options: Any) -> QuerySet:
    """Requests counted by status: those with 5xx are the errors, and none before the first."""
    return QuerySet(
        {
            "requests": counter(f"{name}{{{matchers}}}"),
            "errors": counter(f"{name}{{{matchers},{code}}}", zero=True),
            "latency": histogram(latency, matchers, unit),
        },
        **options,
    )


_POD = "-[a-z0-9]+-[a-z0-9]+"  # What a Deployment's name is followed by in its pods'.
_KSERVE = 'namespace="{namespace}",pod=~"{workload}' + _POD + '"'
_KNATIVE = 'namespace="{namespace}",pod=~"{workload}-deployment' + _POD + '"'
_KNATIVE_OLD = 'namespace_name="{namespace}",revision_name="{workload}"'
_ISTIO = 'reporter="{reporter}",destination_workload="{workload}",destination_workload_namespace="{namespace}"'
_ENVOY = 'envoy_cluster_name="{workload}"'
_RAY = 'application="{name}",deployment="{workload}"'
_RAY_LATENCY = "ray_serve_deployment_processing_latency_ms"
_ROUTE = 'route="{name}",version="{version}"'
ROUTE_COUNTS = ("requests", "errors", "timeouts", "fallbacks")


def _route_moments(name: str) -> Metric:
    parts = {"count": "_count", "sum": "_sum", "squares": "_squares_total"}
    found = {part: f"mlops_route_{name}{suffix}{{{_ROUTE}}}" for part, suffix in parts.items()}
    return Metric(MOMENTS, found, "none")


QUERY_SETS: Mapping[str, QuerySet] = {
    # kserve/kserve python/kserve/kserve/metrics.py: histograms by model_name and nothing else, so no errors: a failed
    # prediction is timed like any other. For errors take the metrics of what stands before it: knative, istio,
    # envoy_gateway. ``namespace`` and ``pod`` are the labels that a PodMonitor adds. ``{workload}`` is the predictor's
    # Deployment, by default that of one InferenceService for each version.
    "kserve": QuerySet(
        {
            "requests": counter(f"request_predict_seconds_count{{{_KSERVE}}}"),
            "latency": histogram("request_predict_seconds", _KSERVE),
        },
        workload="{name}-v{version}-predictor",
        settle=10.0,
    ),
    # Queue-proxy since the OpenTelemetry migration, Knative 1.19 and newer (names as fixed by knative/serving#16290;
    # knative/docs, "Knative Serving Metrics": kn.serving.invocation.duration in seconds, by
    # http.response.status_code). Whether the revision is a label depends on the exporter, so arms are told by the pod,
    # <revision>-deployment-..., which a PodMonitor adds. ``{workload}`` is the revision. The ConfigMap
    # config-observability must set request-metrics-protocol: prometheus.
    "knative": _status_set(
        "kn_serving_invocation_duration_seconds_count",
        _KNATIVE,
        'http_response_status_code=~"5.."',
        "kn_serving_invocation_duration_seconds",
        "seconds",
        settle=10.0,
    ),
    # The same before, OpenCensus (knative/docs docs/serving/metrics.md): counters without _total, milliseconds.
    "knative_opencensus": _status_set(
        "revision_app_request_count",
        _KNATIVE_OLD,
        'response_code_class="5xx"',
        "revision_app_request_latencies",
        "milliseconds",
        replica=("pod_name",),
        settle=10.0,
    ),
    # istio.io/latest/docs/reference/config/metrics. ``reporter`` is destination: the pod's own sidecar counts, and its
    # ``pod`` label is the replica. What never reached a pod is seen with source only, where ``pod`` is the caller's.
    "istio": _status_set(
        "istio_requests_total",
        _ISTIO,
        'response_code=~"5.."',
        "istio_request_duration_milliseconds",
        "milliseconds",
        settle=10.0,
        labels={"reporter": "destination"},
    ),
    # Envoy's cluster statistics (envoy_cluster_upstream_rq_xx by envoy_response_code_class, also for requests that
    # Envoy itself failed; envoy_cluster_upstream_rq_time in milliseconds). Envoy Gateway makes ONE cluster of a rule
    # with several backendRefs, httproute/<namespace>/<route>/rule/<n>, in which the arms cannot be told apart, unless
    # a backendRef has a filter: then there is one per backendRef, .../backend/<m> (envoyproxy/gateway#7008, #7017).
    # ``{workload}`` is that name. The replica is the gateway's pod, not the model's.
    "envoy_gateway": _status_set(
        "envoy_cluster_upstream_rq_xx",
        _ENVOY,
        'envoy_response_code_class="5"',
        "envoy_cluster_upstream_rq_time",
        "milliseconds",
        workload="httproute/{namespace}/{name}/rule/0/backend/{index}",
        settle=10.0,
    ),
    # Ray 2.60, read from a running head (tests/support/metrics/ray_serve.prom): the request counter holds what
    # SUCCEEDED only, while the latency's count holds all, so requests are the latter. The error counter does not exist
    # before the first exception. ``{workload}`` is the deployment.
    "ray_serve": QuerySet(
        {
            "requests": counter(f"{_RAY_LATENCY}_count{{{_RAY}}}"),
            "errors": counter(f"ray_serve_deployment_error_counter_total{{{_RAY}}}", zero=True),
            "latency": histogram(_RAY_LATENCY, _RAY, "milliseconds"),
        },
        replica=("replica",),
    ),
    # This package's own Ray Serve route, GET /<route>/metrics; the label replica is there where a version has several.
    "route": QuerySet(
        {
            **{name: counter(f"mlops_route_{name}_total{{{_ROUTE}}}") for name in ROUTE_COUNTS},
            "latency": histogram("mlops_route_latency_seconds", _ROUTE),
            "prediction": histogram("mlops_route_prediction", _ROUTE, "none"),
            **{name: _route_moments(name) for name in ("log_loss", "brier")},
        },
        replica=("instance", "replica"),
    ),
}


def metric_from(name: str, value: Any) -> Metric:
    """A metric from a query, or from ``{"query", "unit", "zero"}`` or ``{"count", "sum", "squares" | "buckets"}``.

    :raises InvalidInputError: another form, or a query that cannot give counts
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise InvalidInputError(f"the name {name!r} of a query has other signs than letters, digits and _")
    given = {"query": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
    unit, zero, query = given.pop("unit", None), bool(given.pop("zero", False)), given.pop("query", None)
    texts = [*given.values(), *([] if query is None else [query])]
    fits = {"count", "sum"} <= set(given) <= set(MOMENT_PARTS) if query is None else set(given) <= {"sum"}
    if not fits or not all(isinstance(each, str) and each.strip() for each in texts):
        raise InvalidInputError(
            f"the query {name!r} is {value!r}; expected a query, or a dictionary with query (and unit, zero, sum), or "
            "one with count and sum, and squares or buckets"
        )
    for part, text in {**given, **({} if query is None else {"query": query})}.items():
        check_counts(name if part == "query" else f"{name}.{part}", text)
    if query is None:
        return Metric(MOMENTS, given, unit or "none")
    if metric_of(selectors(query)[0]).endswith("_bucket"):
        return Metric(HISTOGRAM, {HISTOGRAM: query, **given}, unit or _unit_of(query))
    if given or unit:
        option = "sum" if given else "unit"
        raise InvalidInputError(f"the query {name!r} has a {option}, but its series are no _bucket: it is a count")
    return Metric(COUNT, {COUNT: query}, zero=zero)


def _unit_of(query: str) -> str:
    return "milliseconds" if re.search(r"_(milliseconds|ms)_bucket\b", query) else "seconds"


def queries_of(base: str | None, queries: Mapping[str, Any] | None = None) -> QuerySet:
    """The built-in set ``base``, with ``queries`` laid over it; a query that is ``None`` is left out.

    :raises InvalidInputError: an unknown set, a query that cannot be used, or no ``requests``
    """
    if base is not None and base not in QUERY_SETS:
        raise InvalidInputError(f"the query set {base!r} is unknown; expected one of {', '.join(QUERY_SETS)}")
    found = QUERY_SETS[base] if base is not None else QuerySet({})
    metrics = dict(found.metrics)
    for name, value in (queries or {}).items():
        if value is None:
            metrics.pop(name, None)
        else:
            metrics[name] = metric_from(name, value)
    requests = metrics.get("requests")
    if requests is None or requests.kind != COUNT:
        raise InvalidInputError(
            "the queries have no counter 'requests', which every comparison needs; give one, or a built-in set: "
            + ", ".join(QUERY_SETS)
        )
    known = {metric_of(each) for each in selectors(requests.parts[COUNT])}
    for name, metric in metrics.items():
        # The same counter with one more matcher: as long as it exists, what is not there has not happened.
        if metric.kind == COUNT and {metric_of(each) for each in selectors(metric.parts[COUNT])} <= known:
            metrics[name] = replace(metric, zero=True) if name != "requests" else metric
    return replace(found, metrics=metrics)
