"""The one place where models of a registry are opened: checked first, loaded after."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import InvalidInputError, RegistryError
from airflow_mlops.storage import read_bytes

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from airflow_mlops.hooks.mlflow import MlflowHook
    from airflow_mlops.model_files.formats import ModelFile

RUN_KEY = "mlops.run_key"
DIGEST, SIGNATURE, SIGNED_BY = "mlops.model_digest", "mlops.signature_uri", "mlops.signed_by"
ALLOW_PICKLE = "mlops.allow_pickle"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedModel:
    """A model whose files have been checked.

    :param folder: where they lie on this machine
    :param digest: of all of them, see :mod:`airflow_mlops.model_files.digest`
    :param files: what each of them is
    :param signed_by: who signed it; None where no signature was asked for
    """

    folder: str
    digest: str
    files: tuple[ModelFile, ...]
    signed_by: str | None = None

    @property
    def pickled(self) -> bool:
        """Whether it may be loaded in a sandbox only."""
        return any(file.pickled for file in self.files)


class Models:
    """Opens models of one MLflow, after their digest, their signature and their formats.

    :param hook: of the registry
    :param signing_conn_id: connection of type ``model_signing``; versions of registered models are then opened only
        with a signature that it vouches for. Without it the digest that was recorded at registration still counts
    :param allow_pickle: open pickles, too; a registered version needs the tag ``mlops.allow_pickle`` besides
    """

    def __init__(self, hook: MlflowHook, signing_conn_id: str | None = None, allow_pickle: bool = False) -> None:
        self._hook = hook
        self._signing_conn_id = signing_conn_id
        self._allow_pickle = allow_pickle
        self._opened: dict[str, OpenedModel] = {}

    def open(self, uri: str, *, unregistered: bool = False) -> OpenedModel:
        """The model at ``uri``, checked; once for each of its versions.

        :param uri: as of :meth:`airflow_mlops.hooks.mlflow.MlflowHook.model_dir`
        :param unregistered: without a version, as a challenger is before the gate, it may be unsigned
        :raises InvalidInputError: files were changed, added or removed; the version is not signed, or another one's
            signature was put on it; a file is of no allowed format
        """
        name, version = self._hook.resolve(uri) if uri.startswith("models:/") else ("", None)
        if version is None:
            if self._signing_conn_id and not unregistered:
                raise InvalidInputError(
                    f"{uri} is no version of a registered model, so it has no signature; give models:/name/version, or "
                    "leave signing_conn_id out"
                )
            return self._keep(uri, lambda: self._look(uri, self._hook.model_dir(uri), self._allow_pickle))
        exact = f"models:/{name}/{version}"
        return self._keep(exact, lambda: self.open_version(name, version, exact))

    def open_version(self, name: str, version: str, uri: str) -> OpenedModel:
        """The same for the files at ``uri``, which are said to be those of a version.

        :raises InvalidInputError: as of :meth:`open`
        :raises RegistryError: there is no such version
        """
        what = f"version {version} of {name}"
        found = self._hook.version(name, version)
        folder = self._hook.model_dir(uri)
        recorded, signed_by = found.tags.get(DIGEST), None
        expected = recorded
        if self._signing_conn_id:
            digest, signed_by = self._verify(found, folder, what)
            if recorded and recorded != digest:
                raise InvalidInputError(
                    f"{what} carries the digest {recorded} as tag {DIGEST!r}, but {digest} was signed; somebody "
                    "changed the tag. Register the model again from its training."
                )
            expected = digest
        elif recorded:
            from airflow_mlops.model_files.digest import check_digest

            check_digest(folder, recorded, what)
        allowed = self._allow_pickle and found.tags.get(ALLOW_PICKLE) == "true"
        opened = self._look(what, folder, allowed)
        if expected and opened.digest != expected:
            raise InvalidInputError(f"{what} at {folder} changed while it was checked; see who else writes there")
        return OpenedModel(opened.folder, opened.digest, opened.files, signed_by)

    def digest_of(self, name: str, version: str) -> str | None:
        """What was recorded when the version was registered; None of one from before digests were."""
        return self._hook.version(name, version).tags.get(DIGEST)

    def load(self, uri: str) -> Any:
        """The model at ``uri`` as ``mlflow.pyfunc`` model, in this process.

        :raises InvalidInputError: as of :meth:`open`; it is a pickle
        """
        from airflow_mlops.evaluation.scorer import load

        return load(self.open(uri).folder)

    def predict_proba(
        self, uri: str, frame: pd.DataFrame, features: Sequence[str] | None = None, *, unregistered: bool = False
    ) -> np.ndarray:
        """Probability of the positive class for each row; see :meth:`predictor`."""
        return self.predictor(uri, features, unregistered=unregistered)(frame)

    def predictor(
        self, uri: str, features: Sequence[str] | None = None, *, unregistered: bool = False
    ) -> Callable[[pd.DataFrame], np.ndarray]:
        """A frame to the probability of the positive class for each row, the model loaded once; a pickle answers from a
        sandbox, anew for each frame.

        :raises InvalidInputError: as of :meth:`open`; the model answers with something else; a sandbox cannot be had
        """
        from airflow_mlops.evaluation.scorer import load, predict_proba

        opened = self.open(uri, unregistered=unregistered)
        if opened.pickled:
            return lambda frame: _answered(opened, uri, frame, features)
        model = load(opened.folder)
        return lambda frame: predict_proba(model, frame, features)

    def inputs(self, uri: str, *, unregistered: bool = False) -> list[str] | None:
        """The named inputs of the model's signature, read without loading it; None when it names none."""
        from mlflow.models import Model

        schema = Model.load(self.open(uri, unregistered=unregistered).folder).get_input_schema()
        return list(schema.input_names()) if schema is not None and schema.has_input_names() else None

    def latency(self, uri: str, frame: pd.DataFrame, features: Sequence[str] | None = None) -> dict[str, Any]:
        """As :func:`airflow_mlops.evaluation.latency.measure`; of a pickle in a sandbox."""
        from airflow_mlops.evaluation.latency import measure

        opened = self.open(uri, unregistered=True)
        if not opened.pickled:
            return measure(opened.folder, frame, features)
        from airflow_mlops.provenance.sandbox import Sandbox

        with Sandbox([opened.folder]) as box:
            frame.head(200).to_parquet(box.folder / "rows.parquet", index=False)
            job = {"model": opened.folder, "rows": "rows.parquet", "features": list(features or ()), "calls": 200}
            return box.run("airflow_mlops.evaluation.latency:main", {**job, "allow_pickle": True})

    def _keep(self, key: str, make: Any) -> OpenedModel:
        if key not in self._opened:
            self._opened[key] = make()
        return self._opened[key]

    def _look(self, what: str, folder: str, allow_pickle: bool) -> OpenedModel:
        from airflow_mlops.evaluation.scorer import require_model
        from airflow_mlops.model_files.digest import model_digest
        from airflow_mlops.model_files.formats import check

        require_model(folder)
        opened = OpenedModel(folder, model_digest(folder), check(folder, allow_pickle=allow_pickle))
        if opened.pickled:
            findings_of(what, folder)
        return opened

    def _verify(self, found: Any, folder: str, what: str) -> tuple[str, str]:
        """Digest and signer of a version; see :meth:`open`."""
        from airflow_mlops.hooks.signing import SigningHook

        place, key = found.tags.get(SIGNATURE), found.tags.get(RUN_KEY)
        if not place or not key:
            raise InvalidInputError(
                f"{what} is not signed (it has no tag {SIGNATURE if not place else RUN_KEY!r}). Register it with "
                f"signing_conn_id; where you know its files to be good, MlflowHook(...).sign_version({found.name!r}, "
                f"{str(found.version)!r}, {self._signing_conn_id!r}) signs them as they are"
            )
        first = self._hook.versions_tagged(found.name, RUN_KEY, key)[0]
        if str(first.version) != str(found.version):
            raise RegistryError(
                f"{what} says that it is from the training {key!r}, which made version {first.version}: somebody gave "
                "it the papers of that one. Point the alias to a version that was registered."
            )
        try:
            signature = read_bytes(place)
        except FileNotFoundError:
            raise InvalidInputError(f"the signature of {what} is gone from {place}; register it again") from None
        signed = SigningHook(str(self._signing_conn_id)).verify(folder, signature, found.name, key)
        log.info("%s holds what %s signed: %s", what, signed.signed_by, signed.digest)
        return signed.digest, signed.signed_by


