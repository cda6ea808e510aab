"""What is said to a Kubernetes API server and what its answers mean; who says it, sync or async, is the hook's part.

Every operation is a generator of steps: it yields a :class:`Call` to make or a :class:`Pause` to take, is sent the
:class:`Answer`, or has :class:`Unanswered` thrown in, and returns the result. So each rule stands here once.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError, MlopsError
from airflow_mlops.kubernetes_api import Resource

Object = dict[str, Any]
Objects = list[dict[str, Any]]

PAGE = 500
JSON = "application/json"
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"
MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
# The server was busy or broken; the same request can succeed later.
PASSING = (429, 500, 502, 503, 504)
_TEXT = 1000
# What the admission of ResourceQuota answers; the name of the quota follows.
_QUOTA = re.compile(r"exceeded quota: ([^\s,]+)")


class AlreadyExists(ConcurrentChangeError):
    """An object of that name is there already, and this call did not make it."""


class HistoryGone(MlopsError):
    """The version that a watch or a page should start from is forgotten (410): list again."""


class Unanswered(ExternalSystemError):
    """No answer, or half of one: whether the request took effect is unknown."""


class Unavailable(ExternalSystemError):
    """An answer of 429 or 5xx.

    :param delay: seconds after which the server wants to be asked again, None if it did not say
    """

    def __init__(self, message: str, delay: float | None) -> None:
        super().__init__(message)
        self.delay = delay


RAYJOB = Resource("ray.io", "v1", "rayjobs", "RayJob")
RAYCLUSTER = Resource("ray.io", "v1", "rayclusters", "RayCluster")
WORKLOAD = Resource("kueue.x-k8s.io", "v1beta2", "workloads", "Workload")
PODGROUP = Resource("scheduling.volcano.sh", "v1beta1", "podgroups", "PodGroup")
POD = Resource("", "v1", "pods", "Pod")
EVENT = Resource("", "v1", "events", "Event")

# What an account needs for a training; the group, the resource (with its subresource) and the verbs.
NEEDED_ACCESS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("ray.io", "rayjobs", ("create", "get", "list", "watch", "patch", "delete")),
    ("", "pods", ("get", "list")),
    ("", "pods/log", ("get",)),
    ("", "events", ("list",)),
)


@dataclass(frozen=True)
class Call:
    """One request. ``doing`` is what it is for, in the words of RBAC: ``create rayjobs in namespace ml``."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    content_type: str = JSON
    accept: str = JSON
    doing: str = ""


@dataclass(frozen=True)
class Answer:
    """Status, body and the ``Retry-After`` header of one answer."""

    status: int
    text: str = field(repr=False)
    retry_after: str | None = None

    @property
    def data(self) -> Object:
        """The body as a JSON object; empty if it is none."""
        try:
            value = json.loads(self.text)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def explanation(self) -> str:
        """What the server says is wrong."""
        return str(self.data.get("message") or self.text.strip())[:_TEXT]

    @property
    def delay(self) -> float | None:
        """Seconds after which the server wants to be asked again, None if it does not say."""
        told = self.retry_after or (self.data.get("details") or {}).get("retryAfterSeconds")
        try:
            return max(0.0, float(told)) if told else None
        except (TypeError, ValueError):
            return None


@dataclass(frozen=True)
class Pause:
    """Seconds to wait before the next step."""

    seconds: float


Steps = Generator[Any, Any, Any]


class Backoff:
    """Growing pauses with jitter, so that a thousand clients do not come back at once.

    :param first: seconds of the first pause, before jitter
    :param most: seconds that no pause exceeds, unless the server asks for it
    """

    def __init__(self, first: float = 0.5, most: float = 10.0) -> None:
        self._first, self._most, self._failures = first, most, 0

    def reset(self) -> None:
        """Something worked."""
        self._failures = 0

    def after(self, error: BaseException | None = None) -> float:
        """Seconds to wait after one more failure."""
        grown = min(self._most, self._first * 2.0 ** min(self._failures, 16))
        self._failures += 1
        return max(grown * random.uniform(0.5, 1.0), getattr(error, "delay", None) or 0.0)


