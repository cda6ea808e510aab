"""A source of evidence from small JSON, as an operator has it in its arguments and a trigger in its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout.sources.prometheus import PrometheusSource
from airflow_mlops.rollout.sources.prometheus_api import PrometheusApi
from airflow_mlops.rollout.sources.protocol import EvidenceSource, TargetCounters
from airflow_mlops.rollout.sources.query_sets import queries_of

if TYPE_CHECKING:
    from airflow_mlops.rollout.sources.prediction_log import PredictionLogSource

TARGET, PROMETHEUS, PREDICTION_LOG = "target", "prometheus", "prediction_log"
DEFAULT_CONNECTION = "prometheus_default"


def connection_of(config: Mapping[str, Any] | str | None) -> str | None:
    """The Airflow connection that a source of this configuration needs; None for those without."""
    given = _dictionary(config)
    if given["type"] != PROMETHEUS or given.get("url"):
        return None
    return str(given.get("conn_id") or DEFAULT_CONNECTION)


def source_of(
    config: Mapping[str, Any] | str | None,
    *,
    name: str = "",
    namespace: str | None = None,
    metrics: Iterable[str] | None = None,
    prometheus: PrometheusApi | None = None,
) -> EvidenceSource:
    """The source that ``config`` describes.

    ``"target"`` or None: the target's own counters. ``{"type": "prometheus", "set": "knative", "queries": {...}}`` with
    the options of :class:`PrometheusSource` and ``conn_id`` or ``url``; a bare name of a query set is short for it.
    ``{"type": "prediction_log", "path": "s3://..."}`` with the options of :class:`PredictionLogSource`.

    :param name: of the rollout's route or service, unless ``config`` has one
    :param namespace: in which it runs, unless ``config`` has one
    :param metrics: names that the guardrails read; None: all there are
    :param prometheus: the server of the connection that :func:`connection_of` named
    :raises InvalidInputError: an unknown type, query set or option, or a value out of range
    """
    given = _dictionary(config)
    kind = given.pop("type")
    try:
        if kind == TARGET:
            _refuse(kind, given, ())
            return TargetCounters()
        given.setdefault("name", name)
        if kind == PROMETHEUS:
            given.setdefault("namespace", namespace)
            return _prometheus(given, metrics, prometheus)
        given.pop("name")
        return _prediction_log(given, metrics)
    except TypeError as error:
        raise InvalidInputError(f"the source of evidence {kind!r} cannot be made of {sorted(given)}: {error}") from None


def _dictionary(config: Mapping[str, Any] | str | None) -> dict[str, Any]:
    from airflow_mlops.rollout.sources.query_sets import QUERY_SETS

    if config is None or config == TARGET:
        return {"type": TARGET}
    if isinstance(config, str) and config in QUERY_SETS:
        return {"type": PROMETHEUS, "set": config}
    kinds = (TARGET, PROMETHEUS, PREDICTION_LOG)
    if not isinstance(config, Mapping) or config.get("type") not in kinds:
        raise InvalidInputError(
            f"the source of evidence is {config!r}; expected a dictionary with type {', '.join(kinds)}, or the name of "
            f"a query set: {', '.join(QUERY_SETS)}"
        )
    return dict(config)


def _prometheus(
    given: dict[str, Any], metrics: Iterable[str] | None, prometheus: PrometheusApi | None
) -> PrometheusSource:
    given.pop("conn_id", None)
    url, base, queries = given.pop("url", None), given.pop("set", None), given.pop("queries", None)
    timeout = given.pop("timeout", None)
    _refuse(PROMETHEUS, given, _options(PrometheusSource))
    if url:
        prometheus = PrometheusApi(url, timeout=timeout or 10.0)
    if prometheus is None:
        raise InvalidInputError("no Prometheus is known: give the connection's server, or url in the configuration")
    given.setdefault("metrics", metrics)
    return PrometheusSource(prometheus, queries_of(base, queries), **given)


def _prediction_log(given: dict[str, Any], metrics: Iterable[str] | None) -> PredictionLogSource:
    from airflow_mlops.rollout.sources.prediction_log import PredictionLogSource

    _refuse(PREDICTION_LOG, given, _options(PredictionLogSource))
    given.setdefault("metrics", metrics)
    return PredictionLogSource(**given)


def _options(kind: type) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(kind).parameters if name not in ("api", "queries"))


def _refuse(kind: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InvalidInputError(
            f"the source of evidence {kind!r} has the unknown options {', '.join(unknown)}; expected "
            f"{', '.join(sorted(known)) or 'none'}"
        )
