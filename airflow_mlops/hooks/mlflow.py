"""The model registry and experiment tracking of MLflow."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_mlops.exceptions import (
    ConcurrentChangeError,
    ExternalSystemError,
    InvalidInputError,
    MlopsError,
    RegistryError,
)
from airflow_mlops.hooks._models import DIGEST, RUN_KEY, SIGNATURE, SIGNED_BY, Models
from airflow_mlops.storage import is_local, local_path, write_bytes

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

_ENVIRONMENT = threading.RLock()
LEASE_SECONDS = 60.0
LEASE_SETTLE_SECONDS = 1.0
#: Where artifacts lie that only MLflow's own server reads and writes.
SERVER_ONLY = ("mlflow-artifacts:", "dbfs:", "databricks:")
# Errors of MLflow that say that the request, not the server, is wrong.
REFUSALS = frozenset(
    {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "PERMISSION_DENIED"}
)


class MlflowHook(BaseHook):
    """MLflow's tracking store and model registry, both at one URI.

    The URI is ``tracking_uri``, else the connection's (extra ``tracking_uri``, or host, schema and port), else the
    environment variable ``MLFLOW_TRACKING_URI``. Login and password (or extra ``token``) of the connection reach
    MLflow only while one of its calls runs; the process's environment is as before afterwards.

    :param mlflow_conn_id: the Airflow connection; ``mlflow_default`` need not exist
    :param tracking_uri: overrides the connection's URI, for example ``sqlite:////data/mlflow.db``
    :param signing_conn_id: connection of type ``model_signing``: versions are then loaded only with a signature that it
        vouches for
    :param allow_pickle: load pickles, too, in a sandbox; see :class:`airflow_mlops.hooks._models.Models`
    """

    conn_name_attr = "mlflow_conn_id"
    default_conn_name = "mlflow_default"
    conn_type = "mlflow"
    hook_name = "MLflow"

    def __init__(
        self,
        mlflow_conn_id: str = default_conn_name,
        tracking_uri: str | None = None,
        *,
        signing_conn_id: str | None = None,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__()
        self.mlflow_conn_id = mlflow_conn_id
        self._tracking_uri = tracking_uri
        self.models = Models(self, signing_conn_id, allow_pickle)

    @cached_property
    def _connection(self) -> Any | None:
        try:
            return self.get_connection(self.mlflow_conn_id)
        except AirflowNotFoundException:
            if self.mlflow_conn_id == self.default_conn_name:
                return None
            raise InvalidInputError(
                f"there is no connection {self.mlflow_conn_id!r}; create it with type mlflow, or give tracking_uri"
            ) from None

    @cached_property
    def tracking_uri(self) -> str:
        """The URI of the tracking store and registry.

        :raises InvalidInputError: nothing names one
        """
        uri = self._tracking_uri or self._connection_uri() or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise InvalidInputError(
                f"no MLflow tracking URI: set it in the connection {self.mlflow_conn_id!r} (extra tracking_uri, or the "
                "host), in the environment variable MLFLOW_TRACKING_URI, or as tracking_uri of the operator"
            )
        return uri

    def _connection_uri(self) -> str | None:
        connection = self._connection
        if connection is None:
            return None
        if uri := connection.extra_dejson.get("tracking_uri"):
            return uri
        if not connection.host or "://" in connection.host:
            return connection.host
        port = f":{connection.port}" if connection.port else ""
        return f"{connection.schema or 'http'}://{connection.host}{port}"

    @cached_property
    def _credentials(self) -> dict[str, str]:
        """Environment for MLflow's client; a server the connection does not name never sees its password."""
        connection = self._connection
        if connection is None or self.tracking_uri != self._connection_uri():
            return {}
        found = {
            "MLFLOW_TRACKING_USERNAME": connection.login,
            "MLFLOW_TRACKING_PASSWORD": connection.password,
            "MLFLOW_TRACKING_TOKEN": connection.extra_dejson.get("token"),
        }
        return {name: value for name, value in found.items() if value}

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While inside, what MLflow's client raises is one of this package's errors.

        :raises RegistryError: MLflow refuses what was asked
        :raises ExternalSystemError: it does not answer, or failed
        """
        try:
            yield
        except MlopsError:
            raise
        except Exception as error:
            # Only what has loaded MLflow can raise its exception.
            from mlflow.exceptions import MlflowException

            if not isinstance(error, MlflowException):
                raise
            if error.error_code in REFUSALS:
                raise RegistryError(f"MLflow refuses it: {_first_line(error)}") from error
            raise self._unreachable(error) from error

    @contextmanager
    def session(self) -> Iterator[None]:
        """While inside, MLflow's own functions use this hook's store and credentials; restored afterwards."""
        values = {"MLFLOW_TRACKING_URI": self.tracking_uri, "MLFLOW_REGISTRY_URI": self.tracking_uri}
        values |= self._credentials
        with _ENVIRONMENT:
            before = {name: os.environ.get(name) for name in values}
            os.environ.update(values)
            try:
                yield
            finally:
                for name, value in before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value

    @cached_property
    def client(self) -> Any:
        """A ``mlflow.MlflowClient`` on this hook's store, its schema in place."""
        from mlflow import MlflowClient

        with self._file_lock("schema"):
            client = MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)
            answering = _WithSession(client, self) if self._credentials else client
            if self._sqlite_path:
                # Migrations of a fresh SQLite crash when two processes run them at once.
                answering.search_experiments(max_results=1)
                answering.search_registered_models(max_results=1)
        return answering

    def get_conn(self) -> Any:
        """The same as :attr:`client`."""
        return self.client

    def ensure_store(self) -> None:
        """Create the tables of a fresh SQLite store, safely beside other processes that do so too."""
        _ = self.client

    @property
    def _sqlite_path(self) -> str | None:
        """The database file behind the tracking URI, or None when the store is a server."""
        prefix = "sqlite:///"
        return os.path.abspath(self.tracking_uri[len(prefix) :]) if self.tracking_uri.startswith(prefix) else None

    @contextmanager
    def _file_lock(self, purpose: str) -> Iterator[None]:
        """Exclusive for ``purpose`` among all processes that use the same SQLite store; nothing for a server."""
        if not (path := self._sqlite_path):
            yield
            return
        import fcntl

        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            file = open(f"{path}.{purpose}.lock", "a")  # noqa: SIM115
        except OSError as error:
            raise ExternalSystemError(f"cannot write beside the MLflow store {path}: {error.strerror}") from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def test_connection(self) -> tuple[bool, str]:
        """Whether the registry answers, for Airflow's connection form."""
        try:
            self.client.search_registered_models(max_results=1)
        except Exception as error:
            return False, str(error)
        return True, f"the registry at {_without_password(self.tracking_uri)} answers"

    # --- the registry ---------------------------------------------------------------------------------------

    def version_by_alias(self, name: str, alias: str, missing_ok: bool = False) -> Any | None:
        """The ``ModelVersion`` that ``alias`` of the registered model ``name`` points to.

        :param missing_ok: answer None when the model has versions but never had this alias
        :return: None when the model never had any version
        :raises RegistryError: the alias is not set though versions exist, or it was set and its version is gone
        :raises ExternalSystemError: the registry does not answer
        """
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise self._unreachable(error) from error
        model = self.registered_model(name)
        if model is None:
            return None
        versions = sorted(int(version.version) for version in self._versions(f"name={_quoted(name)}"))
        fix = (
            f"set it with MlflowClient().set_registered_model_alias({name!r}, {alias!r}, <version>)"
            f" to one of the versions {versions[-5:]}"
            if versions
            else "delete the registered model to start anew, or register a version and promote it"
        )
        if last := model.tags.get(alias_tag(alias)):
            # MLflow drops an alias together with its version; without our record that looks like a first run.
            raise RegistryError(
                f"{name} had version {last} as {alias!r}, but that version or its alias was deleted; {fix}"
            )
        if not versions or missing_ok:
            return None
        raise RegistryError(f"{name} has {len(versions)} version(s) but no alias {alias!r}; {fix}")

    def registered_model(self, name: str) -> Any | None:
        """The ``RegisteredModel``, or None when there is none of that name."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise self._unreachable(error) from error

    def version(self, name: str, version: str | int) -> Any:
        """The ``ModelVersion``.

        :raises RegistryError: it does not exist
        """
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_model_version(name, str(version))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise self._unreachable(error) from error
        versions = sorted(int(known.version) for known in self._versions(f"name={_quoted(name)}"))
        raise RegistryError(f"{name} has no version {version}; it has {versions[-5:] if versions else 'none'}")

    def newest_version(self, name: str) -> Any | None:
        """The ``ModelVersion`` with the highest number; None when the model has none."""
        found = self._versions(f"name = {_quoted(name)}")
        return max(found, key=lambda version: int(version.version), default=None)

    def versions_tagged(self, name: str, tag: str, value: str) -> list[Any]:
        """The versions of ``name`` whose tag is ``value``, oldest first."""
        found = self._versions(f"name={_quoted(name)} and tags.`{tag}`={_quoted(value)}")
        return sorted(found, key=lambda version: int(version.version))

    def _versions(self, where: str) -> list[Any]:
        from mlflow.exceptions import MlflowException

        try:
            return list(self.client.search_model_versions(where, max_results=10_000))
        except MlflowException as error:
            raise self._unreachable(error) from error

    @contextmanager
    def lease(self, name: str) -> Iterator[None]:
        """Exclusive right to move aliases of the registered model ``name``, for up to a minute.

        MLflow cannot compare and set. On SQLite this is a file lock. On a server it is Fischer's mutual exclusion on
        a tag of the model: see it free, write one's own name, wait, and go on only if it is still there. It holds as
        long as a write reaches the server within ``LEASE_SETTLE_SECONDS``.

        :raises ConcurrentChangeError: somebody else holds it
        :raises ExternalSystemError: the server does not take it
        """
        if self._sqlite_path:
            with self._file_lock("lease"):
                yield
            return
        import time
        import uuid

        from mlflow.exceptions import MlflowException

        key, token = "mlops.lease", uuid.uuid4().hex
        held = self._lease_holder(name, key)
        if held and held[1] > time.time():
            raise ConcurrentChangeError(f"somebody else is promoting {name} right now; clear this task to try again")
        failure: Exception | None = None
        try:
            self.client.set_registered_model_tag(name, key, f"{token} {time.time() + LEASE_SECONDS:.3f}")
        except MlflowException as error:  # of two first writes at once the store refuses one
            failure = error
        time.sleep(LEASE_SETTLE_SECONDS)
        held = self._lease_holder(name, key)
        if not held and failure is not None:
            raise self._unreachable(failure) from failure
        if not held or held[0] != token:
            raise ConcurrentChangeError(f"somebody else began to promote {name} first; clear this task to try again")
        try:
            yield
        finally:
            self.client.delete_registered_model_tag(name, key)

    def _lease_holder(self, name: str, key: str) -> tuple[str, float] | None:
        model = self.registered_model(name)
        if model is None:
            raise RegistryError(f"there is no registered model {name!r}; register a version first")
        token, _, until = (model.tags.get(key) or "").partition(" ")
        return (token, float(until)) if token else None

    # --- models ---------------------------------------------------------------------------------------------

    def model_dir(self, uri: str) -> str:
        """A local folder with the model at ``uri``; local artifacts are used in place, others are downloaded.

        :param uri: a path, ``models:/name/3``, ``models:/name@champion``, ``runs:/...`` or an artifact store's URI

        :raises RegistryError: no such model, version or alias
        :raises InvalidInputError: nothing is stored there
        """
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        location = self.artifact_location(uri)
        if is_local(location):
            path = local_path(location)
            if not os.path.isdir(path):
                raise InvalidInputError(f"there is no model folder {path} (from {uri!r}); was it deleted?")
            return path
        with self.session():
            try:
                return download_artifacts(artifact_uri=location, tracking_uri=self.tracking_uri)
            except MlflowException as error:
                raise self._unreachable(error) from error

    def mlmodel(self, uri: str) -> dict[str, Any]:
        """What the ``MLmodel`` file of the model at ``uri`` says, without the rest of the model.

        :raises RegistryError: no such model, version or alias
        :raises InvalidInputError: no such file is stored there
        """
        import yaml
        from mlflow.artifacts import load_text
        from mlflow.exceptions import MlflowException

        location = self.artifact_location(uri)
        try:
            with self.session():
                return yaml.safe_load(load_text(f"{location.rstrip('/')}/MLmodel"))
        except (MlflowException, OSError) as error:
            raise InvalidInputError(
                f"there is no MLmodel file at {location} (from {uri!r}): {error}; give the folder of an MLflow model"
            ) from error

    def artifact_location(self, uri: str) -> str:
        """Where the model at ``uri`` lies: ``models:/`` and ``runs:/`` resolved, anything else as it is.

        :raises RegistryError: no such model, version or alias
        """
        if uri.startswith("models:/"):
            name, version = self.resolve(uri)
            if version is None:
                return self.client.get_logged_model(name).artifact_location
            return self.client.get_model_version_download_uri(name, version)
        if uri.startswith("runs:/"):
            run_id, _, path = uri.removeprefix("runs:/").partition("/")
            return f"{self.client.get_run(run_id).info.artifact_uri}/{path}"
        return uri

    def resolve(self, uri: str) -> tuple[str, str | None]:
        """``models:/name/3`` or ``models:/name@alias`` as name and version; ``models:/m-...`` as id and None.

        :raises RegistryError: no such model, version or alias
        """
        rest = uri.removeprefix("models:/").strip("/")
        if "@" in rest:
            name, _, alias = rest.rpartition("@")
            found = self.version_by_alias(name, alias)
            if found is None:
                raise RegistryError(f"{uri}: {name} has no versions; register one first")
            return name, str(found.version)
        name, _, version = rest.rpartition("/")
        if not name:
            return version, None
        return name, str(self.version(name, version).version)

    def load(self, uri: str) -> Any:
        """The model at ``uri`` as ``mlflow.pyfunc`` model; pickled flavours are refused.

        :raises InvalidInputError: no model is there, it is not the one that was registered, or loading it would run
            code that it holds
        """
        return self.models.load(uri)

    def predict_proba(self, uri: str, frame: pd.DataFrame, features: Sequence[str] | None = None) -> np.ndarray:
        """Probability of the positive class for each row, shape (rows,); the model's signature names its inputs,
        ``features`` does where it has none. See :func:`airflow_mlops.evaluation.scorer.predict_proba`.
        """
        return self.models.predict_proba(uri, frame, features)

    def sign_version(self, name: str, version: str, signing_conn_id: str, *, evidence_uri: str | None = None) -> str:
        """Sign a version that was registered without a signature, as its files are now; returns who signed.

        For versions from before signatures were asked for: it vouches for files that nobody has watched since.

        :param evidence_uri: folder for the signature, which every worker can read; None: the artifacts of its run
        :raises InvalidInputError: its files are not those that were registered, where that is on record; it was not
            registered by ``MlflowRegisterOperator``; a later version repeats its training; only MLflow's server reads
            the artifacts of its run, and there is no ``evidence_uri``
        """
        from airflow_mlops.hooks.signing import SigningHook

        found = self.version(name, version)
        key = found.tags.get(RUN_KEY)
        if not key or str(self.versions_tagged(name, RUN_KEY, key)[0].version) != str(found.version):
            raise InvalidInputError(
                f"version {version} of {name} is not the first of its training (tag {RUN_KEY!r} is {key!r}); register "
                "it with MlflowRegisterOperator"
            )
        folder = evidence_uri or f"{self.client.get_run(found.run_id).info.artifact_uri}/evidence"
        if folder.startswith(SERVER_ONLY):
            raise InvalidInputError(
                f"the artifacts of this MLflow are at {folder}, which only its server can read; give evidence_uri, a "
                "folder that every worker can read"
            )
        uri = f"models:/{name}/{version}"
        opened = Models(self, allow_pickle=True).open(uri)
        signed = SigningHook(signing_conn_id).sign(opened.folder, name, key)
        if signed.digest != opened.digest:
            raise InvalidInputError(f"{uri} changed while it was signed; see who else writes to {opened.folder}")
        tags = {
            DIGEST: signed.digest,
            SIGNATURE: write_bytes(f"{folder.rstrip('/')}/{found.name}-{found.version}.sig", signed.content),
            SIGNED_BY: signed.signed_by,
        }
        for tag, value in tags.items():
            self.client.set_model_version_tag(name, str(version), tag, value)
        return signed.signed_by

    # --- runs -----------------------------------------------------------------------------------------------

    def experiment_id(self, name: str) -> str:
        """The id of the experiment, created when absent.

        With a SQLite store its artifacts go beside the database (MLflow's default follows the current directory),
        or below the connection's extra ``artifact_root``.

        :raises RegistryError: the experiment was deleted
        """
        from mlflow.exceptions import MlflowException

        for _ in range(2):
            found = self.client.get_experiment_by_name(name)
            if found is not None:
                if found.lifecycle_stage == "deleted":
                    raise RegistryError(
                        f"the experiment {name!r} was deleted; restore it with `mlflow experiments restore "
                        f"--experiment-id {found.experiment_id}`, or use another name"
                    )
                return found.experiment_id
            try:
                return self.client.create_experiment(name, artifact_location=self._artifact_root(name))
            except MlflowException as error:
                # Another task created it since we looked.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise self._unreachable(error) from error
        raise ExternalSystemError(f"the experiment {name!r} exists and cannot be read; see the server's log")

    def _artifact_root(self, experiment: str) -> str | None:
        root = self._connection.extra_dejson.get("artifact_root") if self._connection is not None else None
        if not root and self._sqlite_path:
            root = os.path.join(os.path.dirname(self._sqlite_path), "mlartifacts")
        return f"{root.rstrip('/')}/{experiment}" if root else None

    def run_for_key(self, experiment: str, key: str, name: str | None = None, tags: Mapping[str, str] = {}) -> Any:
        """The MLflow run that carries the tag ``mlops.run_key = key``, created when absent."""
        experiment_id = self.experiment_id(experiment)
        with self._file_lock("run"):
            found = self.client.search_runs([experiment_id], f"tags.`mlops.run_key`={_quoted(key)}")
            if found:
                return min(found, key=lambda run: (run.info.start_time, run.info.run_id))
            return self.client.create_run(experiment_id, run_name=name, tags={**tags, "mlops.run_key": key})

    def run_url(self, experiment: str, run_id: str) -> str | None:
        """A run's address in MLflow's web interface, without user and password; None where the store is no server."""
        from urllib.parse import urlsplit

        url = urlsplit(self.tracking_uri)
        if url.scheme not in ("http", "https"):
            return None
        place = url.netloc.rpartition("@")[2]
        path = url.path.rstrip("/")
        return f"{url.scheme}://{place}{path}/#/experiments/{self.experiment_id(experiment)}/runs/{run_id}"

    def _unreachable(self, error: Exception) -> ExternalSystemError:
        return ExternalSystemError(
            f"MLflow at {_without_password(self.tracking_uri)} answered with an error: {_first_line(error)}; is it up, "
            f"and the connection {self.mlflow_conn_id!r} right?"
        )


class _WithSession:
    """A client each of whose calls runs with the hook's credentials in the environment, and only they."""

    def __init__(self, client: Any, hook: MlflowHook) -> None:
        self._client = client
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._hook.session():
                return attribute(*args, **kwargs)

        return call


def alias_tag(alias: str) -> str:
    """The tag of a registered model that records which version last got ``alias``."""
    return f"mlops.alias.{alias}"


def _quoted(value: str) -> str:
    if "'" in value:
        raise InvalidInputError(f"{value!r} holds a quote, which MLflow's search cannot express; rename it")
    return f"'{value}'"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:500]


def _without_password(uri: str) -> str:
    from urllib.parse import urlsplit

    parts = urlsplit(uri)
    return uri.replace(f"{parts.username}:{parts.password}@", "") if parts.password else uri
