"""Policies from mappings, and their limits; shared by the policies on drift and on harm."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any

from airflow_mlops.exceptions import InvalidInputError

Ranges = Mapping[str, tuple[float, float]]


def known_fields(policy: type, what: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` as arguments of ``policy``; numbers may be strings, as templates render them.

    :param what: how an error calls the policy
    :raises InvalidInputError: an unknown field
    """
    known = [field.name for field in fields(policy)]
    if unknown := sorted(set(value) - set(known)):
        raise InvalidInputError(f"unknown field(s) of a {what}: {', '.join(unknown)}; there are {', '.join(known)}")
    return {name: _number(given) if isinstance(given, str) else given for name, given in value.items()}


def check_ranges(policy: Any, what: str, ranges: Ranges) -> None:
    """:raises InvalidInputError: a field of ``policy`` is no number or outside its range, both ends included"""
    for name, (low, high) in ranges.items():
        value = getattr(policy, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise InvalidInputError(f"{what}: {name} is {value!r}; expected a number from {low} to {high}")


def _number(text: str) -> Any:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
