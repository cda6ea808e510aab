"""What a signature costs beside reading and hashing the model once, which nobody can do without."""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_GIB, _BLOCK, _REPEATS = 1 << 30, 1 << 20, 3


def _write(folder: Path, files: int) -> None:
    """One GiB in so many files, no two blocks of it equal."""
    noise = os.urandom(_BLOCK - 8)
    for number in range(files):
        with (folder / f"weights-{number}.bin").open("wb") as file:
            for block in range(_GIB // _BLOCK // files):
                file.write((number << 32 | block).to_bytes(8, "little") + noise)


def _hash_once(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _rows(files: int) -> list[dict[str, object]]:
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec

    from airflow_mlops.provenance.signing import SigningKeys, Subject, sign, verify

    key = ec.generate_private_key(ec.SECP256R1())
    text = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()).decode()
    keys, subject = SigningKeys(private_key=text), Subject("bench", "run")
    folder = Path(tempfile.mkdtemp(prefix="bench-signing-"))
    try:
        _write(folder, files)
        _hash_once(folder)  # all three find the files in the page cache, and the libraries loaded
        content = sign(folder, subject, keys).content
        calls = {
            "hash": lambda: _hash_once(folder),
            "sign": lambda: sign(folder, subject, keys),
            "verify": lambda: verify(folder, content, subject, keys),
        }
        # In turns, so that a machine that slows down slows all three.
        taken = [{name: _seconds(call) for name, call in calls.items()} for _ in range(_REPEATS)]
    finally:
        shutil.rmtree(folder)
    middle = {name: statistics.median(turn[name] for turn in taken) for name in calls}
    return [
        {
            "what": f"{name} a model of 1 GiB in {files} file{'s' if files > 1 else ''}, s",
            "ours": round(middle[name], 3),
            "otherwise": round(middle["hash"], 3),
            "ratio": round(middle[name] / middle["hash"], 3),
            "against": "SHA-256 of the same files once, one after the other",
            "goal": "at most 1.5 times",
            "met": middle[name] <= 1.5 * middle["hash"],
        }
        for name in ("sign", "verify")
    ]


def measure() -> list[dict[str, object]]:
    """Wall seconds, median of three turns, files in the page cache."""
    return [*_rows(1), *_rows(8)]
