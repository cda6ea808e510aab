"""The parts of a gate's policy that are mappings: what they may say. Nothing here needs a numerical library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from airflow_mlops.exceptions import InvalidInputError

REQUIRE = ("estimate", "shown")
RULE_KEYS = ("column", "metrics", "groups", "min_rows", "require")


@dataclass(frozen=True)
class FairnessRule:
    """Limits on how differently the groups of one column are treated.

    :param column: of the data, which need not be a feature of the model
    :param metrics: name of a metric of ``fairlearn.metrics`` to its limit: ``..._difference`` at most, ``..._ratio``
        at least
    :param groups: the values to compare; empty for all that appear
    :param min_rows: a group with fewer rows is not enough to tell, and does not pass
    :param require: ``"estimate"``: the metric found must be within the limit; ``"shown"``: its whole interval must,
        so that a model beyond the limit passes with probability of about ``alpha`` at most
    """

    column: str
    metrics: Mapping[str, float]
    groups: tuple[str, ...] = ()
    min_rows: int = 100
    require: str = "estimate"


def fairness_rules(value: Any) -> tuple[FairnessRule, ...]:
    """The rules in a policy's ``fairness``: a mapping, or a list of them; numbers may be strings.

    :raises InvalidInputError: something no rule can be made of
    """
    if not value:
        return ()
    given = [value] if isinstance(value, Mapping) else value
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(r, Mapping) for r in given):
        raise InvalidInputError(
            f"the gate's fairness is {value!r:.200}; expected a mapping with {RULE_KEYS}, or a list"
        )
    return tuple(_rule(rule) for rule in given)


def _rule(value: Mapping[str, Any]) -> FairnessRule:
    if unknown := set(value) - set(RULE_KEYS):
        raise InvalidInputError(f"the gate's fairness has no {sorted(unknown)}; it has {RULE_KEYS}")
    metrics = value.get("metrics")
    if not value.get("column") or not isinstance(metrics, Mapping) or not metrics:
        raise InvalidInputError(
            "the gate's fairness needs a column and metrics with their limits, as in "
            "{'column': 'sex', 'metrics': {'equalized_odds_difference': 0.1}}"
        )
    try:
        limits = {str(name): float(limit) for name, limit in metrics.items()}
        least = int(value.get("min_rows", FairnessRule.min_rows))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"the gate's fairness for {value['column']!r}: {error}") from error
    for name, limit in limits.items():
        if not name.endswith(("_difference", "_ratio")):
            raise InvalidInputError(
                f"the gate's fairness names {name!r}; expected a metric of fairlearn that ends in _difference or "
                "_ratio, such as demographic_parity_difference"
            )
        if not (math.isfinite(limit) and 0 <= limit <= 1):
            raise InvalidInputError(f"the gate's fairness limits {name} by {limit}; expected a number from 0 to 1")
    require = str(value.get("require", "estimate"))
    if require not in REQUIRE:
        raise InvalidInputError(f"the gate's fairness has require={require!r}; expected one of {REQUIRE}")
    groups = value.get("groups") or ()
    if isinstance(groups, str):
        raise InvalidInputError(f"the gate's fairness has groups={groups!r}; expected a list of values")
    if least < 1:
        raise InvalidInputError(f"the gate's fairness has min_rows={least}; expected at least 1")
    return FairnessRule(str(value["column"]), limits, tuple(str(group) for group in groups), least, require)
