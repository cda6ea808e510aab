"""What a user adds to a rendered manifest: merged as ``kubectl`` would, misspelt fields and plain secrets refused."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from airflow_mlops.exceptions import InvalidInputError

#: Key by which the items of a list are the same thing, as Kubernetes declares them for pods (and KubeRay for groups).
MERGE_KEYS: Mapping[str, str] = {
    **dict.fromkeys(("containers", "initContainers", "volumes", "env", "imagePullSecrets", "resourceClaims"), "name"),
    "claims": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "hostAliases": "ip",
    "workerGroupSpecs": "groupName",
}
#: Lists that grow; any other list is replaced.
APPENDED = ("tolerations", "envFrom", "topologySpreadConstraints", "readinessGates", "schedulingGates", "add")

_LISTS = frozenset((*MERGE_KEYS, *APPENDED)) - {"add", "workerGroupSpecs"}

TEMPLATE_FIELDS = frozenset(("metadata", "spec"))
METADATA_FIELDS = frozenset(("annotations", "labels", "finalizers", "name", "namespace"))
POD_FIELDS = frozenset(
    (
        *("activeDeadlineSeconds", "affinity", "automountServiceAccountToken", "containers", "dnsConfig", "dnsPolicy"),
        *("enableServiceLinks", "ephemeralContainers", "hostAliases", "hostIPC", "hostNetwork", "hostPID", "hostUsers"),
        *("hostname", "hostnameOverride", "imagePullSecrets", "initContainers", "nodeName", "nodeSelector", "os"),
        *("overhead", "preemptionPolicy", "priority", "priorityClassName", "readinessGates", "resourceClaims"),
        *("resources", "restartPolicy", "runtimeClassName", "schedulerName", "schedulingGates", "schedulingGroup"),
        *("securityContext", "serviceAccount", "serviceAccountName", "setHostnameAsFQDN", "shareProcessNamespace"),
        *("subdomain", "terminationGracePeriodSeconds", "tolerations", "topologySpreadConstraints", "volumes"),
    )
)
CONTAINER_FIELDS = frozenset(
    (
        *("args", "command", "env", "envFrom", "image", "imagePullPolicy", "lifecycle", "livenessProbe", "name"),
        *("ports", "readinessProbe", "resizePolicy", "resources", "restartPolicy", "restartPolicyRules"),
        *("securityContext", "startupProbe", "stdin", "stdinOnce", "terminationMessagePath"),
        *("terminationMessagePolicy", "tty", "volumeDevices", "volumeMounts", "workingDir"),
    )
)

#: Words in the name of an environment variable that say its value is a secret, unless the value is a file's path.
_SECRET_WORDS = frozenset(
    ("PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "SECRETS", "TOKEN", "APIKEY", "CREDENTIAL", "CREDENTIALS")
)
_SECRET_PAIRS = re.compile(r"(^|_)(API|ACCESS|PRIVATE|SECRET|SIGNING|ENCRYPTION|ACCOUNT|SAS)_KEY(_ID)?(_|$)")
_SECRET_VALUES = re.compile(
    r"AKIA[0-9A-Z]{16}|ASIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|\bgh[pousr]_[A-Za-z0-9]{30}"
    r"|\bgithub_pat_\w{20}|\bglpat-[\w-]{16}|\bxox[abprs]-[\w-]{10}|\bsk-[\w-]{20}|\bhf_[A-Za-z0-9]{30}"
    r"|\bAIza[\w-]{35}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.|://[^/\s:@]+:[^/\s:@]+@"
)


def merged(base: Any, patch: Any, key: str = "") -> Any:
    """``base`` with a strategic merge patch applied; neither is changed.

    Dicts are merged field by field, None removes a field; lists of named things (containers, env, volumes, ...) are
    merged by name, lists in :data:`APPENDED` grow, any other list is replaced.
    """
    if isinstance(base, Mapping) and isinstance(patch, Mapping):
        result = {name: copy.deepcopy(value) for name, value in base.items()}
        for name, value in patch.items():
            if value is None:
                result.pop(name, None)
            else:
                result[name] = merged(base.get(name), value, name)
        return result
    if isinstance(base, list) and isinstance(patch, list | tuple):
        if key in APPENDED:
            return [*copy.deepcopy(base), *(copy.deepcopy(item) for item in patch if item not in base)]
        if key in MERGE_KEYS:
            return _merged_by(MERGE_KEYS[key], base, patch)
    if isinstance(patch, Mapping):
        return merged({}, patch)  # without its Nones
    return copy.deepcopy(list(patch) if isinstance(patch, tuple) else patch)


def _merged_by(name: str, base: list[Any], patch: Iterable[Any]) -> list[Any]:
    result = list(copy.deepcopy(base))
    for item in patch:
        known = item.get(name) if isinstance(item, Mapping) else None
        for index, present in enumerate(result):
            if known is not None and present.get(name) == known:
                result[index] = merged(present, item)
                break
        else:
            result.append(merged({}, item) if isinstance(item, Mapping) else copy.deepcopy(item))
    return result


def check_pod_override(what: str, override: Any, container: str) -> None:
    """Check a pod template override as far as that is possible without the cluster; the API server checks the rest.

    :param what: what it is called in messages
    :param override: the pod template to merge: ``{"metadata": {...}, "spec": {...}}``
    :param container: name of the container that runs Ray
    :raises InvalidInputError: a misspelt field, a container that is neither Ray's nor complete, a plain-text secret
    """
    template = _mapping(what, override)
    spec = _mapping(f"{what}.spec", template.get("spec"))
    if not set(template) & TEMPLATE_FIELDS and set(template) & POD_FIELDS:
        raise InvalidInputError(f"{what} has {', '.join(sorted(template))} at its top; put them below 'spec'")
    if unknown := sorted(set(template) - TEMPLATE_FIELDS):
        raise InvalidInputError(f"{what} has unknown fields {', '.join(unknown)}; expected 'metadata' and 'spec'")
    refuse_misspelt(f"{what}.metadata", _mapping(f"{what}.metadata", template.get("metadata")), METADATA_FIELDS)
    refuse_misspelt(f"{what}.spec", spec, POD_FIELDS)
    _check_lists(f"{what}.spec", spec)
    for field in ("containers", "initContainers"):
        for index, entry in enumerate(spec.get(field) or ()):
            path = f"{what}.spec.{field}[{index}]"
            _check_lists(path, entry)
            refuse_misspelt(path, entry, CONTAINER_FIELDS)
            if not entry.get("name"):
                raise InvalidInputError(f"{path} has no name; Ray's container is called {container!r}")
            if not entry.get("image") and not (field == "containers" and entry["name"] == container):
                raise InvalidInputError(
                    f"{path} is called {entry['name']!r} and has no image; Ray's container is called {container!r}, a "
                    "container of your own needs an image"
                )
            for pair in entry.get("env") or ():
                if "value" in pair:
                    refuse_plain_secrets(f"{path}.env", {str(pair.get("name")): pair["value"]})


def _check_lists(what: str, value: Mapping[str, Any]) -> None:
    for field in _LISTS & set(value):
        if value[field] is None:
            continue
        if not isinstance(value[field], list | tuple):
            kind = type(value[field]).__name__
            raise InvalidInputError(f"{what}.{field} is a {kind}; expected a list of dicts, as in a pod's manifest")
        for index, item in enumerate(value[field]):
            if not isinstance(item, Mapping):
                raise InvalidInputError(f"{what}.{field}[{index}] is {item!r}; expected a dict")


def refuse_misspelt(what: str, value: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse fields that are unknown and close to a known one.

    Others may be of a newer Kubernetes than this list, and the API server refuses what it does not know.

    :raises InvalidInputError: names the field that was probably meant
    """
    names = list(known)
    for field in value:
        if field not in names and (close := difflib.get_close_matches(str(field), names, n=1, cutoff=0.8)):
            raise InvalidInputError(f"{what} has no field {field!r}; did you mean {close[0]!r}?")


