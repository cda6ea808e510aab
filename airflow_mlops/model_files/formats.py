"""What each file of a model is, by its content. An allowlist: what is not known to be data is refused by name.

Scanners that look for known bad pickles miss most ways to run code (of 22 ways to load a model 19 were missed by the
scanners of a study of 2025, arXiv:2508.19774), so nothing here looks for bad things in what may run code at all.
"""

from __future__ import annotations

import ast
import bz2
import gzip
import importlib.util
import io
import json
import lzma
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.model_files import archives, ubjson
from airflow_mlops.model_files.digest import files_of
from airflow_mlops.model_files.opcodes import is_pickle

HOW_TO_STORE = (
    "Loading it would run whatever code the file holds. Save the model in a format that is only data: "
    "mlflow.xgboost or mlflow.lightgbm with a native Booster, ONNX, torch with serialization_format='pt2', or an "
    "MLflow model from code. Where this model has to be a pickle, say so with allow_pickle=True."
)
PICKLE, PYTHON, TEXT, JSON, DESCRIPTION = "pickle", "python", "text", "json", "mlmodel"
DESCRIPTION_NAME = "MLmodel"
#: Loader of an MLflow model to the prefixes that the class of its model may have; what it loads besides is in files.
_LOADERS: Mapping[str, tuple[str, ...]] = {
    "mlflow.xgboost": ("xgboost.",),
    "mlflow.lightgbm": ("lightgbm.",),
    "mlflow.onnx": (),
    "mlflow.pytorch": (),
    "mlflow.pyfunc.loaders.code_model": (),
}
_PICKLE_LOADERS = frozenset({"mlflow.sklearn", "mlflow.pyfunc.model", "mlflow.pyfunc.loaders.code_model"})
_PICKLE_SUFFIXES = frozenset({".pkl", ".pickle", ".joblib", ".skops", ".dill", ".cloudpickle"})
_MOST_TEXT = 512 << 20
_MOST_PICKLE = 64 << 20
_HEAD = 1 << 16


@dataclass(frozen=True)
class ModelFile:
    """One file of a model.

    :param path: relative to the model's folder
    :param format: ``safetensors``, ``onnx``, ``onnx-weights``, ``xgboost-json``, ``xgboost-ubjson``,
        ``lightgbm-text``, ``torch-weights``, ``torch-export``, ``json``, ``text``, ``mlmodel``; ``python`` is source
        code; ``pickle`` and ``skops`` run code when they are loaded
    :param detail: of a pickle: where it is in the file
    """

    path: str
    format: str
    detail: str = ""

    @property
    def pickled(self) -> bool:
        """Whether loading it runs code that the file itself brings, other than readable source."""
        return self.format in (PICKLE, archives.SKOPS)


class _Unknown(ValueError):
    """A file of no known format; the message says what it looks like."""


def inspect(folder: str | Path) -> tuple[ModelFile, ...]:
    """What each file of the model in ``folder`` is; nothing is loaded, and nothing but pickles of unknown names passes
    without having been read as what it is said to be.

    :raises InvalidInputError: a file is of no allowed format; names each and says how to mend it
    """
    root = Path(folder)
    found, unknown = [], []
    paths = files_of(root)
    # Any file may say that it is ONNX and call its neighbours weights; it is heard where MLflow loads them as such.
    onnx = DESCRIPTION_NAME not in paths or _loader(_yaml(root / DESCRIPTION_NAME)) == "mlflow.onnx"
    weights = {name for path in paths for name in _external(root, path)} if onnx else set()
    for path in paths:
        if path in weights and _only_weights(root / path):
            found.append(ModelFile(path, "onnx-weights"))
            continue
        try:
            found.append(_file(root, path))
        except _Unknown as error:
            unknown.append(f"{path} ({error})")
    if unknown:
        raise InvalidInputError(
            f"the model in {folder} holds files of no allowed format: {', '.join(unknown[:5])}. Allowed are "
            "safetensors, ONNX, XGBoost JSON and UBJSON, LightGBM text, PyTorch weights and torch.export programs, "
            "JSON, text and Python source. Leave other files out of the model, or store them as one of these."
        )
    return tuple(found)


def check(folder: str | Path, *, allow_pickle: bool = False) -> tuple[ModelFile, ...]:
    """:func:`inspect`, and refuse what may not be loaded: pickles, and descriptions that name other code to load them.

    :param allow_pickle: let pickles pass; they may then be loaded in a sandbox only
    :raises InvalidInputError: as of :func:`inspect`; the model is pickled; its ``MLmodel`` names a loader or class
        that is none of the known ones
    """
    files = inspect(folder)
    pickles = [f"{file.path}{f': {file.detail}' if file.detail else ''}" for file in files if file.pickled]
    if pickles and not allow_pickle:
        raise InvalidInputError(f"the model in {folder} is pickled ({'; '.join(pickles[:3])}). {HOW_TO_STORE}")
    for file in files:
        if file.path == DESCRIPTION_NAME:
            check_description(_yaml(Path(folder) / file.path), f"{folder}/MLmodel", allow_pickle=bool(pickles))
    return files