class Lines:
    """Cuts chunks of bytes into lines."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The lines that ``chunk`` completes."""
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield b"".join([*self._parts, line])
            self._parts = []
        if rest:
            self._parts.append(rest)

    def end(self) -> Iterator[bytes]:
        """The last line, if no newline ended it."""
        if self._parts:
            yield b"".join(self._parts)


def checked(call: Call, answer: Answer) -> Answer:
    """``answer``, if it says that the call took effect.

    :raises InvalidInputError: the request, the account or the cluster must change first; the message says what
    :raises ConcurrentChangeError: 409
    :raises HistoryGone: 410
    :raises ExternalSystemError: a quota of the namespace is used up
    :raises Unavailable: 429 or 5xx
    """
    if 200 <= answer.status < 300:
        return answer
    code, told = answer.status, answer.explanation
    refused = f"cannot {call.doing} (HTTP {code}): {told}"
    if code in PASSING or code > 504:
        raise Unavailable(f"the Kubernetes API failed to {call.doing} (HTTP {code}): {told}", answer.delay)
    if code == 401:
        raise InvalidInputError(
            f"the Kubernetes API does not accept the account's credentials (HTTP 401): {told}. Renew the token or "
            "certificate of the connection's kubeconfig, or check the service account of the worker's pod"
        )
    if code == 403 and (quota := _QUOTA.search(told)):
        raise ExternalSystemError(
            f"{refused}. The quota {quota[1]!r} of the namespace is used up: try again when something in it has ended, "
            "or have it raised"
        )
    if code == 403 and "cannot" in told:
        verb, _, rest = call.doing.partition(" ")
        raise InvalidInputError(
            f"{refused}. The account lacks the verb {verb!r} on {rest}: add it to its Role, and check the RoleBinding"
        )
    if code == 404 and _kind_unknown(answer):
        raise InvalidInputError(
            f"{refused}. The cluster does not serve {call.path.split('/namespaces/')[0]}: is its CRD installed "
            "(for ray.io: KubeRay 1.6 or newer; for kueue.x-k8s.io: Kueue 0.15 or newer, which serves v1beta2), and is "
            "this the right cluster?"
        )
    if code == 409:
        raise ConcurrentChangeError(f"{refused}. Somebody changed it first: read it again and decide anew")
    if code == 410:
        raise HistoryGone(refused)
    raise InvalidInputError(refused)


def missing(answer: Answer) -> bool:
    """Whether the object is not there, though its kind and namespace are known."""
    return answer.status == 404 and not _kind_unknown(answer)


def _kind_unknown(answer: Answer) -> bool:
    # An unknown path is answered in plain text, a missing object by a Status that names it.
    return not (answer.data.get("details") or {}).get("name")


def persist(
    call: Call, patience: float, look: Callable[[], Steps] | None = None, clock: Callable[[], float] = time.monotonic
) -> Steps:
    """Steps of one call, repeated while the server is busy or away: (answer, whether an earlier try may have worked).

    :param patience: seconds after which the last failure is raised
    :param look: steps taken after a failure that may have taken effect; an object that they return is the answer
    :raises ExternalSystemError: no useful answer within ``patience``
    """
    until, backoff, unclear = clock() + patience, Backoff(), False
    while True:
        try:
            answer = yield call
            if answer.status not in PASSING:
                return answer, unclear
            checked(call, answer)
        except (Unanswered, Unavailable) as error:
            # A 429 is given before anything is done.
            doubtful = isinstance(error, Unanswered) or answer.status != 429
            unclear = unclear or doubtful
            if doubtful and look is not None and (found := (yield from look())) is not None:
                return Answer(200, json.dumps(found)), True
            pause = backoff.after(error)
            if clock() + pause > until:
                raise
            yield Pause(pause)


def get(resource: Resource, name: str, namespace: str, patience: float) -> Steps:
    """The object, None if there is none."""
    call = Call("GET", resource.path(namespace, name), doing=f"get {resource.plural} in {namespace!r}")
    answer, _ = yield from persist(call, patience)
    return None if missing(answer) else checked(call, answer).data


