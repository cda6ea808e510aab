"""What the gate does beside judging: its cases and models, where its evidence goes, which branch follows."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import DataError, InvalidInputError
from airflow_mlops.shell import is_blank
from airflow_mlops.storage import read_bytes

if TYPE_CHECKING:
    import pandas as pd
    from airflow.sdk import BaseOperator

    from airflow_mlops.evaluation import GatePolicy, GateVerdict
    from airflow_mlops.evaluation.cases import Case
    from airflow_mlops.evaluation.metrics import Floats
    from airflow_mlops.hooks._models import Models
    from airflow_mlops.hooks.mlflow import MlflowHook

#: Names of the gate's page, verdict and picture in an MLflow run.
PAGE, VERDICT, PICTURE = "gate.html", "gate.json", "gate.png"


@dataclass(frozen=True)
class Loaded:
    """A model that has been opened for many predictions.

    :param predict: a frame to the probability of each row
    :param features: its inputs, by its signature or as given
    """

    predict: Callable[[pd.DataFrame], Floats]
    features: list[str]


def load(models: Models, uri: str, features: Sequence[str] | None, *, unregistered: bool = False) -> Loaded:
    """The model at ``uri``, loaded once; a pickle anew for each frame, in a sandbox."""
    inputs = models.inputs(uri, unregistered=unregistered) or list(features or ())
    return Loaded(models.predictor(uri, features, unregistered=unregistered), inputs)


def behaviour(value: Any) -> list[Case]:
    """The cases given: mappings, the text of a list of them, or the URI of JSON or Parquet.

    :raises DataError: nothing is at the URI
    :raises InvalidInputError: what is there are no cases
    """
    import json

    from airflow_mlops.evaluation.cases import cases_of_table, read_cases
    from airflow_mlops.shell import as_names

    if is_blank(value):
        return []
    if not isinstance(value, str) or value.lstrip().startswith("["):
        given: Any = as_names(value, "cases")
        return read_cases(given)
    try:
        content = read_bytes(value)
    except FileNotFoundError:
        raise DataError(f"there are no cases at {value}; give a list, or the URI of JSON or Parquet") from None
    try:
        if value.lower().endswith((".parquet", ".pq")):
            import pandas as pd

            return cases_of_table(pd.read_parquet(io.BytesIO(content)))
        given = json.loads(content)
    except (ValueError, OSError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"the cases at {value} are neither JSON nor Parquet: {error}") from error
    if not isinstance(given, list):
        raise InvalidInputError(f"the cases at {value} are a {type(given).__name__}; expected a list of mappings")
    return read_cases(given)


def fairness_columns(policy: GatePolicy, frame: pd.DataFrame, uri: str) -> dict[str, Any]:
    """The columns that the policy's fairness asks for.

    :raises DataError: the data lacks one
    """
    from airflow_mlops.evaluation.rules import fairness_rules

    names = [rule.column for rule in fairness_rules(policy.fairness)]
    if missing := [name for name in names if name not in frame.columns]:
        raise DataError(f"{uri} lacks the fairness columns {missing}; it has {list(frame.columns)[:20]}")
    return {name: frame[name].to_numpy() for name in names}


def to_mlflow(
    hook: MlflowHook, experiment: str, key: str, name: str, verdict: GateVerdict, page: str, picture: bytes | None
) -> dict[str, str | None]:
    """Put a verdict into the MLflow run of ``key``, which a retry finds again; ``mlflow_run_id`` and ``mlflow_url``.

    A verdict that is logged again writes over the one before.
    """
    import math
    import tempfile
    from pathlib import Path

    from mlflow.entities import Metric, RunTag

    run = hook.run_for_key(experiment, key, name=name, tags={"mlops.kind": "gate"})
    # One instant for a run, so that a retry writes the same points and no second ones.
    client, run_id, when = hook.client, run.info.run_id, int(run.info.start_time)
    numbers: dict[str, Any] = {
        f"{arm}_{metric}": value for arm, found in verdict.metrics.items() for metric, value in (found or {}).items()
    }
    numbers |= {f"challenger_{metric}": value for metric, value in (verdict.latency or {}).items()}
    if verdict.differences:
        numbers["gain"] = verdict.differences[0]["estimate"]
    metrics = [
        Metric(_key(metric), float(value), when, 0)
        for metric, value in numbers.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    tags = {
        "mlops.verdict": "passed" if verdict.passed else "failed",
        "mlops.reason": "; ".join(verdict.reasons)[:4000],
    }
    client.log_batch(run_id, metrics, tags=[RunTag(*tag) for tag in tags.items()])
    client.log_dict(run_id, verdict.to_json(), VERDICT)
    client.log_text(run_id, page, PAGE)
    if picture is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / PICTURE
            path.write_bytes(picture)
            client.log_artifact(run_id, str(path))
    client.set_terminated(run_id, "FINISHED")
    return {"mlflow_run_id": run_id, "mlflow_url": hook.run_url(experiment, run_id)}


def _key(metric: str) -> str:
    """``metric`` in the characters that MLflow takes in a key; a user's function has a colon."""
    return metric.replace(":", "/")


def branches(
    operator: BaseOperator, on_pass: str | Sequence[str] | None, on_fail: str | Sequence[str] | None
) -> Mapping[bool, list[str]]:
    """By verdict the tasks or groups that follow.

    Without ``on_pass`` all that come directly after the gate follow a pass but those of ``on_fail``.

    :raises InvalidInputError: no ``on_fail``, or a name that does not come directly after the gate
    """
    chosen = {True: _ids(on_pass), False: _ids(on_fail)}
    if not chosen[False]:
        raise InvalidInputError("on_fail='branch' needs fail_task_ids: the tasks or groups that follow a failed gate")
    groups = operator.dag.task_group_dict
    after = set(operator.downstream_task_ids)

    def roots(name: str) -> set[str]:
        return {task.task_id for task in groups[name].roots} if name in groups else {name}  # type: ignore[union-attr]

    for name in [*chosen[True], *chosen[False]]:
        if not roots(name) <= after:
            raise InvalidInputError(
                f"on_fail='branch' names {name!r}, which does not come directly after {operator.task_id!r}; "
                f"after it come {sorted(after)}"
            )
    if not chosen[True]:
        chosen[True] = sorted(after - set().union(*map(roots, chosen[False])))
    return chosen


def _ids(value: str | Sequence[str] | None) -> list[str]:
    return [] if not value else [value] if isinstance(value, str) else list(value)
