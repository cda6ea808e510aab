"""Objects checked against the OpenAPI schemas of their CustomResourceDefinitions, as strictly as an API server does.

Validated: types, required fields, enums, patterns, formats, bounds, int-or-string, keys of map-like lists, labels and
names; in strict mode (``fieldValidation=Strict``) also that no field is unknown. Not validated: CEL rules
(``x-kubernetes-validations``) and whatever the schemas leave open.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

#: Fields of ObjectMeta that a client may meet; CRDs only say ``metadata: object``.
OBJECT_META = {
    *("name", "generateName", "namespace", "labels", "annotations", "finalizers", "ownerReferences", "managedFields"),
    *("uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"),
    "selfLink",
}

_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "array": (list, tuple),
    "object": (dict,),
}
_INT_BITS = {"int32": 31, "int64": 63}
_DATE_TIME = re.compile(r"^\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)$")
_SUBDOMAIN = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
_LABEL = re.compile(r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")


def crd_dir() -> Path | None:
    """Where the CRDs' YAML files lie: ``$KUBE_CRD_DIR``, else ``shared/crds`` beside the checkout, else None."""
    given = os.environ.get("KUBE_CRD_DIR")
    path = Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "crds"
    return path if path.is_dir() else None


class Definition:
    """One CRD; its file is parsed when more than its names is asked for.

    :param path: the YAML file
    :param document: which of its documents
    :param group: API group
    :param kind: kind
    :param plural: resource name in paths
    """

    def __init__(self, path: Path, document: int, group: str, kind: str, plural: str) -> None:
        self.path, self.document, self.group, self.kind, self.plural = path, document, group, kind, plural

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The CRD's ``spec``."""
        return _documents(self.path)[self.document]["spec"]

    @property
    def namespaced(self) -> bool:
        """Whether its objects live in a namespace."""
        return self.spec["scope"] == "Namespaced"

    @property
    def versions(self) -> list[str]:
        """Served versions, the stored one first."""
        served = [version for version in self.spec["versions"] if version["served"]]
        return [version["name"] for version in sorted(served, key=lambda version: not version["storage"])]

    def schema(self, version: str) -> dict[str, Any]:
        """The OpenAPI v3 schema of a version."""
        return self._version(version)["schema"]["openAPIV3Schema"]

    def columns(self, version: str) -> list[dict[str, Any]]:
        """``additionalPrinterColumns`` of a version: dicts with name, type, jsonPath."""
        return self._version(version).get("additionalPrinterColumns", [])

    def has_status(self, version: str) -> bool:
        """Whether ``/status`` is an endpoint of its own."""
        return "status" in self._version(version).get("subresources", {})

    def _version(self, name: str) -> dict[str, Any]:
        return next(version for version in self.spec["versions"] if version["name"] == name)


