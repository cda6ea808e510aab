"""The Serve application of one model: a router in front of two slots. It runs inside Ray.

``POST /<route>`` ``{"request_id", "features": {...}}`` or ``{"items": [...]}`` answers with
``{"request_id", "probability", "version", "arm"}``; ``POST /<route>/feedback`` takes labels, ``GET /<route>/state``
and ``/<route>/metrics`` tell what happened, ``POST /<route>/rollout`` is the operator's. Weights and models arrive as
Serve's ``user_config``, so that changing them restarts nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from airflow_mlops.exceptions import ConcurrentChangeError, InvalidInputError
from airflow_mlops.model_files.digest import model_digest
from airflow_mlops.model_files.formats import check
from airflow_mlops.rollout.targets.book import SLOTS, Book
from airflow_mlops.storage import is_local, local_path

log = logging.getLogger("ray.serve")
#: Calls with copies for a shadow that may be on their way at once: a slow shadow must not fill the router's memory.
_MOST_COPIES = 64


@serve.deployment
class Slot:
    """Holds one model version; another version given by ``user_config`` replaces it without a restart.

    What it loads is looked at first: its files have to be of the allowed formats, none of them a pickle, and to have
    the digest of the version, where the configuration says which. A model that cannot be loaded leaves the slot not
    ready with the reason, rather than failing the deployment.
    """

    def __init__(self) -> None:
        import mlflow.pyfunc

        # Unpickling a model runs whatever its file says; MLflow reads this at each load.
        os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
        self._load_model = mlflow.pyfunc.load_model
        self._config: dict[str, Any] = {}
        self._model: Any = None
        self._error: str | None = None
        self._digest: str | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def reconfigure(self, config: dict[str, Any]) -> None:
        """Load ``config["uri"]``, unless it is what is loaded; ``config["digest"]`` is what its files have to have."""
        config = dict(config or {})
        same = all(config.get(key) == self._config.get(key) for key in ("version", "uri", "digest"))
        self._config = config
        if same and self._error is None:
            return
        self._model, self._error, self._digest = None, None, None
        if not config.get("uri"):
            return
        try:
            model = self._checked(config)
            self._predict, self._dtypes = _scorer(model)
            self._model = model
        except Exception as error:
            log.exception("cannot load %s", config["uri"])
            self._error = f"{type(error).__name__}: {error}"[:2000]

    def _checked(self, config: dict[str, Any]) -> Any:
        # A model may read its files while it serves, so they stay as long as it does.
        self._folder = tempfile.TemporaryDirectory(prefix="slot-")
        place = _fetch(config["uri"], self._folder.name)
        check(place)
        self._digest = model_digest(place)
        expected = config.get("digest")
        if expected and self._digest != expected:
            raise InvalidInputError(
                f"version {config.get('version')} has the digest {self._digest}, but {expected} was recorded when it "
                "was registered: its files were changed, added or removed since"
            )
        # Bytecode would add files to a model that is used where it lies.
        sys.dont_write_bytecode = True
        return self._load_model(place)

    def describe(self) -> dict[str, Any]:
        """Version, URI, digest of what was found there, readiness and, when the model could not be loaded, why;
        ``revision`` as for the router.
        """
        return {
            "version": self._config.get("version"),
            "uri": self._config.get("uri"),
            "digest": self._digest,
            "revision": self._config.get("revision", 0),
            "ready": self._model is not None,
            "error": self._error,
        }

    def predict(self, rows: list[dict[str, Any]]) -> tuple[list[float], str]:
        """Probabilities for feature dictionaries, in their order, and the replica that gave them."""
        import pandas as pd

        if self._model is None:
            raise RuntimeError(f"no model is loaded: {self._error}")
        frame = pd.DataFrame(rows)
        if self._dtypes:
            missing = [name for name in self._dtypes if name not in frame]
            if missing:
                raise ValueError(f"the request lacks the features {missing}")
            frame = frame[list(self._dtypes)].astype(self._dtypes)
        return [float(value) for value in self._predict(frame)], _replica()


def _fetch(uri: str, folder: str) -> str:
    """A local folder with the model: where it lies, or ``folder`` after a download."""
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    if uri.startswith("models:/"):
        client = MlflowClient()
        # MLflow's own download of such a URI writes a file of its own into the folder.
        if uri.count("/") > 1 or "@" in uri:
            uri = client.get_model_version_download_uri(*get_model_name_and_version(client, uri))
        else:
            uri = client.get_logged_model(uri.removeprefix("models:/")).artifact_location
    if is_local(uri):
        return local_path(uri)
    return download_artifacts(artifact_uri=uri, dst_path=folder)


def _scorer(model: Any) -> tuple[Any, dict[str, Any]]:
    """How to get probabilities of the positive class from a pyfunc model, and its columns with their types."""
    import numpy as np

    schema = model.metadata.get_input_schema()
    dtypes = {column.name: column.type.to_pandas() for column in schema} if schema and schema.has_input_names() else {}
    try:
        raw = model.get_raw_model()
    except NotImplementedError:  # a flavor that wraps none
        raw = None
    call = raw.predict_proba if hasattr(raw, "predict_proba") else model.predict

    def probabilities(frame: Any) -> Any:
        values = np.asarray(call(frame), dtype=float)
        return values[:, -1] if values.ndim == 2 else values.reshape(-1)

    return probabilities, dtypes


def _replica() -> str:
    """This replica's name; blank outside Serve."""
    try:
        return serve.get_replica_context().replica_id.unique_id
    except RayServeException:
        return ""


