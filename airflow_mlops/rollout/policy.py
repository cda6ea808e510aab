"""How far a rollout may go before it has shown what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout.guardrail import Guardrail, parse_guardrails

MODES = ("progressive", "ab")
EVIDENCE = ("always_valid", "group_sequential")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: Any, least: float, unit: str) -> None:
    if not _finite(value) or value < least:
        raise InvalidInputError(f"{name} is {value!r}; expected {unit}, at least {least:g}")


@dataclass(frozen=True)
class Step:
    """One step of a rollout.

    :param weight: canary's share of traffic, percent; 0: it gets copies of stable's requests and answers nobody
    :param bake_seconds: least time in this step; ``None``: the policy's
    :param min_requests: least requests per arm in this step; ``None``: the policy's
    :param approval: wait for a person before leaving the step upwards
    """

    weight: float
    bake_seconds: float | None = None
    min_requests: int | None = None
    approval: bool = False

    def __post_init__(self) -> None:
        if not _finite(self.weight) or not 0 <= self.weight <= 100:
            raise InvalidInputError(f"the weight of a rollout step is {self.weight!r}; expected percent, 0 to 100")
        if self.bake_seconds is not None:
            _check(f"bake_seconds of the step of {self.weight:g} %", self.bake_seconds, 0, "seconds")
        if self.min_requests is not None:
            _check(f"min_requests of the step of {self.weight:g} %", self.min_requests, 1, "requests per arm")

    def to_json(self) -> Any:
        """Its weight, or a dictionary when there is more to say."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return (
            self.weight
            if Step(self.weight) == self
            else {k: v for k, v in given.items() if v is not None and v is not False}
        )

    @classmethod
    def from_json(cls, value: Step | Mapping[str, Any] | float) -> Step:
        """A step from its weight or a dictionary.

        :raises InvalidInputError: unknown field or value out of range
        """
        if isinstance(value, Step):
            return value
        if not isinstance(value, Mapping):
            return cls(value)
        unknown = set(value) - {field.name for field in fields(cls)}
        if unknown or "weight" not in value:
            raise InvalidInputError(
                f"{dict(value)!r} is not a rollout step; expected a weight in percent, or a dictionary with weight "
                f"and any of {', '.join(field.name for field in fields(cls)[1:])}"
            )
        return cls(**value)


