"""A real Prometheus on the loopback address, and tiny exporters for it to scrape."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

BINARY = shutil.which("prometheus")
MISSING = "no prometheus binary here; Debian has it as the package prometheus"
INTERVAL = 0.4


class Exporter:
    """Answers ``/metrics`` with ``text``, which tests change, or with what it returns if it is called."""

    def __init__(self, text: str | Callable[[], str] = "") -> None:
        self.text = text
        exporter = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                text = exporter.text
                body = (text() if callable(text) else text).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def prometheus(folder: Path, targets: Sequence[tuple[str, Mapping[str, str]]]) -> Iterator[str]:
    """The URL of a Prometheus that scrapes ``targets``, addresses with the labels that their pods would give."""
    assert BINARY is not None
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "global": {"scrape_interval": f"{INTERVAL * 1000:.0f}ms", "scrape_timeout": f"{INTERVAL * 1000:.0f}ms"},
        "scrape_configs": [
            {
                "job_name": "pods",
                "honor_labels": True,
                "static_configs": [{"targets": [address], "labels": dict(labels)} for address, labels in targets],
            }
        ],
    }
    # JSON is YAML.
    (folder / "prometheus.yml").write_text(json.dumps(config))
    port = free_port()
    command = [
        BINARY,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(url, len(targets), process, folder / "log")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(url: str, targets: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    """Until every target has been scraped."""
    deadline = time.monotonic() + seconds
    while True:
        assert process.poll() is None, log.read_text()
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{url}/api/v1/query?query=sum(up)", timeout=2) as got,
        ):
            result = json.load(got)["data"]["result"]
            if result and float(result[0]["value"][1]) == targets:
                return
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def sections(path: Path) -> list[tuple[dict[str, str], str]]:
    """The targets recorded in a file: each begins with ``#! label=value ...``, the labels of its scrape."""
    found: list[tuple[dict[str, str], str]] = []
    for block in re.split(r"^#! ?", path.read_text(), flags=re.M)[1:]:
        head, _, text = block.partition("\n")
        found.append((dict(pair.split("=", 1) for pair in head.split()), text))
    return found
