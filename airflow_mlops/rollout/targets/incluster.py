"""The Kubernetes API as a pod's own service account sees it; with nothing but Python's standard library.

For the watchdog, which has to work in a small image and when nothing of Airflow is left.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.rollout.targets.kube import Object

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT = 15.0


class InClusterClient:
    """See :class:`airflow_mlops.rollout.targets.kube.KubernetesClient`; each call is made once.

    :param server: URL of the API, that of the pod's cluster if blank
    :param account: folder with ``token``, ``ca.crt`` and ``namespace``; the token is read anew for each call, since
        Kubernetes changes it
    """

    def __init__(self, server: str = "", account: Path = ACCOUNT) -> None:
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not server and not host:
            raise InvalidInputError("this process runs in no pod: KUBERNETES_SERVICE_HOST is not set")
        self.server = (server or f"https://{f'[{host}]' if ':' in str(host) else host}:{port}").rstrip("/")
        self.account = account
        authority = account / "ca.crt"
        secure = self.server.startswith("https")
        self._ssl = ssl.create_default_context(cafile=str(authority)) if secure else None

    async def aget(self, resource: Any, name: str, *, namespace: str | None = None) -> Object | None:
        """The object, None if there is none."""
        return await self._call("GET", resource.path(self._inside(namespace), name), missing=None)

    async def alist(
        self, resource: Any, selector: str | Mapping[str, str] | None = None, *, namespace: str | None = None
    ) -> tuple[list[Object], str]:
        """The objects with these labels, and the version of the list."""
        text = selector or ""
        if isinstance(selector, Mapping):
            text = ",".join(f"{key}={value}" for key, value in selector.items())
        found = await self._call("GET", resource.path(self._inside(namespace)), query={"labelSelector": str(text)})
        return list(found.get("items") or ()), str(found["metadata"].get("resourceVersion") or "")

    async def acreate(self, resource: Any, body: Object, *, namespace: str | None = None) -> Object:
        """Create an object; unknown fields are refused."""
        path = resource.path(self._inside(namespace))
        return await self._call("POST", path, body, query={"fieldValidation": "Strict"})

    async def apatch(
        self,
        resource: Any,
        name: str,
        change: Object,
        *,
        resource_version: str | None = None,
        namespace: str | None = None,
    ) -> Object:
        """Lay a JSON merge patch over that version of an object."""
        if resource_version:
            metadata = {**change.get("metadata", {}), "resourceVersion": resource_version}
            change = {**change, "metadata": metadata}
        path = resource.path(self._inside(namespace), name)
        return await self._call("PATCH", path, change, query={"fieldValidation": "Strict"})

    async def adelete(self, resource: Any, name: str, *, namespace: str | None = None) -> bool:
        """Delete an object and what it owns; False if it is gone."""
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        path = resource.path(self._inside(namespace), name)
        return await self._call("DELETE", path, body, missing=None) is not None

    def _inside(self, namespace: str | None) -> str:
        return namespace or (self.account / "namespace").read_text().strip()

    async def _call(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        *,
        query: Mapping[str, str] | None = None,
        **or_else: Any,
    ) -> Any:
        return await asyncio.to_thread(self._send, method, path, body, query or {}, or_else)

    def _send(self, method: str, path: str, body: Any, query: Mapping[str, str], or_else: Mapping[str, Any]) -> Any:
        url = f"{self.server}{path}{'?' + urlencode(query) if query else ''}"
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        token = (self.account / "token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": kind, "Accept": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT, context=self._ssl) as reply:
                return json.loads(reply.read() or b"{}")
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", errors="replace")[:1000]
            if error.code == 404 and "missing" in or_else:
                return or_else["missing"]
            if error.code in (404, 409):
                raise ConcurrentChangeError(f"{method} {path}: {text}") from error
            if error.code in (401, 403, 408, 429) or error.code >= 500:
                # Rights and tokens may come back while it waits; it has nobody to tell.
                raise ExternalSystemError(f"{method} {path} (HTTP {error.code}): {text}") from error
            raise InvalidInputError(f"{method} {path} (HTTP {error.code}): {text}") from error
        except (OSError, ValueError) as error:
            raise ExternalSystemError(f"{method} {path}: {type(error).__name__}: {error}") from error
