"""Checks of single values, with errors that say what was expected."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.overrides import refuse_misspelt

_QUANTITY = re.compile(r"^(\d+(?:\.\d+)?)(m|k|[KMGTPE]i?)?$")
_UNITS = {"m": 1e-3, "": 1.0, "k": 1e3, **{unit: 1000.0**power for power, unit in enumerate("KMGTPE", 1)}}
_UNITS |= {f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", 1)}
LABEL_VALUE = re.compile(r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")
LABEL_KEY = re.compile(r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")
DNS_LABEL = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
RAY_VERSION = re.compile(r"\d+\.\d+\.\d+")
OBJECT_NAME = re.compile(r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")
ENV_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_.-]*$")


def quantity(what: str, value: Any) -> float:
    """A Kubernetes quantity as a number: ``"500m"`` is 0.5, ``"4Gi"`` is 4 * 2**30.

    :raises InvalidInputError: it is not one
    """
    match = None if isinstance(value, bool) else _QUANTITY.match(str(value))
    if match is None:
        raise InvalidInputError(f'{what} is {value!r}; expected a quantity such as 2, "500m" or "8Gi"')
    return float(match[1]) * _UNITS[match[2] or ""]


def one_of(what: str, value: Any, known: Any) -> None:
    """:raises InvalidInputError: ``value`` is not one of ``known``"""
    if value not in tuple(known):
        raise InvalidInputError(f"{what} is {value!r}; expected one of {', '.join(known)}")


def seconds(name: str, value: Any) -> float:
    """``value`` as seconds, more than 0.

    :raises InvalidInputError: it is not
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise InvalidInputError(f"{name} is {value!r}; expected seconds, more than 0")
    return number


def mapping_of(what: str, value: Any) -> Mapping[str, Any]:
    """``value``, which must be a dict.

    :raises InvalidInputError: it is not
    """
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"{what} is {value!r}; expected a dict")
    return value


def names_of(what: str, value: Any) -> Sequence[str]:
    """``value``, which must be a list.

    :raises InvalidInputError: it is not
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InvalidInputError(f"{what} is {value!r}; expected a list of names")
    return value


def list_of_dicts(what: str, value: Any) -> Sequence[Mapping[str, Any]]:
    """``value``, which must be a list of dicts.

    :raises InvalidInputError: it is not
    """
    if not isinstance(value, list | tuple):
        raise InvalidInputError(f"{what} is {value!r}; expected a list of dicts")
    for index, item in enumerate(value):
        mapping_of(f"{what}[{index}]", item)
    return value


def count(what: str, value: Any, at_least: int) -> int:
    """``value``, which must be a whole number by its type.

    :raises InvalidInputError: it is not, or less than ``at_least``
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise InvalidInputError(f"{what} is {value!r}; expected a whole number of at least {at_least}")
    return value


def text_of(what: str, value: Any, example: str) -> str:
    """``value``, which must be a string and not empty.

    :param example: of one, for the message
    :raises InvalidInputError: it is not
    """
    if not isinstance(value, str) or not value.strip():
        raise InvalidInputError(f"{what} is {value!r} ({type(value).__name__}); expected a string such as {example!r}")
    return value


def name_of(what: str, value: Any, of: str) -> str:
    """``value``, which must be the name of a Kubernetes object.

    :param of: what kind of object, for the message
    :raises InvalidInputError: it is not
    """
    if not isinstance(value, str) or not OBJECT_NAME.match(value):
        raise InvalidInputError(
            f"{what} is {value!r}; expected the name of a {of}: lower-case letters, digits, - and ."
        )
    return value


def plain_values(what: str, value: Any) -> Mapping[str, Any]:
    """``value``, which must be a dict of names and strings, numbers or booleans.

    :raises InvalidInputError: it is not; names the entry
    """
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping) and "name" in item for item in value):
        raise InvalidInputError(
            f'{what} is a list of name and value, as in a pod; expected a dict such as {{"NAME": "value"}}'
        )
    for name, item in mapping_of(what, value).items():
        if not isinstance(name, str) or not isinstance(item, str | int | float):
            raise InvalidInputError(
                f"{what}[{name!r}] is a {type(item).__name__}; expected a name and a plain value: a string, a number "
                "or a boolean"
            )
    return value