def _answered(opened: OpenedModel, uri: str, frame: pd.DataFrame, features: Sequence[str] | None) -> np.ndarray:
    """The answer of a pickle, from a sandbox."""
    import numpy as np

    from airflow_mlops.provenance.sandbox import Sandbox

    with Sandbox([opened.folder]) as box:
        frame.to_parquet(box.folder / "rows.parquet", index=False)
        names = {"rows": "rows.parquet", "predictions": "predictions.f64", "features": list(features or ())}
        box.run("airflow_mlops.evaluation.scorer:answer", {"model": opened.folder, "allow_pickle": True, **names})
        values = np.frombuffer(box.read("predictions.f64"), dtype="<f8")
    # The process ran the model's own code, which may have written anything.
    if values.shape != (len(frame),) or not (np.isfinite(values) & (values >= 0) & (values <= 1)).all():
        raise InvalidInputError(f"the pickled model at {uri} left no probability for each of {len(frame)} rows")
    return values


def findings_of(what: str, folder: str) -> list[dict[str, Any]]:
    """What scanners say of the pickles in ``folder``, logged.

    :raises InvalidInputError: one of them convicts it
    """
    from dataclasses import asdict

    from airflow_mlops.provenance.pickles import refuse_convicted, scan

    findings = scan(folder)
    log.warning("%s is pickled and was allowed to be; scanners say: %s", what, "; ".join(map(str, findings)))
    refuse_convicted(findings, folder)
    return json.loads(json.dumps([asdict(finding) for finding in findings]))
