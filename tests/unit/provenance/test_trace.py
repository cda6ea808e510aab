"""From a version to its data and back, and data that are no longer what a model learned from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from airflow_mlops.exceptions import DataError, ExternalSystemError, InvalidInputError, RegistryError
from airflow_mlops.provenance import check_data, require_data, trace, versions_using
from airflow_mlops.provenance.data import dvc_hash
from airflow_mlops.provenance.record import read


def test_a_version_is_traced_by_number_and_alias(recorded):
    client = recorded.world.hook.client
    client.set_registered_model_alias("late", "champion", "1")
    expected = read(recorded.papers["record_uri"])
    for version in ("1", 1, "champion", "@champion"):
        assert trace("late", version, client) == expected


def test_without_a_record_its_tags_its_run_and_its_directory_are_told(world):
    from airflow_mlops.storage import write_bytes

    report = write_bytes(str(world.root / "report.html"), b"<p>fine")
    world.register(gate={**world.gate, "report_uri": report})
    record = trace("late", "1", world.hook.client)
    assert record.get("data.snapshot.md5") == world.snapshot["md5"]
    assert record.get("data.training_set.sha256") == world.training_set["sha256"]
    assert record.gate["passed"] is True and record.metrics == {"train_log_loss": 0.41, "time_total_s": 3.0}
    assert record.seeds == {"params.seed": 7} and record.cluster["nodes"] == 2
    assert {"who.user", "code.revision", "canary.verdict", "approvals", "artifacts"} <= set(record.unknown)


def test_a_lost_run_directory_leaves_its_answers_unknown(world):
    world.register()
    shutil.rmtree(world.training["run_dir"])
    unknown = trace("late", "1", world.hook.client).unknown
    assert {"parameters", "seeds", "environment.lock.sha256", "cluster.nodes", "cost.gpu_hours"} <= set(unknown)


@pytest.mark.parametrize(("model", "version"), [("late", "9"), ("late", "champion"), ("other", "1")])
def test_what_is_not_registered_is_said(world, model, version):
    world.register()
    with pytest.raises(RegistryError, match=f"{model} has no version or alias '{version}'"):
        trace(model, version, world.hook.client)


def test_a_registry_that_is_away_is_no_answer(monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client = MlflowClient("http://127.0.0.1:9")
    with pytest.raises(ExternalSystemError, match="MLflow answered with an error"):
        trace("late", "1", client)
    with pytest.raises(ExternalSystemError, match="MLflow answered with an error"):
        versions_using(md5="a", client=client)


def test_back_from_a_dataset_to_its_versions(world):
    client = world.hook.client
    world.register()
    world.register(training={**world.training, "run_key": "july"}, snapshot={"md5": "other.dir"})
    world.register(model_name="early", training={**world.training, "run_key": "x"}, training_set=None)
    md5, sha256 = world.snapshot["md5"], world.training_set["sha256"]
    late = {"model": "late", "version": "1"}
    assert versions_using(md5=md5, client=client) == [
        {"model": "early", "version": "1", "by": "md5"},
        {**late, "by": "md5"},
    ]
    assert versions_using(sha256=sha256, client=client) == [
        {**late, "by": "sha256"}, {"model": "late", "version": "2", "by": "sha256"},
    ]  # fmt: skip
    both = versions_using(md5="other.dir", uri=world.training_set["uri"], client=client)
    assert both == [{**late, "by": "uri"}, {"model": "late", "version": "2", "by": "md5"}]
    assert versions_using(md5="nobodys", client=client) == []


def test_a_search_for_nothing_is_refused(world):
    with pytest.raises(InvalidInputError, match="give md5, sha256 or uri"):
        versions_using(client=world.hook.client)
    with pytest.raises(InvalidInputError, match="holds a quote"):
        versions_using(uri="it's", client=world.hook.client)


class TestData:
    @pytest.fixture
    def record(self, recorded):
        return read(recorded.papers["record_uri"])

    def findings(self, record):
        return {finding.what: finding for finding in check_data(record)}

    def test_data_that_stayed(self, record):
        assert [(finding.status, finding.intact) for finding in check_data(record)] == [("same", True)] * 2
        require_data(record)

    def test_a_file_that_changed_is_named(self, record, recorded):
        (recorded.world.raw / "flights" / "2013-02.csv").write_text("other rows")
        found = self.findings(record)["snapshot"]
        assert (found.status, found.changed, found.removed) == ("changed", ("flights/2013-02.csv",), ())
        message = r"snapshot .*/raw is changed \(recorded \w+.dir, now \w+.dir\): changed \['flights/2013-02.csv'\]"
        with pytest.raises(DataError, match=message):
            require_data(record)

    def test_a_file_that_is_gone_is_named(self, record, recorded):
        (recorded.world.raw / "flights" / "2013-01.csv").unlink()
        found = self.findings(record)["snapshot"]
        assert (found.status, found.removed, found.intact) == ("changed", ("flights/2013-01.csv",), False)

    def test_files_that_came_later_are_no_change_of_what_was_learned(self, record, recorded):
        (recorded.world.raw / "flights" / "2013-03.csv").write_text("rows of 2013-03")
        found = self.findings(record)["snapshot"]
        assert (found.status, found.added, found.intact) == ("grown", ("flights/2013-03.csv",), True)

    def test_a_training_set_that_changed_is_found_by_its_hash(self, record, recorded):
        uri = Path(recorded.world.training_set["uri"])
        uri.write_bytes(uri.read_bytes() + b"x")
        found = self.findings(record)["training_set"]
        assert (found.status, found.where, found.recorded) == (
            "changed",
            str(uri),
            recorded.world.training_set["sha256"],
        )
        assert found.found != found.recorded
        with pytest.raises(DataError, match=r"training_set .* is changed .*Restore the snapshot"):
            require_data(record)

    def test_data_that_are_gone(self, record, recorded):
        shutil.rmtree(recorded.world.raw)
        Path(recorded.world.training_set["uri"]).unlink()
        assert {what: found.status for what, found in self.findings(record).items()} == {
            "training_set": "gone", "snapshot": "gone",
        }  # fmt: skip

    def test_what_the_record_does_not_say_is_not_intact(self, record):
        blank = replace(record, data={})
        assert [(finding.status, finding.intact) for finding in check_data(blank)] == [("unknown", False)] * 2

    def test_without_the_listing_only_the_whole_is_known(self, record, recorded):
        shutil.rmtree(recorded.world.root / "remote")
        (recorded.world.raw / "flights" / "2013-03.csv").write_text("new")
        found = self.findings(record)["snapshot"]
        assert (found.status, found.changed, found.added) == ("changed", (), ())

    def test_the_hash_is_dvcs_own(self, recorded):
        world = recorded.world
        assert dvc_hash(str(world.raw))[0] == world.snapshot["md5"]
        from airflow_mlops.hooks.dvc import DvcHook

        file = world.raw / "flights" / "2013-01.csv"
        assert dvc_hash(str(file)) == (DvcHook(remote_url=str(world.root / "remote")).snapshot(str(file)).md5, None)
