"""One digest of a model's folder: the same wherever it lies, another as soon as a byte, a name or a file differs."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from airflow_mlops.exceptions import InvalidInputError

PREFIX = "sha256:"


@dataclass(frozen=True, order=True)
class FileDigest:
    """One file of a model.

    :param path: relative to the folder, with ``/`` between its parts
    :param sha256: of its content, 64 hexadecimal digits
    """

    path: str
    sha256: str


def files_of(folder: str | Path) -> list[str]:
    """The files below ``folder`` as relative paths, sorted.

    :raises InvalidInputError: there is no folder, it is empty, or it holds a link, a device, a pipe or a name that a
        list of files cannot tell from two others
    """
    root = Path(folder)
    if not root.is_dir() or root.is_symlink():
        raise InvalidInputError(f"there is no model folder {folder}; give the folder that save_model wrote")
    found = sorted(_walk(str(root), ""))
    if not found:
        raise InvalidInputError(f"the model folder {folder} is empty; was the upload cut off?")
    return found


def _walk(folder: str, prefix: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            if "\n" in entry.name or "\\" in entry.name or not entry.name.isprintable():
                raise InvalidInputError(f"the model holds a file with the name {path!r}; rename it and save it again")
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                yield from _walk(entry.path, path + "/")
            elif stat.S_ISREG(mode):
                yield path
            else:
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
                raise InvalidInputError(
                    f"{path} of the model in {folder} is {kind}, which may lead out of it; store the file itself"
                )


def file_digests(folder: str | Path) -> tuple[FileDigest, ...]:
    """The SHA-256 of every file below ``folder``, in the order of their paths; several files are read at once.

    :raises InvalidInputError: as of :func:`files_of`
    """
    root, paths = Path(folder), files_of(folder)

    def digest(path: str) -> FileDigest:
        with (root / path).open("rb") as file:
            return FileDigest(path, hashlib.file_digest(file, "sha256").hexdigest())

    with ThreadPoolExecutor(max_workers=min(len(paths), os.cpu_count() or 1)) as pool:
        return tuple(pool.map(digest, paths))


def digest_of(files: tuple[FileDigest, ...]) -> str:
    """One digest of all of them, ``sha256:`` and 64 hexadecimal digits, whatever their order.

    It is the SHA-256 of what ``sha256sum`` prints for them, sorted by path, so that it can be checked by hand.
    """
    lines = "".join(f"{file.sha256}  {file.path}\n" for file in sorted(files))
    return PREFIX + hashlib.sha256(lines.encode()).hexdigest()


def model_digest(folder: str | Path) -> str:
    """:func:`digest_of` the files below ``folder``."""
    return digest_of(file_digests(folder))


def check_digest(folder: str | Path, expected: str, what: str) -> None:
    """Refuse a folder that does not have the ``expected`` digest.

    :param what: the model in words, for the message
    :raises InvalidInputError: another digest
    """
    found = model_digest(folder)
    if found != expected:
        raise InvalidInputError(
            f"{what} has the digest {found} at {folder}, but {expected} was recorded when it was registered: its files "
            "were changed, added or removed since. Do not use it; register the model again from its training."
        )
