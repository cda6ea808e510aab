"""A target from small JSON, as the operator, its trigger and the watchdog keep it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout.targets.base import KubernetesTarget
from airflow_mlops.rollout.targets.deployers import Deployer, GivenServices, InferenceServices
from airflow_mlops.rollout.targets.gateway import GatewayRoute
from airflow_mlops.rollout.targets.kserve_knative import KServeKnative
from airflow_mlops.rollout.targets.kserve_standard import KServeStandard
from airflow_mlops.rollout.targets.kube import KubernetesClient
from airflow_mlops.rollout.targets.protocol import Target
from airflow_mlops.rollout.targets.servable import Resolver, fixed_resolver
from airflow_mlops.rollout.targets.watch import Watchdog

KINDS = ("ray_serve", "kserve", "gateway")
MODES = ("knative", "standard")

_COMMON = {"kind": str, "name": str, "namespace": str, "watchdog": Mapping}
_TIMES = {"ready_timeout": (int, float), "weight_timeout": (int, float), "poll": (int, float)}
_MODEL = {"predictor": Mapping, "model_format": str, "format_version": str, "protocol": str}
_ROUTE = {"route": str, "gateway": str, "hostnames": (list, tuple), "path": str, "port": int}
_FIELDS: dict[str, dict[str, Any]] = {
    "kserve": {**_COMMON, **_TIMES, **_MODEL, **_ROUTE, "mode": str, "fallback": str},
    "gateway": {**_COMMON, **_TIMES, **_MODEL, **_ROUTE, "service": str, "services": Mapping},
}
_WATCHDOG = {"image": str, "service_account": str, "deadline": int, "pod": Mapping}
_FLAVOUR = {"model_format": "mlflow", "format_version": "", "protocol": "v2"}

#: Makes a target of a kind that is not in a cluster: given the config, returns the target.
Maker = Callable[[Mapping[str, Any]], Target]


def target_of(
    config: Mapping[str, Any],
    client: KubernetesClient | None,
    *,
    resolver: Resolver | None = None,
    makers: Mapping[str, Maker] | None = None,
    **options: Any,
) -> Target:
    """The target that a configuration describes.

    ``{"kind": "kserve", "mode": "knative" | "standard", "name": ..., "namespace": ..., "predictor": {...}}``;
    ``{"kind": "gateway", "name": ..., "service": "fraud-{version}"}`` for Services that are there, without ``service``
    for an InferenceService per version; both with ``gateway``, ``hostnames``, ``path`` and ``port`` for a route to be
    created, ``route`` for one of another name. ``"fallback": "http_route"`` of a KServe target in Standard mode is for
    releases whose ``spec.canary`` gets no traffic: two InferenceServices behind a route of their own.
    ``"watchdog": {"image": ..., "service_account": ...}`` lets the cluster itself end a canary that nobody renews.

    :param client: of the cluster, for all kinds but ``ray_serve``
    :param resolver: says where a version lies and what it is; else ``model_format``, ``format_version`` and
        ``protocol`` hold for all versions, and a version's URI is where it lies
    :param makers: of kinds that this module does not know
    :param options: further arguments of the target, for example a clock
    :raises InvalidInputError: what is wrong, what was expected
    """
    kind = config.get("kind") if isinstance(config, Mapping) else None
    if kind not in KINDS:
        raise InvalidInputError(f"kind of the target is {kind!r}; expected one of {', '.join(KINDS)}")
    if makers and kind in makers:
        return makers[kind](config)
    if kind not in _FIELDS:
        raise InvalidInputError(f"a target of kind {kind} has to be made by its own client")
    return cluster_target(config, client, resolver=resolver, **options)


def cluster_target(
    config: Mapping[str, Any], client: KubernetesClient | None, *, resolver: Resolver | None = None, **options: Any
) -> KubernetesTarget:
    """The same for the kinds in a cluster."""
    kind = str(config["kind"])
    _check(config, _FIELDS[kind], f"the {kind} target")
    if not config.get("name"):
        raise InvalidInputError(f"name of the {kind} target is blank; expected that of the model's service or route")
    if client is None:
        raise InvalidInputError(f"a {kind} target needs a Kubernetes connection")
    name, namespace = config["name"], config.get("namespace") or None
    options = {**{key: float(config[key]) for key in _TIMES if config.get(key) is not None}, **options}
    if config.get("watchdog"):
        options["watchdog"] = _watchdog(config, client, namespace)
    resolver = resolver or fixed_resolver(*(config.get(key) or usual for key, usual in _in_order()))
    template = config.get("predictor") or {}
    if kind == "gateway" or config.get("fallback"):
        deployer = _deployer(config, client, template, resolver)
        return GatewayRoute(client, name, namespace, deployer=deployer, **_given(config), **options)
    mode = config.get("mode")
    if mode not in MODES:
        raise InvalidInputError(f"mode of the KServe target {name} is {mode!r}; expected one of {', '.join(MODES)}")
    if extra := [key for key in _ROUTE if config.get(key)]:
        raise InvalidInputError(
            f"{', '.join(extra)} of the KServe target {name}: KServe makes its own route; expected them only with "
            "fallback='http_route', or kind='gateway'"
        )
    made = KServeKnative if mode == "knative" else KServeStandard
    return made(client, name, namespace, template=template, resolver=resolver, **options)


def _in_order() -> tuple[tuple[str, str], ...]:
    return tuple((key, _FLAVOUR[key]) for key in ("model_format", "protocol", "format_version"))


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("route", "gateway", "hostnames", "path") if config.get(key)}


def _deployer(
    config: Mapping[str, Any], client: KubernetesClient, template: Mapping[str, Any], resolver: Resolver
) -> Deployer:
    name, namespace, port = config["name"], config.get("namespace") or None, config.get("port", 80)
    if config["kind"] == "kserve":
        if config["fallback"] != "http_route" or config.get("mode") != "standard":
            raise InvalidInputError(
                f"fallback of the KServe target {name} is {config['fallback']!r} in mode {config.get('mode')!r}; "
                "expected 'http_route', in mode 'standard'"
            )
        if not config.get("gateway"):
            raise InvalidInputError(
                f"fallback of the KServe target {name} has no gateway; expected gateway='namespace/name' and the "
                "hostnames under which the model is called: traffic that goes to KServe's own route is not split"
            )
    if config.get("service") or config.get("services"):
        return GivenServices(
            client, namespace, service=config.get("service", ""), names=config.get("services"), port=port
        )
    return InferenceServices(client, name, namespace, template=template, resolver=resolver, port=port)


def _watchdog(config: Mapping[str, Any], client: KubernetesClient, namespace: str | None) -> Watchdog:
    given = config["watchdog"]
    _check(given, _WATCHDOG, "the watchdog")
    watched = {key: value for key, value in config.items() if key not in ("watchdog", "predictor")}
    more = {"deadline": given["deadline"]} if "deadline" in given else {}
    return Watchdog(
        client,
        watched,
        given.get("image", ""),
        given.get("service_account", ""),
        namespace,
        template=given.get("pod") or {},
        **more,
    )


def _check(config: Mapping[str, Any], fields: Mapping[str, Any], what: str) -> None:
    if unknown := sorted(set(config) - set(fields)):
        raise InvalidInputError(
            f"{', '.join(unknown)} of {what}: unknown; expected some of {', '.join(sorted(fields))}"
        )
    for key, value in config.items():
        kinds = fields[key] if isinstance(fields[key], tuple) else (fields[key],)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            expected = " or ".join("an object" if each is Mapping else each.__name__ for each in kinds)
            raise InvalidInputError(f"{key} of {what} is {value!r}; expected {expected}")
