"""The stand-in API server for tests of what talks to Kubernetes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.crd import CrdSchemas, crd_dir
from support.kube_api import KubeApi


@pytest.fixture(scope="session")
def crds() -> CrdSchemas | None:
    """The CRDs' schemas, None on a machine without them."""
    folder = crd_dir()
    return CrdSchemas(folder) if folder else None


@pytest.fixture
def kube_api(crds) -> Iterator[KubeApi]:
    """A started stand-in API server, empty."""
    with KubeApi(crds) as api:
        yield api


@pytest.fixture
def kubeconfig(kube_api, tmp_path) -> Path:
    """The path of a kubeconfig for :func:`kube_api`."""
    return kube_api.kubeconfig(tmp_path / "kubeconfig")