class CrdSchemas:
    """The CRDs of a folder.

    :param directory: folder of YAML files, one or more CRDs each
    """

    def __init__(self, directory: Path | str) -> None:
        self.kinds: tuple[Definition, ...] = _definitions(Path(directory))

    def find(self, api_version: str, kind: str) -> Definition | None:
        """The CRD of an object's apiVersion and kind, None if there is none that serves it."""
        group, _, version = api_version.rpartition("/")
        for definition in self.kinds:
            if (definition.group, definition.kind) == (group, kind) and version in definition.versions:
                return definition
        return None

    def errors(self, obj: Mapping[str, Any], strict: bool = True) -> list[str]:
        """What an API server would refuse in ``obj``; empty if nothing.

        Unknown fields read ``unknown field "spec.foo"`` (HTTP 400 there), all else is HTTP 422 there.
        """
        schema = self._schema(obj)
        if schema is None:
            return [f'no matches for kind "{obj.get("kind")}" in version "{obj.get("apiVersion")}"']
        found = [*_metadata(obj.get("metadata"), strict), *_check(schema, obj, "", strict)]
        return sorted(found, key=lambda error: not error.startswith("unknown field"))

    def prune(self, obj: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of ``obj`` without the fields that its schema does not know, as a server stores it when not strict."""
        schema = self._schema(obj)
        return copy.deepcopy(dict(obj)) if schema is None else _pruned(schema, obj)

    def with_defaults(self, obj: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of ``obj`` with the schema's defaults for what it leaves out, as a server stores it."""
        result, schema = copy.deepcopy(dict(obj)), self._schema(obj)
        if schema is not None:
            _fill(schema, result)
        return result

    def _schema(self, obj: Mapping[str, Any]) -> dict[str, Any] | None:
        api_version = str(obj.get("apiVersion"))
        definition = self.find(api_version, str(obj.get("kind")))
        return None if definition is None else definition.schema(api_version.rpartition("/")[2])


def label_errors(labels: Mapping[str, Any], path: str = "metadata.labels") -> list[str]:
    """What an API server would refuse in labels (also in a pod template's, which CRDs do not check)."""
    errors = [f"{path}: Invalid value: {key!r}: not a qualified name" for key in labels if not _qualified(key)]
    for key, value in labels.items():
        if not isinstance(value, str) or not _LABEL.match(value):
            errors.append(f"{path}.{key}: Invalid value: {value!r}: not a label value of at most 63 characters")
    return errors


@cache
def _documents(path: Path) -> list[dict[str, Any]]:
    with path.open() as stream:
        return [document for document in yaml.load_all(stream, yaml.CSafeLoader) if document]


@cache
def _definitions(directory: Path) -> tuple[Definition, ...]:
    return tuple(definition for path in sorted(directory.glob("*.y*ml")) for definition in _names(path))


def _names(path: Path) -> Iterator[Definition]:
    text = path.read_text()
    # A megabyte of YAML takes half a second to parse: the names of a file with one CRD are read without.
    patterns = (r"^  group: (\S+)$", r"^    kind: (\S+)$", r"^    plural: (\S+)$")
    matches = [re.search(pattern, text, re.MULTILINE) for pattern in patterns]
    if text.count("\nkind: CustomResourceDefinition\n") == 1 and text.count("\n---\n", 5) == 0 and all(matches):
        group, kind, plural = (match.group(1) for match in matches if match)
        yield Definition(path, 0, group, kind, plural)
        return
    for index, document in enumerate(_documents(path)):
        if document.get("kind") == "CustomResourceDefinition":
            names = document["spec"]["names"]
            yield Definition(path, index, document["spec"]["group"], names["kind"], names["plural"])


def _metadata(metadata: Any, strict: bool) -> Iterator[str]:
    if not isinstance(metadata, Mapping):
        yield "metadata: Required value"
        return
    if strict:
        yield from (f'unknown field "metadata.{key}"' for key in metadata if key not in OBJECT_META)
    name = metadata.get("name")
    if name is None and not metadata.get("generateName"):
        yield "metadata.name: Required value: name or generateName is required"
    elif name is not None and (len(name) > 253 or not _SUBDOMAIN.match(name)):
        yield f"metadata.name: Invalid value: {name!r}: not a lowercase RFC 1123 subdomain of at most 253 characters"
    yield from label_errors(metadata.get("labels") or {})
    for key, value in (metadata.get("annotations") or {}).items():
        if not _qualified(key.lower()) or not isinstance(value, str):
            yield f"metadata.annotations.{key}: Invalid value: {value!r}"


def _qualified(key: str) -> bool:
    prefix, slash, name = key.rpartition("/")
    return bool(name and _LABEL.match(name) and (not slash or (len(prefix) <= 253 and _SUBDOMAIN.match(prefix))))


def _check(schema: Mapping[str, Any], value: Any, path: str, strict: bool) -> Iterator[str]:
    if value is None:
        # A null where there is a default is dropped before the default is filled in.
        if not schema.get("nullable") and "default" not in schema:
            yield f'{path}: Invalid value: "null": must be of type {schema.get("type", "int-or-string")}: "null"'
        return
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield f"{path}: Invalid value: {value!r}: must be an integer or a string"
            return
    elif (expected := schema.get("type")) and (
        not isinstance(value, _TYPES[expected]) or (isinstance(value, bool) and expected != "boolean")
    ):
        yield f'{path}: Invalid value: "{_type_name(value)}": must be of type {expected}: "{_type_name(value)}"'
        return
    if "enum" in schema and value not in schema["enum"]:
        supported = ", ".join(f'"{item}"' for item in schema["enum"])
        yield f'{path}: Unsupported value: "{value}": supported values: {supported}'
    if isinstance(value, str):
        yield from _check_string(schema, value, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _check_number(schema, value, path)
    elif isinstance(value, list | tuple):
        yield from _check_list(schema, value, path, strict)
    elif isinstance(value, Mapping):
        yield from _check_object(schema, value, path, strict)
    yield from _check_logic(schema, value, path)


def _check_string(schema: Mapping[str, Any], value: str, path: str) -> Iterator[str]:
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{path}: Invalid value: \"{value}\": should match '{schema['pattern']}'"
    if schema.get("format") == "date-time" and not _DATE_TIME.match(value):
        yield f'{path}: Invalid value: "{value}": must be of type date-time'
    yield from _check_size(schema, len(value), path, "Length", "characters")


def _check_number(schema: Mapping[str, Any], value: float, path: str) -> Iterator[str]:
    if value < schema.get("minimum", value):
        yield f"{path}: Invalid value: {value}: should be greater than or equal to {schema['minimum']}"
    if value > schema.get("maximum", value):
        yield f"{path}: Invalid value: {value}: should be less than or equal to {schema['maximum']}"
    bits = _INT_BITS.get(schema.get("format", ""))
    if bits and not -(2**bits) <= value < 2**bits:
        yield f"{path}: Invalid value: {value}: must be of type {schema['format']}"


def _check_list(schema: Mapping[str, Any], value: Any, path: str, strict: bool) -> Iterator[str]:
    items = schema.get("items", {})
    for index, item in enumerate(value):
        yield from _check(items, item, f"{path}[{index}]", strict)
    yield from _check_size(schema, len(value), path, "Items", "items")
    kind, seen = schema.get("x-kubernetes-list-type"), []
    for index, item in enumerate(value):
        key = item
        if kind == "map" and isinstance(item, Mapping):
            keys = schema["x-kubernetes-list-map-keys"]
            key = [item.get(name, items["properties"][name].get("default")) for name in keys]
        if kind in ("map", "set"):
            if key in seen:
                yield f"{path}[{index}]: Duplicate value: {key}"
            seen.append(key)


def _check_object(schema: Mapping[str, Any], value: Mapping[str, Any], path: str, strict: bool) -> Iterator[str]:
    properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
    for name in schema.get("required", ()):
        if name not in value and "default" not in properties.get(name, {}):
            yield f"{_join(path, name)}: Required value"
    for name, item in value.items():
        if name in properties:
            yield from _check(properties[name], item, _join(path, name), strict)
        elif isinstance(extra, Mapping):
            yield from _check(extra, item, _join(path, name), strict)
        elif strict and not _open(schema, path, name):
            yield f'unknown field "{_join(path, name)}"'
    yield from _check_size(schema, len(value), path, "Properties", "properties")


def _check_logic(schema: Mapping[str, Any], value: Any, path: str) -> Iterator[str]:
    """``anyOf``, ``oneOf``, ``allOf``, ``not``: they only restrict values, so fields unknown to them do not matter."""

    def fits(part: Mapping[str, Any]) -> bool:
        return not list(_check(part, value, path, strict=False))

    if not all(fits(part) for part in schema.get("allOf", ())):
        yield f"{path}: Invalid value: must validate all the schemas (allOf)"
    if "anyOf" in schema and not any(fits(part) for part in schema["anyOf"]):
        yield f"{path}: Invalid value: must validate at least one schema (anyOf)"
    if "oneOf" in schema and sum(fits(part) for part in schema["oneOf"]) != 1:
        yield f"{path}: Invalid value: must validate one and only one schema (oneOf)"
    if "not" in schema and fits(schema["not"]):
        yield f"{path}: Invalid value: must not validate the schema (not)"


def _check_size(schema: Mapping[str, Any], size: int, path: str, suffix: str, noun: str) -> Iterator[str]:
    least, most = schema.get(f"min{suffix}"), schema.get(f"max{suffix}")
    if least is not None and size < least:
        yield f"{path}: Invalid value: should have at least {least} {noun}"
    if most is not None and size > most:
        yield f"{path}: Too many: {size}: must have at most {most} {noun}"


def _pruned(schema: Mapping[str, Any], value: Any, path: str = "") -> Any:
    if isinstance(value, list | tuple):
        return [_pruned(schema.get("items", {}), item, f"{path}[]") for item in value]
    if not isinstance(value, Mapping):
        return value
    properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
    result = {}
    for name, item in value.items():
        if name in properties:
            result[name] = _pruned(properties[name], item, _join(path, name))
        elif isinstance(extra, Mapping):
            result[name] = _pruned(extra, item, _join(path, name))
        elif _open(schema, path, name):
            result[name] = copy.deepcopy(item)
    if path == "metadata":
        return {name: item for name, item in result.items() if name in OBJECT_META}
    return result


def _fill(schema: Mapping[str, Any], value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            _fill(schema.get("items", {}), item)
    elif isinstance(value, dict):
        properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
        for name, part in properties.items():
            if value.get(name) is None and "default" in part and not (name in value and part.get("nullable")):
                value[name] = copy.deepcopy(part["default"])
        for name, item in value.items():
            _fill(properties.get(name, extra if isinstance(extra, dict) else {}), item)


def _open(schema: Mapping[str, Any], path: str, name: str) -> bool:
    """Whether the unknown field ``name`` is kept; the API server itself knows ObjectMeta and the type's name."""
    if schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("additionalProperties") is True:
        return True
    return path == "metadata" or (path == "" and name in ("apiVersion", "kind", "metadata"))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _type_name(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    for name, types in _TYPES.items():
        if isinstance(value, types):
            return name
    return type(value).__name__
