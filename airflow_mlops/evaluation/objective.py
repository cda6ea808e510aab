"""What a gate compares the arms by: a metric of its own, or a function the user names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from airflow_mlops.evaluation.metrics import Floats, auc, row_loss
from airflow_mlops.evaluation.policy import LOSSES, GatePolicy, is_function
from airflow_mlops.exceptions import InvalidInputError


@dataclass(frozen=True)
class Objective:
    """A metric with its direction.

    :param name: as the policy names it
    :param value: ``value(label, probability)``, in units of the metric
    :param sign: 1 when more is better, else -1
    """

    name: str
    value: Callable[[Any, Any], float]
    sign: int

    def of(self, label: Any, probability: Floats, whose: str) -> float:
        """The metric of one arm.

        :raises InvalidInputError: the metric cannot be computed there, or is no finite number
        """
        try:
            found = self.value(label, probability)
            number = math.nan if found is None else float(found)
        except InvalidInputError:
            raise
        except Exception as error:
            raise InvalidInputError(f"the metric {self.name} fails on the {whose}: {error}") from error
        if not math.isfinite(number):
            raise InvalidInputError(
                f"the metric {self.name} of the {whose} is {found!r}; expected a finite number, or nothing can be "
                "compared. Are both classes present?"
            )
        return number

    def gain(self, label: Any, champion: Floats, challenger: Floats) -> float:
        """The challenger's advantage on these rows; NaN where the metric does not exist, as for a single class."""
        values = []
        for probability in (champion, challenger):
            try:
                found = self.value(label, probability)
            except Exception:  # a resample may lack what the function needs; the caller counts these
                return math.nan
            values.append(math.nan if found is None else float(found))
        return self.sign * (values[1] - values[0])


def objective(name: str, policy: GatePolicy) -> Objective:
    """The metric ``name``, with the threshold and the direction of ``policy``.

    :raises InvalidInputError: a function that does not exist
    """
    if name == "auc":
        return Objective(name, auc, 1)  # type: ignore[arg-type]
    if name == "accuracy":
        return Objective(name, lambda y, p: 1 - float(row_loss(name, y, p, policy.threshold).mean()), 1)
    if name in LOSSES:
        return Objective(name, lambda y, p: float(row_loss(name, y, p).mean()), -1)
    return Objective(name, _function(name), 1 if policy.greater_is_better else -1)


def further_metrics(policy: GatePolicy, label: Any, arms: Mapping[str, Floats | None]) -> dict[str, dict[str, float]]:
    """By arm the metrics that the policy names beyond those of :func:`airflow_mlops.evaluation.score`."""
    names = dict.fromkeys([policy.metric, *policy.floors, *policy.ceilings])
    wanted = [objective(name, policy) for name in names if name == "accuracy" or is_function(name)]
    return {
        arm: {metric.name: metric.of(label, probability, arm) for metric in wanted}
        for arm, probability in arms.items()
        if probability is not None and len(np.asarray(label))
    }


def _function(name: str) -> Callable[[Any, Any], float]:
    module, _, attribute = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInputError(
            f"the metric {name!r} cannot be imported: {error}. Give package.module:function, importable in the worker, "
            "that takes (label, probability) and returns a number."
        ) from error
    if not callable(found):
        raise InvalidInputError(f"the metric {name!r} is a {type(found).__name__}; expected a function")
    return found
