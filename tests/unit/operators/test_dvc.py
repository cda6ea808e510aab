"""What the snapshot checks before DVC is loaded, and what its templates render."""

from __future__ import annotations

import pytest
from airflow.sdk.exceptions import AirflowFailException

from airflow_mlops.operators.dvc import DvcSnapshotOperator


def test_everything_is_templated(untemplated, rendered):
    assert untemplated(DvcSnapshotOperator) == set()
    made = rendered(
        DvcSnapshotOperator(task_id="s", path="{{ root }}/raw", remote_url="{{ root }}/remote"), root="/data"
    )
    assert (made.path, made.remote_url) == ("/data/raw", "/data/remote")


@pytest.mark.parametrize("blank", ["", "None", None])
def test_an_empty_path_is_not_the_workers_folder(blank, tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AirflowFailException, match="empty after templating: path="):
        DvcSnapshotOperator(task_id="s", path=blank, remote_url=str(tmp_path / "remote")).execute({})
    assert not (tmp_path / "remote").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "/nowhere"}, "nothing is at /nowhere; expected a file or folder on this worker"),
        ({"remote_url": "None"}, "no DVC remote: give remote_url"),
        ({"remote_url": None, "dvc_conn_id": "gone"}, "no connection 'gone'; create it with type dvc_remote"),
    ],
)
def test_bad_input_names_the_fix(changes, message, tmp_path):
    (tmp_path / "file").write_text("x")
    arguments = {"path": str(tmp_path / "file"), "remote_url": str(tmp_path / "remote")} | changes
    with pytest.raises(AirflowFailException, match=message):
        DvcSnapshotOperator(task_id="s", **arguments).execute({})
