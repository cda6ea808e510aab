"""An API server, live or standing in, as the contract suite talks to it: plain HTTP, labelled objects, cleaned up."""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import requests
from support.kube_api import KubeApi

LABEL = "airflow-mlops-test"
RAYJOBS = "/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
RAYCLUSTERS = "/apis/ray.io/v1/namespaces/{namespace}/rayclusters"
PODS = "/api/v1/namespaces/{namespace}/pods"
EVENTS = "/api/v1/namespaces/{namespace}/events"


class Cluster:
    """An API server as a plain HTTP client sees it, and what the contract needs to know about it.

    :param config: path of a kubeconfig
    :param api: the stand-in, None for a live cluster
    :param strict: whether objects are checked against the CRDs' schemas
    """

    def __init__(self, config: str, api: KubeApi | None, strict: bool) -> None:
        from kubernetes import config as kubernetes_config

        client = kubernetes_config.new_client_from_config(config)
        settings = client.configuration
        self.api, self.strict, self.live = api, strict, api is None
        self.session = requests.Session()
        self.session.verify = (settings.ssl_ca_cert or True) if settings.verify_ssl else False
        if settings.cert_file:
            self.session.cert = (settings.cert_file, settings.key_file)
        for setting in settings.auth_settings().values():
            self.session.headers[setting["key"]] = setting["value"]
        self.session.headers["User-Agent"] = "contract/1"
        self.url = settings.host.rstrip("/")
        _, active = kubernetes_config.list_kube_config_contexts(config)
        self.namespace = active["context"].get("namespace", "default")
        self.mark = uuid.uuid4().hex[:8]
        self.selector = f"{LABEL}={self.mark}"
        self.patience = 600.0 if self.live else 20.0

    def path(self, template: str, name: str = "") -> str:
        return template.format(namespace=self.namespace) + (f"/{name}" if name else "")

    def call(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None, **query: Any
    ) -> requests.Response:
        """One request; ``body`` is sent as JSON unless the headers say otherwise."""
        sent = {"Content-Type": "application/json", **(headers or {})}
        data = None if body is None else json.dumps(body)
        return self.session.request(method, self.url + path, params=query, data=data, headers=sent, timeout=60)

    def patch(self, path: str, body: Any, kind: str = "merge-patch+json", **query: Any) -> requests.Response:
        return self.call("PATCH", path, body, headers={"Content-Type": f"application/{kind}"}, **query)

    def watch(
        self, path: str, *, headers: Mapping[str, str] | None = None, **query: Any
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Events of a watch until it ends: type, object."""
        answer = self.session.get(
            self.url + path, params={"watch": "true", **query}, headers=headers, stream=True, timeout=(10, 120)
        )
        with answer:
            assert answer.status_code == 200, answer.text
            for line in answer.iter_lines():
                event = json.loads(line)
                yield event["type"], event["object"]

    def name(self, text: str) -> str:
        return f"{text}-{self.mark}"

    def rayjob(self, name: str, *, managed: bool = False, entrypoint: str = "true", **spec: Any) -> dict[str, Any]:
        """A RayJob with a head and a worker; unless ``managed``, no controller touches it."""

        def pod(role: str) -> dict[str, Any]:
            resources = {"requests": {"cpu": "200m", "memory": "1Gi"}, "limits": {"memory": "4Gi"}}
            container = {"name": role, "image": self.image(), "imagePullPolicy": "IfNotPresent", "resources": resources}
            return {"metadata": {"labels": {LABEL: self.mark}}, "spec": {"containers": [container]}}

        worker = {"groupName": "w", "replicas": 1, "minReplicas": 1, "maxReplicas": 1, "rayStartParams": {}}
        cluster = {
            "rayVersion": self.ray_version(),
            "headGroupSpec": {"rayStartParams": {}, "template": pod("ray-head")},
            "workerGroupSpecs": [{**worker, "template": pod("ray-worker")}],
        }
        controller = "ray.io/kuberay-operator" if managed else "kueue.x-k8s.io/multikueue"
        base = {"managedBy": controller, "entrypoint": entrypoint, "shutdownAfterJobFinishes": True}
        return {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {"name": self.name(name), "labels": {LABEL: self.mark}},
            "spec": {**base, "ttlSecondsAfterFinished": 5, "rayClusterSpec": cluster, **spec},
        }

    def image(self) -> str:
        """``KUBE_RAY_IMAGE``, else a Ray image that a node has, else the official one."""
        if not hasattr(self, "_image"):
            self._image = os.environ.get("KUBE_RAY_IMAGE") or self._image_on_a_node() or "rayproject/ray:2.60.0"
        return self._image

    def _image_on_a_node(self) -> str:
        if not self.live:
            return ""
        answer = self.call("GET", "/api/v1/nodes")
        names = [
            name
            for node in (answer.json()["items"] if answer.ok else ())
            for image in node["status"].get("images") or ()
            for name in image.get("names") or ()
        ]
        return next((name for name in sorted(names) if re.search(r"(^|/)ray(-\w+)?:2\.\d+", name)), "")

    def ray_version(self) -> str:
        found = re.search(r":(\d+\.\d+\.\d+)", self.image())
        return found[1] if found else "2.60.0"

    def create(self, body: Mapping[str, Any]) -> dict[str, Any]:
        answer = self.call("POST", self.path(RAYJOBS), body, fieldValidation="Strict")
        assert answer.status_code == 201, answer.text
        return answer.json()

    def pods(self, selector: str) -> list[dict[str, Any]]:
        return self.call("GET", self.path(PODS), labelSelector=selector).json()["items"]

    def until(self, condition: Callable[[], Any], what: str, seconds: float | None = None) -> Any:
        """What ``condition`` returns once it is true."""
        end = time.monotonic() + (seconds or self.patience)
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(1.0 if self.live else 0.01)
        raise AssertionError(f"not within {seconds or self.patience} s: {what}")

    def clean(self) -> None:
        """Delete everything that carries this test's label and wait until its pods are gone."""
        for template in (RAYJOBS, RAYCLUSTERS, PODS):
            self.call("DELETE", self.path(template), labelSelector=self.selector)
        for item in self.call("GET", self.path(RAYJOBS), labelSelector=self.selector).json()["items"]:
            if item["spec"].get("managedBy") == "kueue.x-k8s.io/multikueue" and item["metadata"].get("finalizers"):
                self.patch(self.path(RAYJOBS, item["metadata"]["name"]), {"metadata": {"finalizers": None}})
        self.until(
            lambda: (
                not self.call("GET", self.path(RAYJOBS), labelSelector=self.selector).json()["items"]
                and not self.pods(self.selector)
            ),
            "everything that the test made is gone",
            180,
        )