def refuse_plain_secrets(what: str, env: Mapping[str, Any]) -> None:
    """Refuse environment variables whose name or value looks like a secret: anyone who may read pods can read them.

    :raises InvalidInputError: names the variable, never its value
    """
    for name, value in env.items():
        if _looks_secret(str(name), str(value)):
            raise InvalidInputError(
                f"{what} has {name} in plain text, which everybody who may look at the RayJob or its pods can read; "
                "put it into a Kubernetes Secret and name that in env_from, or set valueFrom.secretKeyRef in "
                "pod_template_overrides"
            )


def _looks_secret(name: str, value: str) -> bool:
    if _SECRET_VALUES.search(value):
        return True
    upper = re.sub(r"[^A-Z0-9]+", "_", name.upper())
    named = bool(_SECRET_WORDS & set(upper.split("_")) or _SECRET_PAIRS.search(upper))
    # A path to a mounted secret is no secret; neither is a switch.
    return named and value.lower() not in ("", "0", "1", "true", "false") and not value.startswith("/")


def env_values(runtime_env: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The environment variables of a Ray runtime environment."""
    yield from _mapping("runtime_env['env_vars']", runtime_env.get("env_vars")).items()


def _mapping(what: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"{what} is a {type(value).__name__}; expected a dict")
    return value
