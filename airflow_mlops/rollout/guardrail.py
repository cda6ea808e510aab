"""What a canary must not be worse in, and by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from airflow_mlops.exceptions import InvalidInputError

KINDS = ("rate", "latency", "mean", "score", "drift")
RATES = ("errors", "timeouts", "fallbacks")
LOSSES = ("log_loss", "brier")
NAMED = (*RATES, "latency", *LOSSES, "score", "drift")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Guardrail:
    """One property in which the canary must not be worse than stable.

    Shares of requests (``rate``, ``latency``): acceptable is a canary share of at most ``(1 + margin)`` times
    stable's, or of at most ``tolerance`` whatever stable's is. Harm is shown when the ratio exceeds
    ``1 + harm_margin`` and the observed share exceeds ``tolerance``. A ``rate`` is a named count over requests; a
    ``latency`` guardrail looks at the share of requests slower than ``factor`` times stable's ``quantile``.

    Means (``mean``, ``score``): acceptable is a difference below ``margin``, harm one above ``harm_margin``, both in
    the metric's own unit or, when ``relative``, as shares of stable's mean; ``score`` looks at both directions.

    ``drift``: the total variation distance between the arms' distributions of predictions, that is, the largest
    difference in the share of any set of buckets; acceptable below ``margin``, harm above ``harm_margin``.

    :param name: unique among the guardrails of a rollout
    :param kind: ``rate``, ``latency``, ``mean``, ``score`` or ``drift``
    :param metric: name of the count (``rate``), histogram (``latency``, ``drift``) or moments (``mean``, ``score``)
    :param margin: non-inferiority margin, relative for shares, absolute for the others unless ``relative``
    :param harm_margin: how much worse is still not called harm, in the same unit; at most ``margin``
    :param tolerance: share of requests that is acceptable whatever stable's is (shares only)
    :param quantile: quantile of stable's latency (``latency`` only)
    :param factor: how many times slower than that quantile a request counts as slow (``latency`` only)
    :param higher_is_better: the mean is a gain rather than a loss (``mean`` only)
    :param relative: margins are shares of stable's mean (``mean`` and ``score``)
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
    relative: bool = False

    def __post_init__(self) -> None:
        where = f"guardrail {self.name!r}"
        if not self.name or self.kind not in KINDS:
            raise InvalidInputError(f"{where} has kind {self.kind!r}; expected a name and one of {', '.join(KINDS)}")
        if not isinstance(self.metric, str) or not self.metric or (self.kind, self.metric) == ("rate", "requests"):
            raise InvalidInputError(
                f"{where} of kind {self.kind} reads the unknown metric {self.metric!r}; expected the name of a count "
                "beside requests (rate), of a histogram (latency, drift) or of moments (mean, score)"
            )
        for name in ("margin", "harm_margin", "tolerance", "quantile", "factor"):
            if not _finite(getattr(self, name)):
                raise InvalidInputError(f"{where}: {name} is {getattr(self, name)!r}; expected a finite number")
        if self.margin <= 0 or not 0 <= self.harm_margin <= self.margin:
            raise InvalidInputError(
                f"{where}: margin is {self.margin} and harm_margin {self.harm_margin}; "
                "expected 0 <= harm_margin <= margin and margin > 0"
            )
        if (self.kind == "drift" or self.relative) and self.margin >= 1:
            raise InvalidInputError(f"{where}: margin is {self.margin}; expected a share below 1")
        if self.relative and self.kind not in ("mean", "score"):
            raise InvalidInputError(f"{where} of kind {self.kind} cannot be relative; only mean and score can")
        if self.is_share and not 0 <= self.tolerance < 1:
            raise InvalidInputError(f"{where}: tolerance is {self.tolerance}; expected a share of requests, 0 to 1")
        if not 0 < self.quantile < 1 or self.factor < 1:
            raise InvalidInputError(
                f"{where}: quantile is {self.quantile} and factor {self.factor}; expected 0 < quantile < 1, factor >= 1"
            )

    @property
    def is_share(self) -> bool:
        """Whether it judges a share of requests rather than a mean or a distribution."""
        return self.kind in ("rate", "latency")

    @classmethod
    def rate(
        cls, metric: str = "errors", *, margin: float = 0.5, harm_margin: float = 0.25, tolerance: float = 0.002
    ) -> Guardrail:
        """A count over requests, for example ``timeouts``; shares below ``tolerance`` do not matter."""
        return cls(metric, "rate", metric, margin, harm_margin, tolerance)

    @classmethod
    def errors(cls, *, margin: float = 0.5, harm_margin: float = 0.25, tolerance: float = 0.002) -> Guardrail:
        """Failed requests; shares below ``tolerance`` do not matter."""
        return cls.rate("errors", margin=margin, harm_margin=harm_margin, tolerance=tolerance)

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
    def mean(
        cls,
        metric: str,
        *,
        margin: float = 0.05,
        harm_margin: float = 0.0,
        higher_is_better: bool = False,
        relative: bool = False,
    ) -> Guardrail:
        """Mean of any value the arms report, for example what a request earned."""
        return cls(metric, "mean", metric, margin, harm_margin, higher_is_better=higher_is_better, relative=relative)

    @classmethod
    def loss(cls, metric: str = "log_loss", *, margin: float = 0.05, harm_margin: float = 0.0) -> Guardrail:
        """Mean loss of the predictions whose labels have come in."""
        return cls.mean(metric, margin=margin, harm_margin=harm_margin)

    @classmethod
    def score(cls, *, margin: float = 0.1, harm_margin: float | None = None) -> Guardrail:
        """Mean prediction: the arms' mean scores differ by less than ``margin``, either way."""
        return cls("score", "score", "prediction", margin, margin if harm_margin is None else harm_margin)

    @classmethod
    def drift(cls, *, margin: float = 0.1, harm_margin: float | None = None) -> Guardrail:
        """Distribution of predictions: no set of buckets gets a share that differs by more than ``margin``."""
        return cls("drift", "drift", "prediction", margin, margin if harm_margin is None else harm_margin)

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
        given: dict[str, Any] = {"kind": value} if isinstance(value, str) else dict(value)
        kind = str(given.pop("kind", given.get("metric", given.get("name"))))
        try:
            unknown = set(given) - {field.name for field in fields(cls)}
            if unknown:
                raise TypeError(f"unknown fields {', '.join(sorted(unknown))}")
            base = cls._defaults(kind, given.get("metric"))
            if "harm_margin" not in given and "margin" in given:
                two_sided = base.kind in ("score", "drift")
                given["harm_margin"] = given["margin"] if two_sided else min(base.harm_margin, given["margin"])
            if kind == "latency" and "quantile" in given:
                given.setdefault("tolerance", 1 - given["quantile"])
            return cls(**{**base.to_json(), **given})
        except TypeError as error:
            raise InvalidInputError(
                f"{value!r} is not a guardrail: {error}. Expected a name ({', '.join(NAMED)}) or a dictionary with "
                f"kind ({', '.join(KINDS)}), metric and any of {', '.join(field.name for field in fields(cls))}"
            ) from None

    @classmethod
    def _defaults(cls, kind: str, metric: str | None) -> Guardrail:
        if kind == "rate" or kind in RATES:
            return cls.rate(metric or (kind if kind in RATES else "errors"))
        if kind == "mean" or kind in LOSSES:
            return cls.mean(metric or (kind if kind in LOSSES else "log_loss"))
        if kind not in ("latency", "score", "drift"):
            raise TypeError(f"{kind!r} is unknown")
        return {"latency": cls.latency(), "score": cls.score(), "drift": cls.drift()}[kind]


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
