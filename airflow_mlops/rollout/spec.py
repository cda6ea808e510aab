"""What a rollout is: which version against which, under which rules; and what it ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout.judge import Verdict
from airflow_mlops.rollout.policy import Guardrail, RolloutPolicy, parse_guardrails


@dataclass(frozen=True)
class RolloutSpec:
    """What to roll out, against what, and under which rules.

    :param model: registered model
    :param version: challenger's version
    :param uri: its MLflow model directory or ``models:/`` URI
    :param stable_version: champion's version; blank when there is none
    :param stable_uri: its model directory or URI
    :param owner: who rolls out, the same for every attempt of one task
    :param attempt: of the task; a later one takes the rollout over from an earlier one
    :param policy: steps, error rates, deadline
    :param guardrails: what must not get worse
    :param poll_interval: seconds between looks
    :param ttl: seconds without a look after which the target itself goes back to stable
    :param startup_timeout: seconds that a stable version has to serve
    """

    model: str
    version: str
    uri: str
    stable_version: str
    stable_uri: str
    owner: str
    policy: RolloutPolicy = field(default_factory=RolloutPolicy)
    guardrails: tuple[Guardrail, ...] = ()
    poll_interval: float = 5.0
    ttl: float = 60.0
    attempt: int = 1
    startup_timeout: float = 180.0

    def __post_init__(self) -> None:
        for name in ("model", "version", "uri", "owner"):
            if not getattr(self, name):
                raise InvalidInputError(f"{name} of the rollout is empty; expected the challenger's {name}")
        if bool(self.stable_version) != bool(self.stable_uri):
            raise InvalidInputError(
                f"stable_version is {self.stable_version!r} and stable_uri {self.stable_uri!r}; give both, or neither "
                "when there is no champion"
            )
        if not 0 < self.poll_interval <= 3600 or self.ttl < 3 * self.poll_interval:
            raise InvalidInputError(
                f"poll_interval is {self.poll_interval} s and ttl {self.ttl} s; expected 0 < poll_interval and a ttl "
                "of at least three looks, so that one late look does not end the rollout"
            )

    @property
    def rules(self) -> dict[str, Any]:
        """What the judge's state belongs to: under other rules it says nothing."""
        return {"policy": self.policy.to_json(), "guardrails": [guard.to_json() for guard in self.guardrails]}

    @property
    def metrics(self) -> list[str]:
        """Names of the counters that the guardrails read."""
        return sorted({guard.metric for guard in self.guardrails})

    def owns(self, annotation: Mapping[str, Any]) -> bool:
        """Whether what is kept on a target is this rollout, of this or another attempt."""
        return annotation.get("owner") == self.owner and str(annotation.get("version")) == self.version

    def continues(self, annotation: Mapping[str, Any]) -> bool:
        """Whether the evidence in it can be continued."""
        return self.owns(annotation) and bool(annotation.get("judge")) and annotation.get("rules") == self.rules

    def to_json(self) -> dict[str, Any]:
        """Plain Python types."""
        return asdict(self) | self.rules

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RolloutSpec:
        """Inverse of :meth:`to_json`; ``guardrails=None`` means the defaults."""
        guardrails = parse_guardrails(value.get("guardrails"))
        return cls(**{**value, "policy": RolloutPolicy.from_json(value.get("policy")), "guardrails": guardrails})


def result_of(
    spec: RolloutSpec, verdict: Verdict, steps: Sequence[Mapping[str, Any]], previous: str | None, seconds: float
) -> dict[str, Any]:
    """The rollout's small result: verdict, numbers, reasons."""
    return {
        "verdict": verdict.decision,
        "model": spec.model,
        "version": spec.version,
        "previous": previous,
        "compared": verdict.look > 0,
        "requests": verdict.requests,
        "looks": verdict.look,
        "steps": list(steps),
        "guardrails": verdict.guardrails,
        "report": verdict.report,
        "reasons": verdict.reasons,
        "seconds": round(seconds, 2),
    }
