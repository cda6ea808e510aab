"""A model's aliases in the registry: moved by compare-and-set, with a way back."""

from __future__ import annotations

from typing import Any

from airflow_mlops.exceptions import ConcurrentChangeError, InvalidInputError
from airflow_mlops.hooks.mlflow import MlflowHook, alias_tag

#: Tag of a version that was taken back, with the task that did so.
ROLLED_BACK = "mlops.rolled_back"


def refuse_rolled_back(version: Any) -> None:
    """Refuse a ``ModelVersion`` that was taken back once, until somebody allows it again.

    :raises InvalidInputError: it was
    """
    if ROLLED_BACK in version.tags:
        raise InvalidInputError(
            f"{version.name} version {version.version} was rolled back; delete its tag {ROLLED_BACK!r} to allow it"
        )


def holder_of(hook: MlflowHook, name: str, alias: str) -> str | None:
    """The version that has ``alias``; None where none has."""
    holder = hook.version_by_alias(name, alias, missing_ok=True)
    return None if holder is None else str(holder.version)


def compare_and_set(
    hook: MlflowHook, name: str, alias: str, version: str, expected: str | None, *, previous_alias: str
) -> bool:
    """Move ``alias`` from ``expected`` (None: from nowhere) to ``version``; False when it was there already.

    The caller holds the model's lease.

    :raises ConcurrentChangeError: another version has the alias
    """
    if not to_move(hook, name, alias, version, expected):
        # An earlier try may have died before it left the record that tells a lost champion from none.
        hook.client.set_registered_model_tag(name, alias_tag(alias), version)
        return False
    move_alias(hook, name, alias, version, keep=(previous_alias, expected))
    return True


def to_move(hook: MlflowHook, name: str, alias: str, version: str, expected: str | None) -> bool:
    """Whether ``alias`` is where the decision found it; False when ``version`` has it already.

    :raises ConcurrentChangeError: another version has the alias
    """
    current = holder_of(hook, name, alias)
    if current == version:
        return False
    if current != expected:
        raise ConcurrentChangeError(
            f"{alias} of {name} is version {current or 'none'}, but this promotion was decided "
            f"against {expected or 'none'}; somebody else moved it. Run the gate again against the new champion."
        )
    return True


def move_alias(hook: MlflowHook, name: str, alias: str, version: str, keep: tuple[str, str | None]) -> None:
    """Point ``alias`` to ``version`` and check that it stayed; ``keep`` is the alias and version to go back to.

    :raises ConcurrentChangeError: it was moved elsewhere at once
    """
    previous_alias, previous = keep
    if previous is not None:
        # First, so that a task that dies in between leaves a way back.
        hook.client.set_registered_model_alias(name, previous_alias, previous)
    hook.client.set_registered_model_alias(name, alias, version)
    hook.client.set_registered_model_tag(name, alias_tag(alias), version)
    holder = hook.version_by_alias(name, alias)
    if holder is None or str(holder.version) != version:
        raise ConcurrentChangeError(
            f"{alias} of {name} was set to {version} and is {holder.version if holder else 'gone'}: somebody moves it "
            "by other means; look at the registry before you clear this task"
        )
