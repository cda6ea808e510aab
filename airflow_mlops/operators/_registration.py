"""What a registration reads of a model and its data, and writes beside them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import DataError, InvalidInputError
from airflow_mlops.hooks._models import RUN_KEY
from airflow_mlops.shell import is_blank
from airflow_mlops.storage import read_bytes

if TYPE_CHECKING:
    import pandas as pd

    from airflow_mlops.drift import Profile

#: Folder of a run's artifacts. The model's own folder keeps the bytes that were judged.
EXAMPLE = "input_example"
#: Artifact of a run: the gate's result.
VERDICT = "gate/verdict.json"
COSTS = ("wall_seconds", "cpu_seconds", "gpu_seconds", "attempts")


@dataclass(frozen=True)
class Papers:
    """One training as the arguments of a registration describe it."""

    key: str
    model_uri: str
    training: dict[str, Any]
    data: dict[str, Any]
    gate: dict[str, Any]
    snapshot: dict[str, Any]
    task: str


def checked_model(model_dir: str, uri: str, *, require_signature: bool) -> Any:
    """The ``mlflow.models.Model`` in a local folder.

    :param uri: how errors call it
    :raises InvalidInputError: there is none, no flavour of it can be loaded here, or it has no signature
    """
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    if not os.path.isfile(os.path.join(model_dir, "MLmodel")):
        raise InvalidInputError(f"{uri} holds no MLflow model (no file MLmodel)")
    try:
        model = Model.load(model_dir)
        flavours = dict(model.flavors)
    except (MlflowException, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInputError(f"the file MLmodel of {uri} cannot be read: {error}; save the model again") from error
    loader = (flavours.get("python_function") or {}).get("loader_module")
    if not loader or not _importable(str(loader)):
        missing = f"flavour is unknown here: there is no module {loader!r}" if loader else "has no python_function"
        raise InvalidInputError(
            f"the model in {uri} {missing} (flavours: {sorted(flavours) or 'none'}), so nothing could score or serve "
            "it; save it with mlflow.<flavour>.save_model of a flavour that is installed"
        )
    if require_signature and (model.signature is None or model.signature.inputs is None):
        raise InvalidInputError(
            f"the model in {uri} has no signature, so nobody can tell its inputs; save it with signature="
            "mlflow.models.infer_signature(inputs, outputs), or set require_signature=False"
        )
    return model


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def first_rows(uri: str, count: int) -> pd.DataFrame:
    """The first rows of a dataset, all columns.

    :raises DataError: nothing is there, or it cannot be read
    """
    import pandas as pd

    from airflow_mlops.drift.profile import batches, column_names

    for batch in batches(uri, column_names(uri)):
        if batch.num_rows:
            return batch.slice(0, count).to_pandas()
    return pd.DataFrame(columns=column_names(uri))


def input_example(model: Any, rows: pd.DataFrame) -> dict[str, Any] | None:
    """Rows as MLflow writes an input example of a data frame: ``columns`` and ``data``; None where the signature names
    no inputs, or others than the data's.

    Only what the model reads is in it: no label, no key, no time.
    """
    schema = model.signature.inputs if model.signature is not None else None
    if schema is None or not schema.has_input_names() or not len(rows):
        return None
    names = schema.input_names()
    if set(names) - set(rows.columns):
        return None
    shown = json.loads(rows[names].to_json(orient="split", date_format="iso", date_unit="us", double_precision=15))
    return {"columns": shown["columns"], "data": shown["data"]}


def stored_example(client: Any, run: Any, model: Any, rows: Any, count: int) -> str | None:
    """Where the model's input example is: in its own folder, or one of ``count`` rows that is put beside it now."""
    if own := model.saved_input_example_info:
        return f"{run.info.artifact_uri}/model/{own['artifact_path']}"
    shown = input_example(model, rows.head(count)) if rows is not None and count > 0 else None
    if shown is None:
        return None
    client.log_dict(run.info.run_id, shown, f"{EXAMPLE}/input_example.json")
    client.log_dict(run.info.run_id, {"dataframe_split": shown}, f"{EXAMPLE}/serving_input_example.json")
    return f"{run.info.artifact_uri}/{EXAMPLE}/input_example.json"


def dataset_of(name: str, uri: str, digest: str, profile: Profile, rows: pd.DataFrame) -> Any:
    """The ``mlflow.entities.Dataset`` of a training set: source, digest, schema of its columns, number of rows.

    :param digest: at most 36 characters of it are kept, as MLflow asks for
    :param rows: some of the dataset, all columns
    """
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import Dataset
    from mlflow.exceptions import MlflowException
    from mlflow.models import infer_signature

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of integers that may be missing one day, and of sources alike
        try:
            schema = infer_signature(rows).inputs if len(rows) else None
        except MlflowException:  # a type that MLflow has no name for
            schema = None
        source = resolve_dataset_source(uri)
    plain: Any = MetaDataset  # declared abstract in one property that it does not need
    told = plain(source, name=name, digest=digest[:32], schema=schema).to_dict()
    counts = {"num_rows": profile.rows, "num_elements": profile.rows * len(rows.columns)}
    return Dataset(**{**told, "profile": json.dumps(counts)})