def list_page(
    resource: Resource, namespace: str, query: Mapping[str, str], proceed: str | None = None, accept: str = JSON
) -> Call:
    """The call for one page of a list, the one after ``proceed``."""
    paged = {**query, "limit": str(PAGE), **({"continue": proceed} if proceed else {})}
    doing = f"list {resource.plural} in {namespace!r}"
    return Call("GET", resource.path(namespace), paged, accept=accept, doing=doing)


def list_all(resource: Resource, namespace: str, query: Mapping[str, str], patience: float) -> Steps:
    """All objects, page by page, and the version to watch from."""
    found: Objects = []
    proceed = None
    while True:
        call = list_page(resource, namespace, query, proceed)
        answer, _ = yield from persist(call, patience)
        if answer.status == 410 and proceed:
            found, proceed = [], None
            continue
        data = checked(call, answer).data
        # Items of a list carry neither; what reads them may want both.
        kinds = {"apiVersion": resource.api_version, "kind": resource.kind}
        found += [{**kinds, **item} for item in data.get("items") or []]
        proceed = (data.get("metadata") or {}).get("continue")
        if not proceed:
            return found, str((data.get("metadata") or {}).get("resourceVersion") or "")


def create(resource: Resource, body: Object, namespace: str, patience: float) -> Steps:
    """The object as it was created, or as it is found after an answer that said nothing."""
    name = str(body["metadata"]["name"])
    strict = {"fieldValidation": "Strict"}
    doing = f"create {resource.plural} in {namespace!r}"
    call = Call("POST", resource.path(namespace), strict, body, doing=doing)
    there = f"{resource.kind} {name!r} exists already in {namespace!r}"

    def look() -> Steps:
        found = yield from get(resource, name, namespace, patience)
        if found is not None and not _same_maker(body, found):
            raise AlreadyExists(f"{there}, and its labels and annotations say that it is not ours")
        return found

    answer, unclear = yield from persist(call, patience, look)
    if answer.status == 409 and answer.data.get("reason") != "Conflict":
        if unclear and (found := (yield from look())) is not None:
            return found
        raise AlreadyExists(f"{there}: {answer.explanation}")
    return checked(call, answer).data


def patch(
    resource: Resource,
    name: str,
    change: Object,
    namespace: str,
    patience: float,
    resource_version: str | None = None,
    subresource: str | None = None,
) -> Steps:
    """The object after a JSON merge patch."""
    if resource_version:
        change = {**change, "metadata": {**change.get("metadata", {}), "resourceVersion": resource_version}}
    path = resource.path(namespace, name, subresource)
    doing = f"patch {resource.plural}{'/' + subresource if subresource else ''} in {namespace!r}"
    call = Call("PATCH", path, {"fieldValidation": "Strict"}, change, MERGE_PATCH, doing=doing)
    answer, unclear = yield from persist(call, patience)
    if answer.status == 409 and unclear:
        # The conflict may be with our own first try.
        found = yield from get(resource, name, namespace, patience)
        if found is not None and _holds(found, change, skip=("resourceVersion",)):
            return found
    if missing(answer):
        raise ConcurrentChangeError(f"{resource.kind} {name!r} is gone from {namespace!r}: nothing to patch")
    return checked(call, answer).data


def apply(resource: Resource, body: Object, manager: str, namespace: str, patience: float, force: bool) -> Steps:
    """The object after a server-side apply."""
    query = {"fieldManager": manager, "fieldValidation": "Strict", "force": "true" if force else "false"}
    body = {"apiVersion": resource.api_version, "kind": resource.kind, **body}
    path = resource.path(namespace, str(body["metadata"]["name"]))
    call = Call("PATCH", path, query, body, APPLY_PATCH, doing=f"patch {resource.plural} in {namespace!r}")
    answer, _ = yield from persist(call, patience)
    return checked(call, answer).data


