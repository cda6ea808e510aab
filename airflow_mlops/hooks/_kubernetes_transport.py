"""Sends :class:`~airflow_mlops.hooks._kubernetes.Call` through the official clients' connections.

Only their configuration, credentials and connection pools are used: what those offer did not change from kubernetes
36 to 37, and no model classes stand between us and the JSON.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.hooks._kubernetes import Answer, Call, Unanswered

if TYPE_CHECKING:
    from aiohttp import ClientResponse
    from kubernetes.client import ApiClient
    from kubernetes_asyncio.client import ApiClient as AsyncApiClient
    from urllib3 import BaseHTTPResponse

CONNECT, READ = 10.0, 30.0


def send(client: ApiClient, call: Call) -> Answer:
    """One request and its answer.

    :raises Unanswered: there is none, or half of one
    :raises InvalidInputError: the server's certificate is not trusted
    """
    with stream(client, call, READ) as reply:
        body = b"".join(reply.stream())
    return Answer(reply.status, body.decode("utf-8", errors="replace"), reply.headers.get("Retry-After"))


async def asend(client: AsyncApiClient, call: Call) -> Answer:
    """Like :func:`send`, for an event loop."""
    async with astream(client, call, READ) as reply:
        body = await reply.read()
    return Answer(reply.status, body.decode("utf-8", errors="replace"), reply.headers.get("Retry-After"))


@contextmanager
def stream(client: ApiClient, call: Call, silence: float) -> Iterator[BaseHTTPResponse]:
    """One request whose answer is read inside; what breaks there is :class:`Unanswered`, too.

    :param silence: seconds without a byte after which the connection is given up
    """
    import urllib3

    settings = client.configuration.auth_settings()
    url = f"{client.configuration.host}{call.path}"
    reply = None
    try:
        reply = client.rest_client.pool_manager.request(
            call.method,
            f"{url}?{urlencode(call.query)}" if call.query else url,
            body=_body(call),
            headers=_headers(client.default_headers, settings, call),
            timeout=urllib3.Timeout(connect=CONNECT, read=silence),
            preload_content=False,
            redirect=False,
            retries=False,
        )
        yield reply
    except urllib3.exceptions.SSLError as error:
        raise _distrust(url, error) from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise _unanswered(call, url, error) from error
    finally:
        if reply is not None:
            if not reply.closed:
                # It was left early and has more to come: of no use to the next request.
                reply.close()
            reply.release_conn()


@asynccontextmanager
async def astream(client: AsyncApiClient, call: Call, silence: float) -> AsyncIterator[ClientResponse]:
    """Like :func:`stream`, for an event loop."""
    import aiohttp

    settings: Any = client.configuration.auth_settings()
    if inspect.isawaitable(settings):
        settings = await settings
    rest, url = client.rest_client, f"{client.configuration.host}{call.path}"
    options: dict[str, Any] = {}
    if rest.proxy:
        options.update(proxy=rest.proxy, proxy_headers=rest.proxy_headers)
    if rest.server_hostname:
        options["server_hostname"] = rest.server_hostname
    try:
        async with rest.pool_manager.request(
            call.method,
            f"{url}?{urlencode(call.query)}" if call.query else url,
            data=_body(call),
            headers=_headers(client.default_headers, settings, call),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=silence),
            allow_redirects=False,
            **options,
        ) as reply:
            yield reply
    except aiohttp.ClientConnectorCertificateError as error:
        raise _distrust(url, error) from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise _unanswered(call, url, error) from error
    except (RuntimeError, AssertionError) as error:
        # So aiohttp says that somebody has closed the shared connection meanwhile.
        if not rest.pool_manager.closed:
            raise
        raise _unanswered(call, url, error) from error


def _body(call: Call) -> bytes | None:
    return None if call.body is None else json.dumps(call.body).encode()


def _headers(usual: dict[str, str], settings: dict[str, Any], call: Call) -> dict[str, str]:
    headers = {**usual, "Accept": call.accept}
    if call.body is not None:
        headers["Content-Type"] = call.content_type
    for setting in settings.values():
        if setting.get("in") == "header" and setting.get("value"):
            headers[setting["key"]] = setting["value"]
    return headers


def _unanswered(call: Call, url: str, error: BaseException) -> Unanswered:
    reason = str(error) or "no answer in time"
    return Unanswered(
        f"the Kubernetes API at {url} does not answer a request to {call.doing} ({type(error).__name__}: {reason}); "
        "check that the cluster runs and that the connection leads to it"
    )


def _distrust(url: str, error: BaseException) -> InvalidInputError:
    return InvalidInputError(
        f"the certificate of the Kubernetes API at {url} is not trusted ({error}); give its CA in the kubeconfig "
        "(certificate-authority), or set disable_verify_ssl in the connection for a test cluster"
    )
