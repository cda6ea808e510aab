"""What scanners say of a pickle: evidence for the record, never the reason to trust one.

``fickling`` reads what a pickle would do, ``modelscan`` looks for calls known to be bad. Both miss most ways to run
code, so a pickle that they pass is still loaded in a sandbox only; one that they, or its own imports, convict is not
loaded at all.
"""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.model_files.formats import inspect
from airflow_mlops.model_files.opcodes import globals_of, is_pickle
from airflow_mlops.provenance.sandbox import Limits, Sandbox

#: Packages whose classes a model is made of. Nothing else may be looked up, whatever the scanners say of it.
PACKAGES = frozenset(
    {
        *("sklearn", "numpy", "scipy", "pandas", "xgboost", "lightgbm", "catboost", "torch", "imblearn"),
        *("category_encoders", "collections", "datetime", "decimal", "fractions", "copyreg", "joblib", "pathlib"),
        *("cloudpickle", "mlflow", "skops", "statsmodels", "_codecs"),
    }
)
_PLAIN = frozenset(
    {"bool", "int", "float", "complex", "str", "bytes", "bytearray", "list", "tuple", "set", "frozenset", "dict"}
    | {"slice", "range", "object", "type"}
)
#: Functions of those packages with which known pickles run code.
_GADGETS = (
    *("numpy.testing", "numpy.f2py", "numpy.distutils", "numpy.load", "numpy.lib.npyio", "numpy.runtests"),
    *("numpy.ctypeslib", "numpy.memmap", "pandas.read_pickle", "pandas.io", "pandas.eval", "pandas.core.computation"),
    *("torch.load", "torch.serialization", "torch.hub", "torch.utils", "torch.jit", "torch.distributed", "torch._C"),
    *("torch.fx", "torch._dynamo", "torch._inductor", "torch.multiprocessing", "torch.package", "torch.ops"),
    *("torch.classes", "torch._ops", "torch.storage._load_from_bytes", "torch.cuda", "torch.testing"),
    *("joblib.load", "joblib.numpy_pickle.load", "joblib.parallel", "joblib.externals", "joblib.memory"),
    *("cloudpickle.load", "cloudpickle.cloudpickle.subimport", "cloudpickle.cloudpickle._builtin_type"),
    *("mlflow.pyfunc", "mlflow.utils", "mlflow.projects", "mlflow.cli", "mlflow.models", "mlflow.artifacts"),
    *("skops.io", "scipy.io", "scipy._lib", "sklearn.utils._testing", "sklearn.externals", "sklearn.datasets"),
    *("collections.sys", "datetime.sys", "fractions.sys", "decimal.sys", "pathlib.os", "pathlib.io"),
    *("copyreg.pickle", "copyreg.add_extension", "lightgbm.libpath", "xgboost.libpath"),
)
_MOST_NESTED = 4


@dataclass(frozen=True)
class Finding:
    """What one scanner says of one place.

    :param path: the file, and ``!`` before the member of an archive
    :param scanner: ``imports`` (this module's own list), ``fickling`` or ``modelscan``
    :param severity: the scanner's own word
    :param message: what was found
    :param convicts: whether the model is refused for it
    """

    path: str
    scanner: str
    severity: str
    message: str
    convicts: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.message} ({self.scanner}, {self.severity})"


def scan(folder: str | Path, *, limits: Limits | None = None, require: tuple[str, ...] | None = None) -> list[Finding]:
    """What the scanners find in the model's pickles. They run in a sandbox, as they read what others wrote.

    :param limits: of the sandbox
    :param require: of the sandbox; None for all that it can keep away
    :raises InvalidInputError: a scanner is not installed or fails, or the sandbox cannot be had
    """
    options: dict[str, Any] = {} if require is None else {"require": require}
    with Sandbox([folder], limits, **options) as box:
        found = box.run("airflow_mlops.provenance.pickles:scan_here", {"model": str(Path(folder).resolve())})
    return [Finding(**item) for item in found]


def refuse_convicted(findings: list[Finding], where: str) -> None:
    """Refuse a model of which a finding says that it runs code.

    :raises InvalidInputError: names file, place and call
    """
    convicted = [str(finding) for finding in findings if finding.convicts]
    if convicted:
        raise InvalidInputError(
            f"the model in {where} holds a pickle that would run code: {'; '.join(convicted[:3])}. It was not loaded. "
            "Find out who wrote it; store the model in a format that is only data."
        )


