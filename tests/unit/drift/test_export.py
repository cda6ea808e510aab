"""Metrics of a check: read back by Prometheus' own parser, from a file and from what a gateway was sent."""

from __future__ import annotations

import base64
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prometheus_client import exposition
from prometheus_client.parser import text_string_to_metric_families

from airflow_mlops.drift import export
from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError

REPORT = {
    "verdict": "drift",
    "retrain": True,
    "model": {"name": 'late "flights"', "version": "3", "alias": "champion"},
    "window": {"start": "2013-04-01T00:00:00+00:00", "end": "2013-05-01T00:00:00+00:00"},
    "drift": {
        "rows": {"reference": 9000, "current": 4000},
        "columns": [
            {"name": "temp", "status": "drift", "effect": 0.8, "distance": 0.81},
            {"name": "wind", "status": "stable", "effect": None, "distance": 0.02},
            {"name": "gone", "status": "broken", "effect": None, "distance": None},
        ],
    },
    "harm": {
        "tests": [{"name": "log_loss", "reference": 0.5, "current": 0.6, "tolerance": 0.02, "harmful": True}],
    },
    "hysteresis": {"score": 8.0, "armed": False, "reason": "cool-down", "granted": 2},
}


def read(text):
    """Value by metric and labels, the model's label checked and left out."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model") == 'late "flights"'
            found[(sample.name.removeprefix("mlops_drift_"), *labels.values())] = sample.value
    return found


EXPECTED = {
    ("verdict", "harm"): 0,
    ("verdict", "drift"): 1,
    ("verdict", "stable"): 0,
    ("verdict", "not_enough_data"): 0,
    ("verdict", "no_champion"): 0,
    ("retrain",): 1,
    ("last_check_timestamp_seconds",): 1.5e9,
    ("window_end_timestamp_seconds",): 1367366400,
    ("columns", "broken"): 1,
    ("columns", "drift"): 1,
    ("columns", "stable"): 1,
    ("column_effect", "temp"): 0.8,
    ("column_effect", "wind"): 0.02,
    ("rows", "reference"): 9000,
    ("rows", "current"): 4000,
    ("loss_reference", "log_loss"): 0.5,
    ("loss_current", "log_loss"): 0.6,
    ("loss_tolerance", "log_loss"): 0.02,
    ("harmful", "log_loss"): 1,
    ("score",): 8,
    ("armed",): 0,
    ("held_back",): 1,
    ("trainings_in_budget_window",): 2,
}


def test_the_text_file_holds_every_number_of_the_check(tmp_path):
    path = export.write_textfile(str(tmp_path / "node"), REPORT, 1.5e9)
    assert path == str(tmp_path / "node" / "mlops_drift_late__flights_.prom")
    assert read(Path(path).read_text()) == EXPECTED
    assert len(list((tmp_path / "node").iterdir())) == 1


def test_a_check_without_numbers_has_a_verdict_alone(tmp_path):
    report = {**REPORT, "verdict": "no_champion", "window": None, "drift": None, "harm": None, "hysteresis": None}
    found = read(Path(export.write_textfile(str(tmp_path), report, 1.5e9)).read_text())
    assert {name for name, *_ in found} == {"verdict", "retrain", "last_check_timestamp_seconds"}
    assert found["verdict", "no_champion"] == 1


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = export.write_textfile(str(tmp_path), REPORT, 1.5e9)
    before = Path(path).read_text()

    def torn(registry, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(exposition, "generate_latest", torn)
    with pytest.raises(KeyboardInterrupt):
        export.write_textfile(str(tmp_path), REPORT, 1.6e9)
    assert Path(path).read_text() == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExternalSystemError, match=r"cannot write .*file/mlops_drift"):
        export.write_textfile(str(tmp_path / "file"), REPORT, 1.5e9)


@pytest.fixture
def gateway():
    """A server that keeps what it is sent, and answers as told."""

    class Handler(BaseHTTPRequestHandler):
        requests: list = []
        status = 200

        def do_PUT(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self.requests.append((self.path, self.headers.get("Authorization"), body))
            self.send_response(self.status)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    Handler.address = f"127.0.0.1:{server.server_port}"
    try:
        yield Handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_push_replaces_the_models_group(gateway):
    export.push(f"http://{gateway.address}", REPORT, 1.5e9)
    ((path, credentials, body),) = gateway.requests
    group = base64.urlsafe_b64encode(b'late "flights"').decode()
    assert path in (
        "/metrics/job/mlops_drift/model/late+%22flights%22",
        f"/metrics/job/mlops_drift/model@base64/{group}",
    )
    assert credentials is None and read(body) == EXPECTED


def test_a_password_is_sent_and_never_shown(gateway):
    export.push(f"http://me:s%3Acret@{gateway.address}/", REPORT, 1.5e9)
    assert gateway.requests[0][1] == "Basic " + base64.b64encode(b"me:s:cret").decode()
    gateway.status = 500
    with pytest.raises(ExternalSystemError, match="did not take the metrics") as error:
        export.push(f"http://me:s%3Acret@{gateway.address}/", REPORT, 1.5e9)
    assert "cret" not in str(error.value)


def test_a_gateway_that_is_down_or_no_address_is_an_error():
    with pytest.raises(ExternalSystemError, match="did not take"):
        export.push("http://127.0.0.1:9", REPORT, 1.5e9)
    for url in ("ftp://host", "host:9091", ""):
        with pytest.raises(InvalidInputError, match="expected http"):
            export.push(url, REPORT, 1.5e9)