def delete(
    resource: Resource,
    name: str,
    namespace: str,
    patience: float,
    uid: str | None = None,
    resource_version: str | None = None,
    grace: int | None = None,
) -> Steps:
    """Whether the object goes; False if it is gone already."""
    conditions = {"uid": uid, "resourceVersion": resource_version}
    options: Object = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
    if uid or resource_version:
        options["preconditions"] = {key: value for key, value in conditions.items() if value}
    if grace is not None:
        options["gracePeriodSeconds"] = grace
    doing = f"delete {resource.plural} in {namespace!r}"
    call = Call("DELETE", resource.path(namespace, name), body=options, doing=doing)
    answer, unclear = yield from persist(call, patience)
    if missing(answer):
        return unclear
    if answer.status == 409:
        # A lost first try (aiohttp, too, sends a DELETE twice) has changed the version by a deletionTimestamp.
        found = yield from get(resource, name, namespace, patience)
        if found is None:
            return unclear
        if found["metadata"].get("deletionTimestamp") and uid in (None, found["metadata"]["uid"]):
            return True
    checked(call, answer)
    return True


def pod_log(name: str, query: Mapping[str, str], namespace: str, patience: float) -> Steps:
    """Text of a pod's log; empty if the pod is gone or has not started."""
    call = log_call(name, query, namespace)
    answer, _ = yield from persist(call, patience)
    return "" if no_log(answer) else checked(call, answer).text


def log_call(name: str, query: Mapping[str, str], namespace: str) -> Call:
    """The call for a pod's log."""
    # Errors are Status objects, for which the server wants JSON to be acceptable.
    doing = f"get pods/log in {namespace!r}"
    return Call("GET", POD.path(namespace, name, "log"), query, accept="*/*", doing=doing)


def no_log(answer: Answer) -> bool:
    """Whether there is no log: the pod is gone, or its container has not started."""
    waits = ("waiting to start", "is not available", "does not have a host assigned")
    return missing(answer) or (answer.status == 400 and any(words in answer.explanation for words in waits))


def version(patience: float) -> Steps:
    """The server's version."""
    call = Call("GET", "/version", doing="get the version")
    answer, _ = yield from persist(call, patience)
    return str(checked(call, answer).data.get("gitVersion") or "of unknown version")


def serves(resource: Resource, patience: float) -> Steps:
    """Whether the cluster knows the kind."""
    call = Call("GET", resource.api_path, doing=f"discover {resource.api_version}")
    answer, _ = yield from persist(call, patience)
    if answer.status == 404:
        return False
    return any(found.get("name") == resource.plural for found in checked(call, answer).data.get("resources") or [])


def lacking(namespace: str, patience: float) -> Steps:
    """The part of :data:`NEEDED_ACCESS` that the account has not, as ``verb resource.group``."""
    denied: list[str] = []
    for group, plural, verbs in NEEDED_ACCESS:
        name, _, subresource = plural.partition("/")
        for verb in verbs:
            wanted = {"namespace": namespace, "group": group, "resource": name, "verb": verb}
            if subresource:
                wanted["subresource"] = subresource
            body = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": wanted},
            }
            path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
            call = Call("POST", path, body=body, doing="create selfsubjectaccessreviews.authorization.k8s.io")
            answer, _ = yield from persist(call, patience)
            if not (checked(call, answer).data.get("status") or {}).get("allowed"):
                denied.append(f"{verb} {plural}{'.' + group if group else ''}")
    return denied


def selector_text(selector: str | Mapping[str, str] | None) -> str:
    """A label selector as the API takes it: text as it is, a mapping as equalities."""
    if isinstance(selector, Mapping):
        return ",".join(f"{key}={value}" for key, value in sorted(selector.items()))
    return selector or ""


def _same_maker(body: Object, found: Object) -> bool:
    ours, theirs = body["metadata"], found["metadata"]
    return all(_holds(theirs.get(part) or {}, ours.get(part) or {}) for part in ("labels", "annotations"))


def _holds(found: Any, change: Any, skip: tuple[str, ...] = ()) -> bool:
    if not isinstance(change, Mapping):
        return found == change
    if not isinstance(found, Mapping):
        return False
    return all(
        key not in found if value is None else _holds(found.get(key), value, skip)
        for key, value in change.items()
        if key not in skip
    )
