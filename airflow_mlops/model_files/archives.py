"""Zip files of models: PyTorch weights, ``torch.export`` programs, and the pickles that any other may hide."""

from __future__ import annotations

import io
import re
import zipfile
from typing import IO

from airflow_mlops.model_files.opcodes import is_pickle, unsafe_globals

TORCH, PT2, SKOPS, ARRAYS = "torch-weights", "torch-export", "skops", "numpy-archive"
#: A pickle beside the tensors is small: it holds their names and shapes.
_MOST_PICKLE = 256 << 20
_TORCH_PLAIN = re.compile(
    r"(data/\d+|version|byteorder|\.format_version|\.storage_alignment|\.data/(version|serialization_id))"
)
_PT2_PLAIN = re.compile(
    r"(data/(weights|constants)/(weight_\d+|tensor_\d+|\w+_config\.json)|models/\w+\.json|archive_format"
    r"|archive_version|byteorder|version|\.data/(version|serialization_id)|extra/[\w.]+)"
)


class Hidden(ValueError):
    """An archive holds a pickle; the message says where."""


def read(file: IO[bytes]) -> str:
    """What a zip file is: ``torch-weights``, ``torch-export``, ``skops`` or ``numpy-archive`` (numbers alone).

    :raises Hidden: a member is a pickle that looks up more than tensors
    :raises ValueError: it is damaged, or nothing of these
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if len(set(names)) != len(names):
            raise ValueError("two members of the archive have one name, of which different readers take different ones")
        if any(member.flag_bits & 1 for member in members):
            raise ValueError("a member of the archive is encrypted")
        root = names[0].split("/", 1)[0] + "/" if names and "/" in names[0] else ""
        inside = {name.removeprefix(root): member for name, member in zip(names, members) if name.startswith(root)}
        if "data.pkl" in inside and len(inside) == len(names):
            return _torch(archive, inside)
        if "archive_format" in inside and len(inside) == len(names):
            return _export(archive, inside)
        return _other(archive, names)


def _torch(archive: zipfile.ZipFile, inside: dict[str, zipfile.ZipInfo]) -> str:
    for name, member in inside.items():
        if name == "data.pkl":
            if unsafe := unsafe_globals(_content(archive, member)):
                raise Hidden(f"its {member.filename} looks up {', '.join(unsafe[:5])}, so it is more than weights")
        elif not _TORCH_PLAIN.fullmatch(name):
            raise Hidden(f"it holds {member.filename}, which is no part of weights")
    return TORCH


def _export(archive: zipfile.ZipFile, inside: dict[str, zipfile.ZipInfo]) -> str:
    for name, member in inside.items():
        if name.startswith("data/sample_inputs/") and name.endswith(".pt"):
            if read(io.BytesIO(_content(archive, member))) != TORCH:
                raise ValueError(f"{member.filename} is no file of tensors")
        elif not _PT2_PLAIN.fullmatch(name):
            raise Hidden(f"it holds {member.filename}, which a program without code has not")
    return PT2


def _other(archive: zipfile.ZipFile, names: list[str]) -> str:
    for name in names:
        with archive.open(name) as member:
            head = member.read(1 << 16)
        if holds_objects(head):
            raise Hidden(f"its member {name} is an array of pickled objects")
        if not head.startswith(b"\x93NUMPY") and is_pickle(head):
            raise Hidden(f"its member {name} is a pickle")
    if "schema.json" in names:
        return SKOPS
    if names and all(name.endswith(".npy") for name in names):
        return ARRAYS
    raise ValueError(f"it is an archive of {', '.join(names[:3]) or 'nothing'}")


def holds_objects(content: bytes) -> bool:
    """Whether ``content`` starts as an ``.npy`` file whose values are pickled objects."""
    header = content[:65536].split(b"\n", 1)[0]
    return content.startswith(b"\x93NUMPY") and re.search(rb"'descr':\s*['\[(][^}]*\bO|\|O", header) is not None


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > _MOST_PICKLE:
        raise ValueError(f"{member.filename} has {member.file_size} bytes, too many for a list of tensors")
    return archive.read(member)
