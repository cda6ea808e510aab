"""A model version's bill of materials: CycloneDX 1.6, with the model, its data, its libraries and its image.

``cyclonedx-python-lib`` makes and checks the document. Its classes have no model card yet, so that one part is laid
into the document it makes, before the whole is held against the schema.
"""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.provenance.modelcard import model_card, properties
from airflow_mlops.provenance.record import ModelRecord, plain

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

#: Under which the document's serial number is made of the record, so that one record is one document.
_NAMESPACE = uuid.UUID("5a0e2d0c-8f0b-5c53-9a8e-3f6b1c1d9b70")
_LINKS = {"vcs": "VCS", "website": "WEBSITE", "documentation": "DOCUMENTATION", "distribution": "DISTRIBUTION"}


def bom_of(record: ModelRecord, *, download_url: str | None = None, registry_url: str | None = None) -> dict[str, Any]:
    """The record as a CycloneDX 1.6 document, valid by its schema; the first component is the model.

    The same record gives the same document.

    :param download_url: where the model lies
    :param registry_url: of the MLflow server, part of the model's package URL
    :raises InvalidInputError: ``cyclonedx-python-lib`` is not installed, or the record makes no valid document
    """
    try:
        from cyclonedx.model.bom import Bom
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.output.json import JsonV1Dot6
    except ImportError as error:
        raise InvalidInputError(
            f"an ML-BOM needs cyclonedx-python-lib ({error}); pip install 'airflow-mlops[provenance]'"
        ) from error
    serial = uuid.uuid5(_NAMESPACE, json.dumps(record.to_json(), sort_keys=True))
    bom = Bom(serial_number=serial, version=1)
    bom.metadata.timestamp = _time(record.get("when.registered"))
    bom.metadata.tools.components.add(_tool())
    whole = Component(name=record.model, version=record.version, type=ComponentType.APPLICATION, bom_ref="release")
    bom.metadata.component = whole
    model = _model(record, download_url, registry_url)
    data, image, libraries = _data(record), _image(record), _libraries(record)
    for component in [model, *data, *image, *libraries]:
        bom.components.add(component)
    bom.register_dependency(whole, [model])
    bom.register_dependency(model, [*data, *image, *libraries])
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    document["components"].sort(key=lambda component: component["bom-ref"] != "model")
    document["components"][0]["modelCard"] = model_card(record)
    document["metadata"]["properties"] = properties(record)
    check(document)
    return document


def check(document: Mapping[str, Any]) -> None:
    """Hold a document against CycloneDX's own schema of its version.

    :raises InvalidInputError: it does not fit, with where and why; or the schema cannot be checked here
    """
    from cyclonedx.exception import MissingOptionalDependencyException
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    try:
        error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(plain(document)))
    except MissingOptionalDependencyException as missing:
        raise InvalidInputError(f"{missing}; pip install 'airflow-mlops[provenance]'") from missing
    if error is not None:
        raise InvalidInputError(f"the ML-BOM does not fit CycloneDX 1.6: {str(error.data)[:1000]}")


def _model(record: ModelRecord, download_url: str | None, registry_url: str | None) -> Component:
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, Property, XsUri
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.contact import OrganizationalEntity
    from packageurl import PackageURL

    told = record.documentation
    links = {**(told.get("links") or {}), **({"distribution": download_url} if download_url else {})}
    if not links.get("vcs") and record.get("code.repository"):
        links["vcs"] = record.get("code.repository")
    qualifiers = {"repository_url": registry_url} if registry_url else {}
    files = [
        Component(
            name=str(file["path"]),
            type=ComponentType.FILE,
            bom_ref=f"file:{file['path']}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=str(file["sha256"]))],
        )
        for file in record.artifacts or ()
    ]
    facts = {
        "run_key": record.run_key,
        "git_revision": record.get("code.revision"),
        "git_dirty": record.get("code.dirty"),
        "entry": record.get("code.entry"),
        "entry_sha256": record.get("code.entry_sha256"),
        "model_digest": record.get("integrity.digest"),
        "signature_uri": record.get("integrity.signature_uri"),
        "signed_by": record.get("integrity.signed_by"),
        "dag_id": record.get("who.dag_id"),
        "dag_run_id": record.get("who.run_id"),
        "gate": record.get("gate.passed"),
        "canary": record.get("canary.verdict"),
        "lock_sha256": record.get("environment.lock.sha256"),
    }
    return Component(
        name=record.model,
        version=record.version,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        description=told.get("description"),
        supplier=OrganizationalEntity(name=told["supplier"]) if told.get("supplier") else None,
        licenses=[LicenseFactory().make_from_string(told["license"])] if told.get("license") else None,
        purl=PackageURL("mlflow", None, record.model, record.version, qualifiers),
        components=files,
        external_references=[
            ExternalReference(type=ExternalReferenceType[_LINKS[kind]], url=XsUri(_uri(str(url))))
            for kind, url in sorted(links.items())
            if url and kind in _LINKS
        ],
        properties=[
            Property(name=f"mlops:{name}", value=str(value).lower() if isinstance(value, bool) else str(value))
            for name, value in facts.items()
            if value is not None
        ],
    )


def _data(record: ModelRecord) -> list[Component]:
    from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
    from cyclonedx.model.component import Component, ComponentType

    found = []
    for name, algorithm, key, label in (
        ("training_set", HashAlgorithm.SHA_256, "sha256", "training set"),
        ("snapshot", HashAlgorithm.MD5, "md5", "raw data"),
    ):
        given = record.get(f"data.{name}") or {}
        if not given.get("uri"):
            continue
        digest = str(given.get(key) or "")
        found.append(
            Component(
                name=f"{record.model} {label}",
                version=digest or None,
                type=ComponentType.DATA,
                bom_ref=name,
                # DVC's hash of a folder is the MD5 of its listing.
                hashes=[HashType(alg=algorithm, content=digest.removesuffix(".dir"))] if digest else None,
                external_references=[
                    ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(_uri(str(given["uri"]))))
                ],
            )
        )
    return found


def _image(record: ModelRecord) -> list[Component]:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    digest = str(record.get("environment.image_digest") or "")
    if not digest.startswith("sha256:"):
        return []
    return [
        Component(
            name=str(record.get("environment.image") or "training image").partition("@")[0],
            version=digest,
            type=ComponentType.CONTAINER,
            bom_ref="image",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest.removeprefix("sha256:"))],
        )
    ]


def _libraries(record: ModelRecord) -> list[Component]:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    pins: Sequence[str] = record.get("environment.lock.packages") or ()
    found = [
        Component(
            name="python", version=record.get("environment.python"), type=ComponentType.PLATFORM, bom_ref="python"
        )
    ]
    for name, _, version in (pin.partition("==") for pin in pins):
        purl = PackageURL("pypi", None, name, version)
        found.append(Component(name=name, version=version, type=ComponentType.LIBRARY, bom_ref=str(purl), purl=purl))
    return found


def _tool() -> Component:
    from cyclonedx.model.component import Component, ComponentType

    from airflow_mlops import __version__

    return Component(name="airflow-mlops", version=__version__, type=ComponentType.APPLICATION)


def _time(text: str | None) -> dt.datetime:
    if text is None:
        return dt.datetime.fromtimestamp(0, dt.timezone.utc)
    found = dt.datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=dt.timezone.utc)


def _uri(text: str) -> str:
    """A path as ``file://`` URI; anything else as it is."""
    return f"file://{quote(text)}" if text.startswith("/") else text