def check_description(mlmodel: Any, where: str, *, allow_pickle: bool = False) -> None:
    """Refuse an ``MLmodel`` that has MLflow import other code than the loaders of the allowed formats.

    :param mlmodel: its content
    :param allow_pickle: loaders of pickles are fine
    :raises InvalidInputError: it names another loader, class or module
    """
    flavors = mlmodel.get("flavors") if isinstance(mlmodel, Mapping) else None
    if not isinstance(flavors, Mapping) or not all(isinstance(flavor, Mapping) for flavor in flavors.values()):
        raise InvalidInputError(f"{where} lists no flavors; expected the file that mlflow's save_model wrote")
    loader = flavors.get("python_function", {}).get("loader_module")
    allowed = {*_LOADERS, *(_PICKLE_LOADERS if allow_pickle else ())}
    if "python_function" in flavors and loader not in allowed:
        pickles = f" {HOW_TO_STORE}" if loader in _PICKLE_LOADERS else ""
        raise InvalidInputError(
            f"{where} has MLflow load the model with {loader!r}; expected one of {', '.join(sorted(allowed))}.{pickles}"
        )
    for name, flavor in flavors.items():
        prefixes = _LOADERS.get(f"mlflow.{name}", ())
        kind = flavor.get("model_class")
        if kind is not None and prefixes and not str(kind).startswith(prefixes):
            raise InvalidInputError(f"{where} has the {name} flavor make a {kind!r}; expected a class of {name}")
        if flavor.get("pickle_module_name", "mlflow.pytorch.pickle_module") != "mlflow.pytorch.pickle_module":
            raise InvalidInputError(f"{where} names the pickle module {flavor['pickle_module_name']!r}; leave it out")


def pickled_files(files: Sequence[ModelFile]) -> list[str]:
    """The paths of those that are pickles."""
    return [file.path for file in files if file.pickled]


def _file(root: Path, path: str) -> ModelFile:
    full = root / path
    with full.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return ModelFile(path, TEXT)
    if detail := _pickle(full, head):
        return ModelFile(path, PICKLE, detail)
    if head.startswith(b"PK\x03\x04"):
        return _archive(full, path)
    for name, read in _READERS.items():
        if read(full, head):
            return ModelFile(path, name)
    text = _text(full)
    if text is None:
        with full.open("rb") as file:
            start = file.read(_MOST_PICKLE)
        if not head.startswith(b"\x93NUMPY") and is_pickle(start):
            return ModelFile(path, PICKLE, "a pickle of protocol 1")
        looks = "an array of numpy" if head.startswith(b"\x93NUMPY") else f"starts with {head[:8]!r}"
        raise _Unknown(looks)
    if is_pickle(text.encode()):
        return ModelFile(path, PICKLE, "a pickle in text")
    if full.suffix.lower() in _PICKLE_SUFFIXES:
        return ModelFile(path, PICKLE, "by its name")
    return ModelFile(path, _kind_of_text(full, text))


def _archive(full: Path, path: str) -> ModelFile:
    try:
        with full.open("rb") as file:
            kind = archives.read(file)
    except archives.Hidden as hidden:
        return ModelFile(path, PICKLE, str(hidden))
    except Exception as error:  # zipfile raises of many kinds on a damaged file
        raise _Unknown(f"a zip file: {error}") from error
    if kind == archives.ARRAYS:
        raise _Unknown("an archive of numpy")
    return ModelFile(path, kind)


def _pickle(full: Path, head: bytes) -> str:
    """Why a file is a pickle; blank where it is none."""
    if head[:1] == b"\x80" and is_pickle(head):
        return f"a pickle of protocol {head[1]}"
    if archives.holds_objects(head):
        return "an array of pickled objects"
    unpacked = _unpacked(head)
    if unpacked is None:
        return ""
    if is_pickle(unpacked) or archives.holds_objects(unpacked):
        return "a compressed pickle"
    return "compressed, by its name a pickle" if full.suffix.lower() in _PICKLE_SUFFIXES else ""