@dataclass(frozen=True)
class _Asked:
    """One request, and its place in what came together."""

    index: int
    request_id: str
    features: dict[str, Any]


@dataclass(frozen=True)
class _Answers:
    """What one slot made of some requests: a probability each, or None and why."""

    values: list[float | None]
    seconds: float
    replica: str = ""
    error: str | None = None
    timed_out: bool = False


@serve.deployment
class Router:
    """Routes, counts and answers; the only replica, since the counters live in it.

    :param slot_a: handle of slot ``a``
    :param slot_b: handle of slot ``b``
    :param route: name for the metrics
    :param max_remembered: predictions kept for late labels
    :param request_timeout: seconds a slot has to answer; None for no limit
    :param tell_replicas: whether each slot's replicas are counted apart
    """

    def __init__(
        self,
        slot_a: DeploymentHandle,
        slot_b: DeploymentHandle,
        route: str,
        max_remembered: int,
        request_timeout: float | None,
        tell_replicas: bool,
    ) -> None:
        self._slots = dict(zip(SLOTS, (slot_a, slot_b)))
        self._route = route
        self._book = Book(max_remembered)
        self._timeout = request_timeout
        self._tell_replicas = tell_replicas
        self._copies: set[asyncio.Task[None]] = set()

    def reconfigure(self, config: dict[str, Any]) -> None:
        """Take the desired weights, versions and rollout from Serve's ``user_config``."""
        self._book.configure(config or {})

    async def __call__(self, request: Request) -> Response:
        path = request.url.path.removeprefix(request.scope.get("root_path", "")).rstrip("/")
        action = path.removeprefix("/" + self._route).strip("/")
        handlers = {
            ("POST", ""): self._predict,
            ("POST", "feedback"): self._feedback,
            ("POST", "rollout"): self._rollout,
            ("GET", "state"): self._state,
            ("GET", "metrics"): self._metrics,
        }
        handler = handlers.get((request.method, action))
        if handler is None:
            return JSONResponse({"error": f"no {request.method} {action or '/'} on this route"}, 404)
        try:
            return await handler(request)
        except ConcurrentChangeError as error:
            return JSONResponse({"error": str(error)}, 409)
        except (InvalidInputError, ValueError, KeyError, TypeError, AttributeError) as error:
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 422)

    async def _predict(self, request: Request) -> Response:
        body = await request.json()
        single = "items" not in body
        items = [body] if single else body["items"]
        groups: dict[str, list[_Asked]] = {}
        for index, item in enumerate(items):
            features, request_id = item["features"], str(item.get("request_id") or uuid.uuid4().hex)
            if not isinstance(features, dict):
                raise InvalidInputError('expected {"request_id": ..., "features": {name: number, ...}}')
            asked = _Asked(index, request_id, features)
            groups.setdefault(self._book.route(request_id, time.time()), []).append(asked)
        self._copy([asked for group in groups.values() for asked in group], single)
        results: list[dict[str, Any]] = [{}] * len(items)
        answers = await asyncio.gather(*(self._ask(slot, group, single) for slot, group in groups.items()))
        for group, answer in zip(groups.values(), answers):
            for asked, result in zip(group, answer):
                results[asked.index] = result
        if single:
            return JSONResponse(results[0], 500 if "error" in results[0] else 200)
        return JSONResponse({"results": results})

    def _copy(self, group: list[_Asked], timed: bool) -> None:
        """Send copies to the canary of a shadow step; nobody waits for them, and beyond a limit there are none."""
        slot = self._book.copied_to(time.time())
        if slot is None or len(self._copies) >= _MOST_COPIES:
            return
        version = str(self._book.config["versions"][slot])
        self._book.routed[slot] += len(group)

        async def send() -> None:
            self._record(version, group, await self._call(slot, group), timed)

        task = asyncio.get_running_loop().create_task(send())
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    def _record(
        self, version: str, group: list[_Asked], answers: _Answers, timed: bool, fell_back: bool = False
    ) -> None:
        for asked, value in zip(group, answers.values):
            self._book.record(
                version,
                asked.request_id,
                value,
                answers.seconds if timed else None,
                replica=answers.replica if self._tell_replicas else "",
                timed_out=answers.timed_out,
                fell_back=fell_back and value is None,
            )

    async def _ask(self, slot: str, group: list[_Asked], timed: bool) -> list[dict[str, Any]]:
        """Answers of one slot; where the canary fails, stable answers and the failure counts against the canary."""
        config = self._book.config
        stable, version = config.get("stable"), str(config["versions"][slot])
        arm = "stable" if slot == stable else "canary"
        first = await self._call(slot, group)
        failed = arm == "canary" and None in first.values
        self._record(version, group, first, timed, fell_back=failed)
        backup = await self._call(stable, group) if failed else _Answers([None] * len(group), 0.0)
        error = backup.error or first.error
        answers = []
        for asked, value, spare in zip(group, first.values, backup.values):
            answer: dict[str, Any] = {"request_id": asked.request_id, "probability": value, "version": version}
            answer["arm"] = arm
            if value is None and spare is not None:
                answer.update(probability=spare, version=str(config["versions"][stable]), arm="stable", fallback=True)
            elif value is None:
                answer["error"] = error or "the model's answer is not a finite number"
            answers.append(answer)
        return answers

    async def _call(self, slot: Any, group: list[_Asked]) -> _Answers:
        started = time.perf_counter()
        nothing: list[float | None] = [None] * len(group)
        try:
            asking = self._slots[slot].predict.remote([asked.features for asked in group])
            values, replica = await asyncio.wait_for(asking, self._timeout)
        except TimeoutError:
            error = f"no answer within {self._timeout:g} s"
            return _Answers(nothing, time.perf_counter() - started, error=error, timed_out=True)
        except Exception as error:
            return _Answers(nothing, time.perf_counter() - started, error=f"{type(error).__name__}: {error}"[:500])
        finite = [v if math.isfinite(v) else None for v in values]
        return _Answers(finite, time.perf_counter() - started, replica)

    async def _feedback(self, request: Request) -> Response:
        body = await request.json()
        items = body.get("items", [body])
        joined = sum(self._book.feedback(str(item["request_id"]), item["label"]) for item in items)
        return JSONResponse({"joined": joined, "unknown": len(items) - joined})

    async def _state(self, request: Request) -> Response:
        described = await asyncio.gather(*(self._describe(slot) for slot in SLOTS))
        return JSONResponse({**self._book.state(time.time()), "slots": dict(zip(SLOTS, described))})

    async def _describe(self, slot: str) -> dict[str, Any]:
        try:
            return await asyncio.wait_for(self._slots[slot].describe.remote(), timeout=5)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"[:500]
            return {"version": None, "uri": None, "digest": None, "revision": -1, "ready": False, "error": problem}

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(self._book.prometheus(self._route))

    async def _rollout(self, request: Request) -> Response:
        wanted = self._book.config.get("token_sha256")
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if wanted and hashlib.sha256(token.encode()).hexdigest() != wanted:
            return JSONResponse({"error": "the token of the Ray connection is needed to change a rollout"}, 403)
        self._book.change(await request.json(), time.time())
        return JSONResponse(self._book.state(time.time()))


def build(args: dict[str, Any]) -> serve.Application:
    """The application of one model; Serve's ``import_path`` names this function.

    :param args: ``route``; ``slot_cpus`` and ``router_cpus`` (CPUs reserved in Ray, 0: none); ``slot_replicas``;
        ``max_remembered`` (predictions kept for late labels); ``request_timeout`` (seconds a slot has to answer)
    """
    options = {"num_cpus": float(args.get("slot_cpus", 0))}
    slots = [
        Slot.options(  # type: ignore[attr-defined]
            name=f"slot_{slot}",
            num_replicas=int(args.get("slot_replicas", 1)),
            max_ongoing_requests=64,
            ray_actor_options=options,
        ).bind()
        for slot in SLOTS
    ]
    router = Router.options(  # type: ignore[attr-defined]
        name="router",
        num_replicas=1,
        max_ongoing_requests=512,
        ray_actor_options={"num_cpus": float(args.get("router_cpus", 0))},
    )
    timeout = args.get("request_timeout")
    return router.bind(
        *slots,
        str(args["route"]),
        int(args.get("max_remembered", 200_000)),
        None if timeout is None else float(timeout),
        int(args.get("slot_replicas", 1)) > 1,
    )
