"""What a rollout must show, and how far it may go before it has shown it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from airflow_mlops.exceptions import InvalidInputError

KINDS = ("rate", "latency", "mean", "score")
RATE_METRICS = ("errors",)
MEAN_METRICS = ("log_loss", "brier", "prediction", "latency")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Guardrail:
    """One property in which the canary must not be worse than stable.

    Shares of requests (``rate``, ``latency``): acceptable is a canary share of at most ``(1 + margin)`` times
    stable's, or of at most ``tolerance`` whatever stable's is. Harm is shown when the ratio exceeds
    ``1 + harm_margin`` and the observed share exceeds ``tolerance``. A ``latency`` guardrail looks at the share of
    requests slower than ``factor`` times stable's ``quantile``.

    Means (``mean``, ``score``): acceptable is a difference below ``margin``, harm one above ``harm_margin``, both
    in the metric's own unit; ``score`` looks at both directions.

    :param name: unique among the guardrails of a rollout
    :param kind: ``rate``, ``latency``, ``mean`` or ``score``
    :param metric: counter it reads: ``errors``; ``latency`` (seconds); ``log_loss``, ``brier``, ``prediction``
    :param margin: non-inferiority margin, relative for shares, absolute for means
    :param harm_margin: how much worse is still not called harm, in the same unit; at most ``margin``
    :param tolerance: share of requests that is acceptable whatever stable's is (shares only)
    :param quantile: quantile of stable's latency (``latency`` only)
    :param factor: how many times slower than that quantile a request counts as slow (``latency`` only)
    :param higher_is_better: the mean is a gain rather than a loss (``mean`` only)
    """

    name: str
    kind: str
    metric: str
    margin: float
    harm_margin: float
    tolerance: float = 0.0
    quantile: float = 0.95
    factor: float = 1.5
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        where = f"guardrail {self.name!r}"
        if not self.name or self.kind not in KINDS:
            raise InvalidInputError(f"{where} has kind {self.kind!r}; expected a name and one of {', '.join(KINDS)}")
        known = {"rate": RATE_METRICS, "latency": ("latency",), "mean": MEAN_METRICS, "score": ("prediction",)}
        if self.metric not in known[self.kind]:
            raise InvalidInputError(
                f"{where} of kind {self.kind} reads the unknown metric {self.metric!r}; "
                f"expected one of {', '.join(known[self.kind])}"
            )
        for name in ("margin", "harm_margin", "tolerance", "quantile", "factor"):
            if not _finite(getattr(self, name)):
                raise InvalidInputError(f"{where}: {name} is {getattr(self, name)!r}; expected a finite number")
        if self.margin <= 0 or not 0 <= self.harm_margin <= self.margin:
            raise InvalidInputError(
                f"{where}: margin is {self.margin} and harm_margin {self.harm_margin}; "
                "expected 0 <= harm_margin <= margin and margin > 0"
            )
        if self.is_share and not 0 <= self.tolerance < 1:
            raise InvalidInputError(f"{where}: tolerance is {self.tolerance}; expected a share of requests, 0 to 1")
        if not 0 < self.quantile < 1 or self.factor < 1:
            raise InvalidInputError(
                f"{where}: quantile is {self.quantile} and factor {self.factor}; expected 0 < quantile < 1, factor >= 1"
            )

    @property
    def is_share(self) -> bool:
        """Whether it judges a share of requests rather than a mean."""
        return self.kind in ("rate", "latency")

    @classmethod
    def errors(cls, *, margin: float = 0.5, harm_margin: float = 0.25, tolerance: float = 0.002) -> Guardrail:
        """Failed requests; shares below ``tolerance`` do not matter."""
        return cls("errors", "rate", "errors", margin, harm_margin, tolerance)

    @classmethod
    def latency(
        cls,
        *,
        quantile: float = 0.95,
        factor: float = 1.5,
        margin: float = 0.5,
        harm_margin: float = 0.25,
        tolerance: float | None = None,
    ) -> Guardrail:
        """The canary's ``quantile`` of latency is at most ``factor`` times stable's."""
        share = 1 - quantile if tolerance is None else tolerance
        return cls("latency", "latency", "latency", margin, harm_margin, share, quantile, factor)

    @classmethod
    def loss(cls, metric: str = "log_loss", *, margin: float = 0.05, harm_margin: float = 0.0) -> Guardrail:
        """Mean loss of the predictions whose labels have come in."""
        return cls(metric, "mean", metric, margin, harm_margin)

    @classmethod
    def score(cls, *, margin: float = 0.1, harm_margin: float | None = None) -> Guardrail:
        """Mean prediction: the arms' mean scores differ by less than ``margin``, either way."""
        return cls("score", "score", "prediction", margin, margin if harm_margin is None else harm_margin)

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Guardrail | Mapping[str, Any] | str) -> Guardrail:
        """A guardrail from a dictionary, or from the name of one with defaults: errors, latency, log_loss, ...

        :raises InvalidInputError: unknown name, unknown field, or a value out of range
        """
        if isinstance(value, Guardrail):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        given = dict(value)
        kind = str(given.pop("kind", given.get("metric", given.get("name"))))
        short = {"errors": "errors", "rate": "errors", "latency": "latency", "score": "score"}
        unknown = set(given) - {field.name for field in fields(cls)}
        try:
            if unknown:
                raise TypeError(f"unknown fields {', '.join(sorted(unknown))}")
            metric = str(given.get("metric", "log_loss" if kind == "mean" else kind))
            base = getattr(cls, short[kind])() if kind in short else cls.loss(metric)
            if "harm_margin" not in given and "margin" in given:
                given["harm_margin"] = given["margin"] if kind == "score" else min(base.harm_margin, given["margin"])
            if kind == "latency" and "quantile" in given:
                given.setdefault("tolerance", 1 - given["quantile"])
            return cls(**{**base.to_json(), **given})
        except TypeError as error:
            raise InvalidInputError(
                f"{value!r} is not a guardrail: {error}. Expected a name (errors, latency, log_loss, brier, score) or "
                f"a dictionary with {', '.join(field.name for field in fields(cls))}"
            ) from None