def scan_here(job: Mapping[str, Any]) -> list[dict[str, Any]]:
    """:func:`scan` of the folder ``job["model"]`` in this process."""
    root = Path(job["model"])
    found: list[Finding] = []
    for file in inspect(root):
        if file.pickled:
            found += _imports(root, file.path) + _fickling(root, file.path) + _modelscan(root, file.path)
    return [asdict(finding) for finding in found]


def _imports(root: Path, path: str) -> list[Finding]:
    found = []
    for place, content in _streams(path, (root / path).read_bytes()):
        try:
            names = globals_of(content)
        except Exception as error:  # pickletools raises whatever a damaged pickle makes it
            found.append(Finding(place, "imports", "unreadable", f"a pickle that cannot be read: {error}", True))
            continue
        if bad := [name for name in names if not _allowed(name)]:
            message = f"it looks up {', '.join(bad[:5])}"
            found.append(Finding(place, "imports", "not allowed", message, True))
    return found


def _allowed(name: str) -> bool:
    package, _, rest = name.partition(".")
    if package in ("builtins", "__builtin__"):
        return rest in _PLAIN
    if any(name == gadget or name.startswith(gadget + ".") for gadget in _GADGETS):
        return False
    return package in PACKAGES and not any(part.startswith("__") for part in name.split("."))


def _fickling(root: Path, path: str) -> list[Finding]:
    try:
        from fickling.analysis import Severity, check_safety
        from fickling.fickle import StackedPickle
    except ImportError as error:
        raise InvalidInputError(f"checking pickles needs: pip install 'airflow-mlops[pickle]' ({error})") from error
    found = []
    for place, content in _streams(path, (root / path).read_bytes()):
        try:
            pickles = list(StackedPickle.load(io.BytesIO(content)))
            results = [check_safety(pickled) for pickled in pickles]
        except Exception as error:  # its own, and those of the parser below it
            found.append(Finding(place, "fickling", "unreadable", f"{type(error).__name__}: {error}"[:300], False))
            continue
        for result in results:
            # It calls every import beside the standard library's unsafe, so only its gravest words convict.
            convicts = result.severity >= Severity.LIKELY_OVERTLY_MALICIOUS
            worst = max(result.results, key=lambda item: item.severity, default=None)
            message = str(worst.message)[:300] if worst else "nothing found"
            found.append(Finding(place, "fickling", result.severity.name, message, convicts))
    return found


def _modelscan(root: Path, path: str) -> list[Finding]:
    try:
        from modelscan.modelscan import ModelScan
    except ImportError as error:
        raise InvalidInputError(f"checking pickles needs: pip install 'airflow-mlops[pickle]' ({error})") from error
    scanner = ModelScan()
    with contextlib.redirect_stdout(io.StringIO()):
        report = scanner.scan(str(root / path))
    found = [
        Finding(path, "modelscan", issue["severity"], str(issue["description"])[:300], issue["severity"] != "LOW")
        for issue in report["issues"]
    ]
    for failure in report["errors"]:
        found.append(Finding(path, "modelscan", "error", str(failure.get("description", failure))[:300], False))
    if not found:
        scanned = report["summary"]["scanned"]["total_scanned"]
        found.append(Finding(path, "modelscan", "none", "nothing found" if scanned else "not scanned", False))
    return found


def _streams(place: str, content: bytes, depth: int = 0) -> Iterator[tuple[str, bytes]]:
    """The pickles in a file, and in the archives and compressed files in it, each with its place."""
    if depth > _MOST_NESTED:
        yield place, b""
    elif content.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.infolist():
                yield from _streams(f"{place}!{member.filename}", archive.read(member), depth + 1)
    elif content.startswith(b"\x93NUMPY"):
        yield from _after_array_header(place, content)
    elif (unpacked := _unpacked(content)) is not None:
        yield from _streams(f"{place}!", unpacked, depth + 1)
    elif is_pickle(content):
        yield place, content


def _after_array_header(place: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    from airflow_mlops.model_files.archives import holds_objects

    if holds_objects(content):
        size = int.from_bytes(content[8:10], "little") + 10
        if content[6] >= 2:
            size = int.from_bytes(content[8:12], "little") + 12
        yield place, content[size:]


def _unpacked(content: bytes) -> bytes | None:
    import bz2
    import gzip
    import lzma
    import zlib

    openers: dict[bytes, Callable[[bytes], bytes]] = {
        b"\x1f\x8b": gzip.decompress,
        b"BZh": bz2.decompress,
        b"\xfd7zXZ": lzma.decompress,
    }
    openers |= {b"\x5d\x00": lzma.decompress, b"x": zlib.decompress}
    for magic, unpack in openers.items():
        if content.startswith(magic):
            try:
                return unpack(content)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
                return None
    return None
