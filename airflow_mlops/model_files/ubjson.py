"""Universal Binary JSON as XGBoost writes it, walked without keeping its values."""

from __future__ import annotations

import struct
from typing import BinaryIO

_SIZES = {b"Z": 0, b"N": 0, b"T": 0, b"F": 0, b"i": 1, b"U": 1, b"C": 1, b"I": 2, b"l": 4, b"d": 4, b"L": 8, b"D": 8}
_INTEGERS = {b"i": ">b", b"U": ">B", b"I": ">h", b"l": ">i", b"L": ">q"}
_DEEPEST = 64


def keys_of(file: BinaryIO) -> list[str]:
    """The keys of the object that fills ``file``, values skipped.

    :raises ValueError: it is no such object, is cut off, or something follows it
    """
    if file.read(1) != b"{":
        raise ValueError("no UBJSON object")
    keys = _object(file, 0)
    if file.read(1):
        raise ValueError("something follows the object")
    return keys


def _take(file: BinaryIO, count: int) -> bytes:
    found = file.read(count)
    if len(found) != count:
        raise ValueError("it is cut off")
    return found


def _length(file: BinaryIO, kind: bytes | None = None) -> int:
    kind = kind or _take(file, 1)
    if kind not in _INTEGERS:
        raise ValueError(f"{kind!r} where a length was expected")
    (value,) = struct.unpack(_INTEGERS[kind], _take(file, _SIZES[kind]))
    if value < 0:
        raise ValueError("a negative length")
    return value


def _skip(file: BinaryIO, count: int) -> None:
    while count > 0:
        count -= len(_take(file, min(count, 1 << 20)))


def _value(file: BinaryIO, depth: int, kind: bytes) -> None:
    if depth > _DEEPEST:
        raise ValueError("it is nested too deeply")
    if kind in _SIZES:
        _skip(file, _SIZES[kind])
    elif kind in (b"S", b"H"):
        _skip(file, _length(file))
    elif kind == b"{":
        _object(file, depth + 1)
    elif kind == b"[":
        _array(file, depth + 1)
    else:
        raise ValueError(f"{kind!r} where a value was expected")


def _object(file: BinaryIO, depth: int) -> list[str]:
    keys = []
    while (kind := _take(file, 1)) != b"}":
        keys.append(_take(file, _length(file, kind)).decode())
        _value(file, depth, _take(file, 1))
    return keys


def _array(file: BinaryIO, depth: int) -> None:
    kind, first = None, _take(file, 1)
    if first == b"$":
        kind, first = _take(file, 1), _take(file, 1)
    if first == b"#":
        count = _length(file)
        if kind in _SIZES:
            _skip(file, count * _SIZES[kind])
            return
        for _ in range(count):
            _value(file, depth, kind or _take(file, 1))
        return
    if kind is not None:
        raise ValueError("a typed array without a length")
    while first != b"]":
        _value(file, depth, first)
        first = _take(file, 1)
