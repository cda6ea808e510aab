"""What surrounds a rollout: the champion's alias, the question to a person, the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlops import storage
from airflow_mlops.approval import stored
from airflow_mlops.exceptions import ConcurrentChangeError
from airflow_mlops.hooks.mlflow import MlflowHook
from airflow_mlops.operators._alias import compare_and_set, holder_of, move_alias, refuse_rolled_back

if TYPE_CHECKING:
    from airflow_mlops.rollout.controller import Answer
    from airflow_mlops.rollout.judge import Verdict
    from airflow_mlops.rollout.spec import RolloutSpec


@dataclass(frozen=True)
class ChampionAlias:
    """The alias that a promotion moves, and from where.

    :param hook: of the registry
    :param model: registered model
    :param alias: the champion's
    :param previous_alias: given to the champion that is replaced
    :param version: challenger
    :param expected: champion that it was compared with; None for none
    """

    hook: MlflowHook
    model: str
    alias: str
    previous_alias: str
    version: str
    expected: str | None

    def check(self) -> None:
        """Refuse a rollout that was decided against another champion, before any traffic moves.

        :raises ConcurrentChangeError: neither champion nor challenger has the alias
        :raises InvalidInputError: the challenger was rolled back before
        """
        refuse_rolled_back(self.hook.version(self.model, self.version))
        current = holder_of(self.hook, self.model, self.alias)
        if current not in (self.expected, self.version):
            raise ConcurrentChangeError(
                f"{self.alias} of {self.model} is version {current or 'none'}, but this rollout compares with "
                f"{self.expected or 'none'}; somebody else moved it. Begin anew against the new champion."
            )

    def move(self) -> None:
        """Give the alias to the challenger; again: nothing.

        :raises ConcurrentChangeError: it was moved since
        """
        self._set(self.version, self.expected)

    def take_back(self) -> None:
        """Give it back to the champion, where an earlier try had moved it before it died."""
        if self.expected and holder_of(self.hook, self.model, self.alias) == self.version:
            with self.hook.lease(self.model):
                move_alias(self.hook, self.model, self.alias, self.expected, keep=(self.previous_alias, None))
                if holder_of(self.hook, self.model, self.previous_alias) == self.expected:
                    # The way back must not lead to where the champion is already.
                    self.hook.client.delete_registered_model_alias(self.model, self.previous_alias)

    def _set(self, version: str, expected: str | None) -> None:
        with self.hook.lease(self.model):
            compare_and_set(self.hook, self.model, self.alias, version, expected, previous_alias=self.previous_alias)


def undone(result: Mapping[str, Any], error: ConcurrentChangeError) -> dict[str, Any]:
    """The result of a rollout whose promotion came too late."""
    return {**result, "verdict": "ROLLBACK", "reasons": [str(error)]}


def question(model: str, version: str) -> tuple[str, str]:
    """Subject and body of the question whether a rollout may go on.

    Airflow keeps one question per task, with the text it was first asked with, so the text holds for every step.
    """
    return (
        f"May the rollout of {model} version {version} go on to its next step?",
        "The canary keeps its share of the traffic and is judged on while nobody answers: harm rolls it back, and so "
        "does the deadline. The numbers are in the task's log.",
    )


class Asker:
    """Asks once a step, on a worker that waits for the answer itself.

    :param ti_id: of the task instance
    :param ask: puts the question
    """

    def __init__(self, ti_id: Any, ask: Callable[[], None]) -> None:
        self._ti_id = ti_id
        self._ask = ask
        self._asked: int | None = None

    async def answer(self, verdict: Verdict) -> Answer | None:
        """What somebody has said of the verdict's step, None so far."""
        from airflow_mlops.rollout.controller import Answer

        if self._asked != verdict.step:
            self._ask()
            self._asked = verdict.step
        said = stored(self._ti_id)
        return Answer(verdict.step, said.approved, said.by) if said else None


def write_report(folder: str, result: Mapping[str, Any], spec: RolloutSpec) -> dict[str, str]:
    """Write page, picture and result below ``folder``; ``html_uri``, ``png_uri`` and ``report_uri``."""
    from airflow_mlops.rollout.report import render_html, render_png

    html, png = storage.join(folder, "rollout.html"), storage.join(folder, "rollout.png")
    storage.write_bytes(html, render_html(result, spec).encode())
    storage.write_bytes(png, render_png(result, spec))
    return {
        "html_uri": html,
        "png_uri": png,
        "report_uri": storage.write_json(storage.join(folder, "rollout.json"), dict(result)),
    }


def to_mlflow(
    hook: MlflowHook, experiment: str, key: str, result: Mapping[str, Any], spec: RolloutSpec
) -> dict[str, str | None]:
    """Put a rollout into the MLflow run of ``key``: verdict, numbers, page and picture; ``mlflow_run_id`` and
    ``mlflow_url``.

    A rollout that is logged again writes over what it wrote before.
    """
    import tempfile
    import time
    from pathlib import Path

    from mlflow.entities import Metric, RunTag

    from airflow_mlops.rollout.report import render_html, render_png

    name = f"{result['model']} {result['version']}"
    run = hook.run_for_key(experiment, key, name=name, tags={"mlops.kind": "rollout"})
    client, run_id, now = hook.client, run.info.run_id, int(time.time() * 1000)
    numbers = {"seconds": result["seconds"], "looks": result["looks"]}
    numbers |= {f"requests_{arm}": count for arm, count in result["requests"].items()}
    tags = {
        "mlops.model": result["model"],
        "mlops.version": result["version"],
        "mlops.verdict": result["verdict"],
        "mlops.previous": result["previous"],
    }
    metrics = [Metric(name, float(value), now, 0) for name, value in numbers.items()]
    client.log_batch(run_id, metrics, tags=[RunTag(name, str(value)) for name, value in tags.items() if value])
    client.log_dict(run_id, dict(result), "rollout.json")
    client.log_text(run_id, render_html(result, spec), "rollout.html")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "rollout.png"
        picture.write_bytes(render_png(result, spec))
        client.log_artifact(run_id, str(picture))
    client.set_terminated(run_id, "FINISHED")
    return {"mlflow_run_id": run_id, "mlflow_url": hook.run_url(experiment, run_id)}