def json_of(what: str, value: Any) -> Any:
    """``value``, which must be of JSON's types, for it becomes part of a manifest.

    :raises InvalidInputError: it is not
    """
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{what} cannot be written into a manifest ({error}); expected strings, numbers, booleans, lists and dicts"
        ) from None
    if (name := _odd_name(value)) is not None:
        raise InvalidInputError(f"{what} has the field {name!r} ({type(name).__name__}); expected strings as names")
    return value


def _odd_name(value: Any) -> Any:
    """A name of a field, however deep, that is no string; None without one."""
    if isinstance(value, Mapping):
        odd = next((name for name in value if not isinstance(name, str)), None)
        return odd if odd is not None else _odd_name(list(value.values()))
    found = (_odd_name(item) for item in value) if isinstance(value, list | tuple) else ()
    return next((name for name in found if name is not None), None)


def check_labels(what: str, labels: Any) -> None:
    """:raises InvalidInputError: ``labels`` are not Kubernetes labels, or are this package's own"""
    for key, value in mapping_of(what, labels).items():
        if not isinstance(key, str) or not LABEL_KEY.match(key):
            raise InvalidInputError(f"{what} has the key {key!r}; expected a Kubernetes label name, such as team")
        if key.partition("/")[0] == "mlops.airflow.org":
            raise InvalidInputError(f"{what} has {key!r}; names below mlops.airflow.org/ are this package's own")
        if not isinstance(value, str) or not LABEL_VALUE.match(value):
            raise InvalidInputError(
                f"{what}[{key!r}] is {value!r}; expected a Kubernetes label value: a string of at most 63 letters, "
                "digits, '-', '_' and '.'"
            )


def known_fields(what: str, kind: type, value: Any) -> dict[str, Any]:
    """A copy of ``value``, whose keys must be fields of the dataclass ``kind``.

    :raises InvalidInputError: a key is not
    """
    names = [entry.name for entry in fields(kind)]
    refuse_misspelt(what, mapping_of(what, value), names)
    if unknown := sorted(str(name) for name in set(value) - set(names)):
        raise InvalidInputError(f"{what} has unknown fields {', '.join(unknown)}; expected {', '.join(names)}")
    return dict(value)


def check_ray_version(image: str, ray_version: str | None, driver_version: str | None = None) -> str:
    """The Ray version of head, workers and driver, which must be one.

    :param image: of head and workers; its tag says the version where it is Ray's own image, or has ``ray2.60.0`` in it
    :param ray_version: what the user says
    :param driver_version: Ray that the driver was written for, for example the one beside Airflow; None: any
    :raises InvalidInputError: two of them differ, or none is known
    """
    tagged = _tagged_version(image)
    said = {"ray_version": ray_version, f"the image {image}": tagged, "the driver's Ray": driver_version}
    known = {what: version for what, version in said.items() if version}
    for what, version in known.items():
        if not RAY_VERSION.match(version):
            raise InvalidInputError(f"{what} is {version!r}; expected a Ray version such as 2.60.0")
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{what} is {version}" for what, version in known.items())
        raise InvalidInputError(f"head, workers and driver need one Ray version: {listed}; use one image for all")
    if not (ray_version or tagged):
        raise InvalidInputError(f"the tag of image {image} does not say which Ray it has; give ray_version")
    return str(ray_version or tagged)


def check_python_version(image: str, python: tuple[int, int]) -> None:
    """Check that a function pickled with ``python`` can be loaded in ``image``, whose tag may say its own (``-py311``).

    :raises InvalidInputError: the minor versions differ
    """
    found = re.search(r"[-_.]py(3)\.?(\d{1,2})(?!\d)", image.rpartition(":")[2])
    if found and (int(found[1]), int(found[2])) != python:
        raise InvalidInputError(
            f"train_fn was pickled with Python {python[0]}.{python[1]} and the image {image} has {found[1]}.{found[2]}"
            "; use an image with the same Python, or an importable function"
        )


def _tagged_version(image: str) -> str | None:
    repository, _, tag = image.partition("@")[0].rpartition(":")
    if not repository or "/" in tag:
        return None
    own = re.match(r"ray(-\w+)?$", repository.rpartition("/")[2])
    found = re.match(r"(\d+\.\d+\.\d+)(?![\w.])", tag) if own else re.search(r"ray[-_.]?(\d+\.\d+\.\d+)", tag)
    return found[1] if found else None
