"""The question whether a version may become the champion, and whose word it was."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from airflow_mlops.approval import Said
from airflow_mlops.operators._approval import verdict_text
from airflow_mlops.operators._registration import RUN_KEY, VERDICT

if TYPE_CHECKING:
    from airflow_mlops.hooks.mlflow import MlflowHook

#: Tags of a version that was promoted on somebody's word.
APPROVED_BY, APPROVED_AT = "mlops.approved_by", "mlops.approved_at"
#: Tags of a version that the question shows.
SHOWN = ("run_key", "window_start", "window_end", "dataset_uri", "gate_approved_by")

log = logging.getLogger(__name__)


def promotion_question(hook: MlflowHook, target: Any, alias: str, expected: str | None) -> tuple[str, str, Any]:
    """Subject, body (Markdown) and facts of the question.

    :param target: the ``ModelVersion`` to promote
    :param expected: version that has ``alias`` now; None for none
    """
    name, version = target.name, str(target.version)
    lines = [f"- {tag}: `{target.tags[f'mlops.{tag}']}`" for tag in SHOWN if f"mlops.{tag}" in target.tags]
    body = "\n\n".join(part for part in (target.description, "\n".join(lines), _verdict(hook, target)) if part)
    facts = [name, version, expected, alias, target.run_id, target.tags.get(RUN_KEY)]
    instead = f"instead of version {expected}" if expected else "as the first one"
    return f"Make version {version} of {name} the {alias} {instead}?", body, facts


def said_before(version: Any) -> Said | None:
    """Whose word an earlier try had before it moved the alias and died."""
    by = version.tags.get(APPROVED_BY)
    return Said(True, by, at=version.tags.get(APPROVED_AT) or None) if by else None


def _verdict(hook: MlflowHook, target: Any) -> str:
    """What the gate found, as it was kept with the version's run."""
    word = target.tags.get("mlops.gate", "none")
    if word == "none":
        return "**No gate has judged this version.**"
    from mlflow.artifacts import load_dict
    from mlflow.exceptions import MlflowException

    try:
        folder = hook.client.get_run(target.run_id).info.artifact_uri
        with hook.session():
            return verdict_text(load_dict(f"{folder}/{VERDICT}"))
    except (MlflowException, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the gate's verdict cannot be read: %s", error)
        return f"**The gate's verdict ({word}) cannot be read:** {target.tags.get('mlops.gate_uri', 'no report')}"