def _unpacked(head: bytes) -> bytes | None:
    """What a compressed file starts with; None of one that is not compressed by what joblib uses."""
    makers: dict[bytes, Callable[[], Any]] = {
        b"\x1f\x8b": lambda: gzip.GzipFile(fileobj=io.BytesIO(head)).read1(4096),
        b"BZh": lambda: bz2.BZ2Decompressor().decompress(head, 4096),
        b"\xfd7zXZ": lambda: lzma.LZMADecompressor().decompress(head, 4096),
        b"\x5d\x00": lambda: lzma.LZMADecompressor().decompress(head, 4096),
        b"x": lambda: zlib.decompressobj().decompress(head, 4096),
    }
    for magic, unpack in makers.items():
        if head.startswith(magic):
            try:
                return unpack()
            except (OSError, EOFError, zlib.error, lzma.LZMAError):
                return None
    return None


def _safetensors(full: Path, head: bytes) -> bool:
    if len(head) < 9 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    size = full.stat().st_size
    if length > min(size - 8, 100 << 20):
        return False
    with full.open("rb") as file:
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            spans = sorted(tuple(item["data_offsets"]) for name, item in header.items() if name != "__metadata__")
            end = 0
            for start, stop in spans:
                # Holes and overlaps are where a second format would hide.
                if start != end or stop < start:
                    return False
                end = stop
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return end == size - 8 - length


def _ubjson(full: Path, head: bytes) -> bool:
    if head[:1] != b"{" or head[1:2] not in b"LlIUi":
        return False
    with full.open("rb") as file:
        try:
            return {"learner", "version"} <= set(ubjson.keys_of(file))
        except (ValueError, UnicodeDecodeError):
            return False


def _onnx(full: Path, head: bytes) -> bool:
    # A protobuf of ModelProto starts with its first field, ir_version, as ONNX's writers put it.
    if head[:1] != b"\x08" or full.stat().st_size > 2 << 30:
        return False
    if importlib.util.find_spec("onnx") is None:
        raise _Unknown("perhaps ONNX, which only the package onnx can tell: pip install onnx")
    import onnx

    try:
        model = onnx.load_model(str(full), load_external_data=False)
        return model.ir_version > 0 and len(model.graph.node) > 0 and bool(model.opset_import)
    except Exception:  # protobuf's own errors, by version
        return False


def _external(root: Path, path: str) -> set[str]:
    """Files beside an ONNX model that hold its weights, as it names them."""
    full = root / path
    with full.open("rb") as file:
        head = file.read(_HEAD)
    try:
        if not _onnx(full, head):
            return set()
    except _Unknown:
        return set()
    import onnx

    found = set()
    for tensor in onnx.load_model(str(full), load_external_data=False).graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                place = Path(path).parent / entry.value
                if Path(entry.value).is_absolute() or ".." in place.parts:
                    raise InvalidInputError(
                        f"{path} takes weights from {entry.value!r}, outside the model's folder; store them beside it"
                    )
                found.add(place.as_posix())
    return found


def _only_weights(full: Path) -> bool:
    """Whether nothing but numbers can be in a file that an ONNX model calls its weights."""
    if full.name == DESCRIPTION_NAME or full.suffix.lower() in _PICKLE_SUFFIXES:
        return False
    with full.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PK\x03\x04") or _pickle(full, head):
        return False
    text = _text(full)
    return text is None or not is_pickle(text.encode())


def _loader(mlmodel: Any) -> Any:
    """What MLflow loads a model with, by its ``MLmodel``; None where that does not say."""
    flavors = mlmodel.get("flavors") if isinstance(mlmodel, Mapping) else None
    function = flavors.get("python_function") if isinstance(flavors, Mapping) else None
    return function.get("loader_module") if isinstance(function, Mapping) else None


def _lightgbm(full: Path, head: bytes) -> bool:
    if not head.startswith(b"tree\nversion=v"):
        return False
    text = _text(full)
    return text is not None and "\nend of trees\n" in text


_READERS: Mapping[str, Callable[[Path, bytes], bool]] = {
    "safetensors": _safetensors,
    "xgboost-ubjson": _ubjson,
    "onnx": _onnx,
    "lightgbm-text": _lightgbm,
}


def _text(full: Path) -> str | None:
    if full.stat().st_size > _MOST_TEXT:
        return None
    try:
        text = full.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if any(ord(c) < 32 and c not in "\n\r\t\f" for c in text) else text


def _kind_of_text(full: Path, text: str) -> str:
    if full.name == DESCRIPTION_NAME:
        _yaml(full)
        return DESCRIPTION
    if full.suffix == ".py":
        try:
            ast.parse(text)
        except (SyntaxError, ValueError) as error:
            raise _Unknown("named as Python, but no Python source") from error
        return PYTHON
    if text.lstrip()[:1] in "{[":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return TEXT
        return "xgboost-json" if isinstance(value, dict) and {"learner", "version"} <= value.keys() else JSON
    return TEXT


def _yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path} is no YAML: {error}; save the model again") from error