@dataclass(frozen=True)
class RolloutPolicy:
    """How traffic moves and how sure the judge must be.

    A step is left upwards when both arms have ``min_requests`` in it, ``bake_seconds`` have passed, every guardrail
    has data of both arms and none shows harm: it bounds how many users a bad version reaches. Only when every
    guardrail has *shown* non-inferiority is the step to 100 % taken, where no stable arm is left to compare with.

    A first step of 0 is a shadow step; ``steps=(0, 100)`` is blue-green: everything must be shown on copies. With
    ``mode="ab"`` the last step is below 100 and the rollout ends with CONCLUDE after its bake (or ``max_requests``),
    with a report and no winner.

    ``evidence="always_valid"`` may be looked at after every request and needs no plan. ``"group_sequential"`` decides
    at ``planned_looks`` looks, evenly spaced over ``max_requests``, and needs fewer requests when that sample is sure
    to come.

    :param steps: canary weights in percent, rising, or :class:`Step` or dictionaries of one
    :param min_requests: requests per arm and step
    :param alpha: probability of ever rolling back a version that is not worse, over all guardrails and looks
    :param beta: probability of ever promoting a version that is worse than a guardrail's margin
    :param deadline_seconds: HOLD becomes ROLLBACK after this time
    :param bake_seconds: least time per step; when above 0 the version is also watched at 100 % for so long
    :param srm_alpha: error rate of the sample-ratio check
    :param mode: ``progressive`` or ``ab``
    :param evidence: ``always_valid`` or ``group_sequential``
    :param max_requests: requests of the canary after which a group-sequential rollout, or an A/B test, ends
    :param planned_looks: looks of a group-sequential rollout
    :param replica_sd: standard deviation, relative, that replicas of one version are known to differ by; the least
        that is assumed. It takes the place of what cannot be seen when an arm has one replica.
    """

    steps: tuple[Any, ...] = (10, 50, 100)
    min_requests: int = 100
    alpha: float = 0.05
    beta: float = 0.05
    deadline_seconds: float = 3600.0
    bake_seconds: float = 0.0
    srm_alpha: float = 0.001
    mode: str = "progressive"
    evidence: str = "always_valid"
    max_requests: int | None = None
    planned_looks: int | None = None
    replica_sd: float = 0.0

    def __post_init__(self) -> None:
        given = self.steps if isinstance(self.steps, list | tuple) else (self.steps,)
        object.__setattr__(self, "steps", tuple(Step.from_json(step) for step in given))
        if self.mode not in MODES or self.evidence not in EVIDENCE:
            raise InvalidInputError(
                f"mode is {self.mode!r} and evidence {self.evidence!r}; expected one of {', '.join(MODES)} and one of "
                f"{', '.join(EVIDENCE)}"
            )
        self._check_weights()
        for name in ("alpha", "beta", "srm_alpha"):
            if not _finite(getattr(self, name)) or not 0 < getattr(self, name) < 0.5:
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; expected an error rate between 0 and 0.5")
        if not _finite(self.replica_sd) or not 0 <= self.replica_sd <= 2:
            raise InvalidInputError(f"replica_sd is {self.replica_sd!r}; expected a relative spread, 0 to 2")
        _check("min_requests", self.min_requests, 1, "requests per arm")
        _check("deadline_seconds", self.deadline_seconds, 1, "seconds")
        _check("bake_seconds", self.bake_seconds, 0, "seconds")
        for name in ("max_requests", "planned_looks"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), 1, "a whole number")
        if self.evidence == "group_sequential" and (self.max_requests is None or self.planned_looks is None):
            raise InvalidInputError(
                f"group_sequential evidence has max_requests {self.max_requests} and planned_looks "
                f"{self.planned_looks}; expected both, as its error rates rest on that plan"
            )
        baking = sum(self.bake_of(index) for index in range(len(self.steps)))
        if baking >= self.deadline_seconds:
            raise InvalidInputError(
                f"bake_seconds of all {len(self.steps)} steps, {baking:g}, does not fit in deadline_seconds "
                f"{self.deadline_seconds:g}: no version could ever be promoted"
            )

    def _check_weights(self) -> None:
        weights, wanted = list(self.weights), "expected canary weights in percent that rise"
        if weights != sorted(set(weights)):
            raise InvalidInputError(f"the rollout steps are {weights}; {wanted}, for example (10, 50, 100)")
        if self.mode == "ab":
            if not weights or weights[-1] >= 100 or weights[-1] <= 0:
                raise InvalidInputError(
                    f"the steps of an A/B test are {weights}; {wanted}, and end between 0 and 100, for example (50,)"
                )
            if not self.bake_of(len(weights) - 1) and self.max_requests is None:
                raise InvalidInputError("an A/B test needs bake_seconds or max_requests: nothing else would end it")
        elif len(weights) < 2 or weights[-1] != 100:
            raise InvalidInputError(
                f"the rollout steps are {weights}; {wanted}, have at least one step below 100 to compare the versions "
                "on, and end at 100, for example (10, 50, 100)"
            )

    @property
    def weights(self) -> tuple[float, ...]:
        """Canary weight of every step, percent."""
        return tuple(step.weight for step in self.steps)

    def bake_of(self, step: int) -> float:
        """Least seconds in a step."""
        own = self.steps[step].bake_seconds
        return float(self.bake_seconds if own is None else own)

    def min_requests_of(self, step: int) -> int:
        """Least requests per arm in a step."""
        own = self.steps[step].min_requests
        return int(self.min_requests if own is None else own)

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return {**asdict(self), "steps": [step.to_json() for step in self.steps]}

    @classmethod
    def from_json(cls, value: RolloutPolicy | Mapping[str, Any] | None) -> RolloutPolicy:
        """A policy from a dictionary (missing fields take their defaults), an instance or ``None``.

        :raises InvalidInputError: unknown field or value out of range
        """
        if isinstance(value, RolloutPolicy):
            return value
        given = dict(value or {})
        unknown = set(given) - {field.name for field in fields(cls)}
        if unknown:
            raise InvalidInputError(
                f"the rollout policy has unknown fields {sorted(unknown)}; expected {[f.name for f in fields(cls)]}"
            )
        return cls(**given)


__all__ = ["Guardrail", "RolloutPolicy", "Step", "parse_guardrails"]