DEFAULT_GUARDRAILS = (Guardrail.errors(), Guardrail.latency())


def parse_guardrails(values: Sequence[Any] | None) -> tuple[Guardrail, ...]:
    """Guardrails from dictionaries, names or instances; the defaults (errors, latency) for ``None``.

    :raises InvalidInputError: none at all, or two of one name
    """
    guardrails = DEFAULT_GUARDRAILS if values is None else tuple(Guardrail.from_json(value) for value in values)
    names = [guardrail.name for guardrail in guardrails]
    if not names or len(set(names)) < len(names):
        raise InvalidInputError(f"guardrails are {names}; expected at least one, each with a name of its own")
    return guardrails


@dataclass(frozen=True)
class RolloutPolicy:
    """How traffic moves and how sure the judge must be.

    A step is left upwards when both arms have ``min_requests`` in it, ``bake_seconds`` have passed, every guardrail
    has data of both arms and none shows harm: it bounds how many users a bad version reaches. Only when every
    guardrail has *shown* non-inferiority is the step to 100 % taken, where no stable arm is left to compare with.

    :param steps: canary weights in percent, rising, the last one 100, at least one between
    :param min_requests: requests per arm and step
    :param alpha: probability of ever rolling back a version that is not worse, over all guardrails and looks
    :param beta: probability of ever promoting a version that is worse than a guardrail's margin
    :param deadline_seconds: HOLD becomes ROLLBACK after this time
    :param bake_seconds: least time per step; when above 0 the version is also watched at 100 % for so long
    :param srm_alpha: error rate of the sample-ratio check
    """

    steps: tuple[float, ...] = (10, 50, 100)
    min_requests: int = 100
    alpha: float = 0.05
    beta: float = 0.05
    deadline_seconds: float = 3600.0
    bake_seconds: float = 0.0
    srm_alpha: float = 0.001

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps) if isinstance(self.steps, list | tuple) else (self.steps,))
        steps = self.steps
        if (
            not all(_finite(step) for step in steps)
            or len(steps) < 2
            or list(steps) != sorted(set(steps))
            or not (steps[0] > 0 and steps[-1] == 100)
        ):
            raise InvalidInputError(
                f"the rollout steps are {list(steps)}; expected canary weights in percent that rise, start above 0, "
                "have at least one step below 100 to compare the versions on, and end at 100, for example (10, 50, 100)"
            )
        for name in ("alpha", "beta", "srm_alpha"):
            if not _finite(getattr(self, name)) or not 0 < getattr(self, name) < 0.5:
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; expected an error rate between 0 and 0.5")
        if not _finite(self.min_requests) or self.min_requests < 1:
            raise InvalidInputError(f"min_requests is {self.min_requests!r}; expected at least 1")
        for name, least in (("deadline_seconds", 1), ("bake_seconds", 0)):
            if not _finite(getattr(self, name)) or getattr(self, name) < least:
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; expected seconds, at least {least}")
        if self.bake_seconds * len(steps) >= self.deadline_seconds:
            raise InvalidInputError(
                f"bake_seconds {self.bake_seconds} over {len(steps)} steps does not fit in deadline_seconds "
                f"{self.deadline_seconds}: no version could ever be promoted"
            )

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return {**asdict(self), "steps": list(self.steps)}

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
