"""The API servers for tests of what talks to Kubernetes: a stand-in, and with ``make test-k8s`` a live cluster too."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.crd import CrdSchemas, crd_dir
from support.kube_api import KubeApi
from support.kube_cluster import Cluster
from support.kube_sim import RayJobSimulator, Stop


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


#: Set by ``make test-k8s``: a KUBECONFIG that merely happens to be set is never written to.
LIVE = os.environ.get("TEST_LIVE_CLUSTER") == "1"


@pytest.fixture(params=["stand-in", *([pytest.param("live", marks=pytest.mark.live)] if LIVE else [])])
def cluster(request, crds, tmp_path) -> Iterator[Cluster]:
    """The API server that the contract is tested against."""
    if request.param == "live":
        live = Cluster(os.environ["KUBECONFIG"], None, strict=True)
        try:
            yield live
        finally:
            live.clean()
        return
    with KubeApi(crds) as api:
        yield Cluster(str(api.kubeconfig(tmp_path / "kubeconfig")), api, strict=crds is not None)


@pytest.fixture
def kuberay(cluster) -> Iterator[Cluster]:
    """:func:`cluster` with a KubeRay that acts on its RayJobs."""
    if cluster.live:
        yield cluster
        return

    def run(rayjob: Mapping[str, Any], stop: Stop) -> int:
        entrypoint = rayjob["spec"]["entrypoint"]
        if "sleep" in entrypoint:
            stop.wait(30)
        if "echo" in entrypoint:
            stop.log(entrypoint.split("echo ")[1].split(";")[0])
        return 1 if "exit 1" in entrypoint else 0

    with contextlib.ExitStack() as stack:
        stack.enter_context(RayJobSimulator(cluster.api, scale=0.01, script=run))
        yield cluster
