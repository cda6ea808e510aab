"""Kinds of Kubernetes objects and where an API server serves them."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote


@dataclass(frozen=True)
class Resource:
    """A kind of namespaced object: ``Resource("ray.io", "v1", "rayjobs", "RayJob")``; group "" is the core's."""

    group: str
    version: str
    plural: str
    kind: str

    @property
    def api_version(self) -> str:
        """As it stands in a manifest."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def api_path(self) -> str:
        """Where the API of its group is served."""
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"

    def path(self, namespace: str, name: str | None = None, subresource: str | None = None) -> str:
        """URL path of the collection, of one object, or of a subresource."""
        parts = [self.plural, name, subresource]
        return f"{self.api_path}/namespaces/{quote(namespace)}/" + "/".join(quote(part) for part in parts if part)
