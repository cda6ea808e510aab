"""The environment that a process runs in: Python, installed distributions, container image, git revision."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from typing import Any

#: Told by whoever builds or starts an image, for nothing inside one knows it.
IMAGE, IMAGE_DIGEST, REVISION = "MLOPS_IMAGE", "MLOPS_IMAGE_DIGEST", "MLOPS_GIT_REVISION"


def describe(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """This process's environment; what cannot be known is None.

    The image's digest is ``MLOPS_IMAGE_DIGEST``, else that of a reference ``name@sha256:...`` in ``MLOPS_IMAGE``;
    ``"none"`` where the process is in no container.

    :return: ``python``, ``platform``, ``image``, ``image_digest``, ``revision`` (``MLOPS_GIT_REVISION``), ``lock``
        (``sha256`` of the sorted ``name==version`` lines, ``packages``)
    """
    image = environ.get(IMAGE) or None
    named = re.search(r"sha256:[0-9a-f]{64}$", environ.get(IMAGE_DIGEST) or image or "")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "image": image,
        "image_digest": named[0] if named else None if _contained(environ) else "none",
        "revision": environ.get(REVISION) or None,
        "lock": lock(packages()),
    }


@functools.cache
def packages() -> tuple[str, ...]:
    """Every installed distribution as ``name==version``, names normalized as in PEP 503, sorted."""
    # Of two on the path the first is imported.
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return tuple(f"{name}=={version}" for name, version in sorted(found.items()))


def lock(lines: tuple[str, ...]) -> dict[str, Any]:
    """The lines with their hash, by which two environments are told apart."""
    return {"sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(), "packages": list(lines)}


def _contained(environ: Mapping[str, str]) -> bool:
    """Whether this is a container, as far as Docker, Podman and Kubernetes mark it."""
    return "KUBERNETES_SERVICE_HOST" in environ or any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv")))
