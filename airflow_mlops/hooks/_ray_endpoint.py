"""Where a Ray cluster answers: at its dashboard, or behind the proxy of a Kubernetes API server."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow_mlops.exceptions import InvalidInputError

if TYPE_CHECKING:
    import ssl

    from airflow.sdk import Connection

DASHBOARD_PORT = 8265

_SERVICE = re.compile(r"^(?P<namespace>[a-z0-9-]+)/(?P<service>(https?:)?[a-z0-9-]+)(:(?P<port>[a-z0-9-]+))?$")


@dataclass(frozen=True)
class Endpoint:
    """Where a Ray cluster answers, and how to be let in.

    :param address: of the dashboard, ``http://host:port``, with a path where a proxy stands before it
    :param token: of the cluster's token authentication, None without
    :param verify: whether, or with which CA file, to check the server's certificate
    :param serve_url: of Serve's HTTP proxy
    :param proxied: whether a Kubernetes API server stands before Ray, which takes ``Authorization`` for itself
    :param gate: that server's ``Authorization``, None where it knows us by a certificate
    :param certificate: files of a client certificate and its key for that server
    """

    address: str
    token: str | None = field(repr=False)
    verify: bool | str
    serve_url: str
    proxied: bool = False
    gate: str | None = field(default=None, repr=False)
    certificate: tuple[str, str] | None = None

    @property
    def on_this_machine(self) -> bool:
        """Whether the cluster runs where this does."""
        return not self.proxied and urlsplit(self.address).hostname in ("127.0.0.1", "localhost", "::1")

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request; the second one passes proxies that take ``Authorization`` for themselves."""
        own = f"Bearer {self.token}" if self.token else None
        given = {"Authorization": self.gate if self.proxied else own, "X-Ray-Authorization": own}
        return {name: value for name, value in given.items() if value}

    @property
    def ssl(self) -> bool | ssl.SSLContext:
        """``verify`` and ``certificate`` in the form that aiohttp takes."""
        if isinstance(self.verify, str) or self.certificate:
            files = (self.verify, *(self.certificate or ()))
            return _ssl_context(self.verify, self.certificate, tuple(map(_written, files)))
        return self.verify


def _written(path: bool | str) -> int | None:
    try:
        return os.stat(path).st_mtime_ns if isinstance(path, str) else None
    except OSError:  # who loads it will say so
        return None


@functools.lru_cache(maxsize=64)
def _ssl_context(
    verify: bool | str, certificate: tuple[str, str] | None, written: tuple[int | None, ...]
) -> ssl.SSLContext:
    """The context of these files as they were ``written``: certificates are rotated in place."""
    import ssl

    context = ssl.create_default_context(cafile=verify if isinstance(verify, str) else None)
    if verify is False:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificate:
        context.load_cert_chain(*certificate)
    return context


def endpoint_of(connection: Connection) -> Endpoint:
    """The endpoint that a ``ray`` connection describes: an address as it is given, or a host name and the usual port.

    :raises InvalidInputError: its host is missing, or not one that HTTP reaches
    """
    host = (connection.host or "").strip()
    extra = connection.extra_dejson
    if extra.get("proxy_service"):
        return _behind_api_server(connection, str(extra["proxy_service"]).strip())
    fix = "give the Ray dashboard's address, for example http://127.0.0.1:8265"
    if not host:
        raise InvalidInputError(f"connection {connection.conn_id!r} has no host; {fix}")
    named = "://" not in host
    url = urlsplit(f"{connection.schema or 'http'}://{host}" if named else host)
    try:
        port = url.port or connection.port or (DASHBOARD_PORT if named else None)
    except ValueError:
        port = 0
    if not url.hostname or url.scheme not in ("http", "https") or port == 0:
        raise InvalidInputError(
            f"the host of connection {connection.conn_id!r} is {connection.host!r}, expected http://host:port; {fix}"
        )
    name = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return Endpoint(
        f"{url.scheme}://{name}{f':{port}' if port else ''}{url.path.rstrip('/')}",
        connection.password or None,
        _verify(extra.get("verify")),
        extra.get("serve_url") or f"http://{name}:8000",
    )


def local_endpoint(name: str, address: str) -> Endpoint:
    """The endpoint of a given address, with the token that the environment holds."""
    from airflow.sdk import Connection

    token = os.environ.get("RAY_AUTH_TOKEN")
    return endpoint_of(Connection(conn_id=name, conn_type="ray", host=address, password=token))


def _behind_api_server(connection: Connection, proxy_service: str) -> Endpoint:
    """Ray as a service that a Kubernetes API server passes requests to: reached from outside without any ingress."""
    from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook

    named = _SERVICE.match(proxy_service)
    if named is None:
        raise InvalidInputError(
            f"extra proxy_service of connection {connection.conn_id!r} is {proxy_service!r}; expected "
            "namespace/service or namespace/service:port, for example training/raycluster-head-svc:8265"
        )
    extra = connection.extra_dejson
    conn_id = extra.get("kubernetes_conn_id") or KubernetesHook.default_conn_name
    try:
        configuration = KubernetesHook(conn_id=conn_id).get_conn().configuration
    except Exception as error:
        raise InvalidInputError(
            f"the Kubernetes connection {conn_id!r}, which connection {connection.conn_id!r} names for its proxy, does "
            f"not work: {error}. Set extra kubernetes_conn_id to one of type kubernetes that does."
        ) from error
    # The names under which the client's versions file the bearer token differ; the header does not.
    settings = configuration.auth_settings().values()
    gates = [entry["value"] for entry in settings if str(entry.get("key")).lower() == "authorization"]
    files = (configuration.cert_file, configuration.key_file)
    services = f"{configuration.host.rstrip('/')}/api/v1/namespaces/{named['namespace']}/services/{named['service']}"
    return Endpoint(
        f"{services}:{named['port'] or DASHBOARD_PORT}/proxy",
        connection.password or None,
        (configuration.ssl_ca_cert or True) if configuration.verify_ssl else False,
        extra.get("serve_url") or f"{services}:8000/proxy",
        proxied=True,
        gate=gates[0] if gates else None,
        certificate=files if all(files) else None,
    )


def _verify(value: Any) -> bool | str:
    # The connection form gives text, and an empty one must not switch the check off.
    text = "" if value is None else str(value).strip()
    return {"": True, "true": True, "false": False}.get(text.lower(), text)