def log_dataset(client: Any, run: Any, name: str, papers: Papers, profile: Profile, rows: Any) -> None:
    """Put the training set among the run's inputs, by its own digest where that is known."""
    from mlflow.entities import DatasetInput, InputTag

    digest = papers.data.get("sha256") or profile.digest
    dataset = dataset_of(name, str(papers.data["uri"]), str(digest), profile, rows)
    marks = {"mlflow.data.context": "training", "dvc_md5": papers.snapshot.get("md5")}
    tags = [InputTag(name, str(value)) for name, value in marks.items() if not is_blank(value)]
    client.log_inputs(run.info.run_id, [DatasetInput(dataset, tags)])


def record(client: Any, run: Any, papers: Papers, metrics: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Parameters, metrics and the gate's papers; repeating it changes nothing."""
    from mlflow.entities import Metric, Param

    run_id, when = run.info.run_id, run.info.start_time
    numbers = {**(papers.training.get("metrics") or {}), **metrics}
    numbers |= {name: papers.training.get(name) for name in COSTS}
    for arm, found in (papers.gate.get("metrics") or {}).items():
        numbers |= {f"gate_{arm}_{name}": value for name, value in (found or {}).items()}
    finite = {n: float(v) for n, v in numbers.items() if isinstance(v, int | float) and math.isfinite(v)}
    params = [Param(n, str(v)[:6000]) for n, v in parameters.items()]
    client.log_batch(run_id, [Metric(n, v, when, 0) for n, v in finite.items()], params)
    if papers.gate:
        client.log_dict(run_id, papers.gate, VERDICT)
    report = papers.gate.get("report_uri")
    if not is_blank(report):
        client.log_text(run_id, read_bytes(str(report)).decode(), "gate/report.html")


def held_out(predictions_uri: str) -> pd.DataFrame:
    """The gate's predictions in the order of time."""
    import pandas as pd

    frame = pd.read_parquet(predictions_uri, columns=["event_timestamp", "label", "challenger"])
    return frame.sort_values("event_timestamp", kind="stable")


def loss_reference(frame: pd.DataFrame) -> Any:
    """Losses of the challenger by day, as JSON."""
    import pandas as pd

    from airflow_mlops.drift.harm import LossReference

    day = pd.to_datetime(frame["event_timestamp"], utc=True).dt.strftime("%Y-%m-%d")
    return LossReference.of(frame["label"].to_numpy(), frame["challenger"].to_numpy(), day.to_numpy()).to_json()


def performance(frame: pd.DataFrame, log: Any) -> dict[str, Any]:
    """The estimator of performance without labels; a hold-out that cannot carry one costs only that."""
    from airflow_mlops.drift.performance import CalibratedEstimate

    try:
        estimator = CalibratedEstimate.fit(frame["challenger"].to_numpy(), frame["label"].to_numpy())
    except DataError as error:
        log.warning("no estimator of performance without labels is kept: %s", error)
        return {}
    for warning in estimator.warnings:
        log.warning("performance without labels: %s", warning)
    return {"performance": estimator.to_json()}


def described(key: str, window: Sequence[Any], rows: int | None, gate: dict[str, Any]) -> str:
    """One line about a version, for whoever looks at the registry."""
    parts = [f"Training {key}"]
    if all(window):
        parts.append(f"for {window[0]} to {window[1]}")
    if rows is not None:
        parts.append(f"on {rows:,} rows")
    verdict = "no gate"
    if gate:
        reasons = "; ".join(str(reason) for reason in gate.get("reasons") or ())
        verdict = f"gate: {reasons}" if reasons else "gate passed"
    return f"{' '.join(parts)}. {verdict[0].upper()}{verdict[1:]}."


def tags_of(papers: Papers) -> dict[str, Any]:
    """A version's tags that follow from the training's papers alone; blank ones included."""
    approval = papers.gate.get("approval") or {}
    word = "none" if not papers.gate else "overruled" if approval.get("overrode") else "passed"
    return {
        RUN_KEY: papers.key,
        "mlops.created_by": papers.task,
        "mlops.dataset_uri": papers.data.get("uri"),
        "mlops.dataset_sha256": papers.data.get("sha256"),
        "mlops.dataset_md5": papers.snapshot.get("md5"),
        "mlops.run_dir": papers.training.get("run_dir"),
        "mlops.gate": word,
        "mlops.gate_uri": papers.gate.get("report_uri"),
        "mlops.gate_approved_by": approval.get("by"),
        "mlops.gate_approved_at": approval.get("at"),
    }


def file_name(key: str) -> str:
    """A key as part of a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", key)
