"""What a hyper-parameter search looks for: the ``config`` of trainer ``"tune"``, checked without Ray or Optuna."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from airflow_mlops.exceptions import InvalidInputError

#: Trainers that a search can run its trials with.
SEARCHED = ("xgboost", "lightgbm", "torch", "jax", "data_parallel")


@dataclass(frozen=True)
class Search:
    """A search with Ray Tune and Optuna's tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011).

    A trial is a Ray Train run of ``train_fn`` with ``config`` and one sample of ``space``; its value is ``metric`` as
    last reported.

    :param space: by parameter a list of choices, or ``{"type": "float" | "int", "low", "high"}`` with optional
        ``"log"`` (true for a logarithmic scale) or ``"step"``; a dot in the name leads into a nested dict
    :param metric: name of the reported metric
    :param trainer: which Ray Train trainer runs a trial, one of :data:`SEARCHED`
    :param mode: ``"min"`` or ``"max"``
    :param num_samples: number of trials over all attempts
    :param max_concurrent: trials at a time; None: as many as fit into Ray when the search starts
    :param config: what all trials share
    :param seed: of the sampler; None: another one each time
    """

    space: Mapping[str, Any]
    metric: str
    trainer: str
    mode: str = "min"
    num_samples: int = 10
    max_concurrent: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Search:
        """The search that the spec's ``config`` describes, checked.

        :raises InvalidInputError: names the entry, what it must be and what to change
        """
        known = [entry.name for entry in fields(cls)]
        if unknown := sorted(set(value) - set(known)):
            raise InvalidInputError(
                f'trainer "tune" does not know config[{unknown[0]!r}]; it has {", ".join(known)}. What the training '
                'loop is to get belongs into config["config"].'
            )
        for name in ("space", "metric", "trainer"):
            if not value.get(name):
                raise InvalidInputError(f'config[{name!r}] is missing; trainer "tune" needs space, metric and trainer')
        search = cls(**value)
        search._validate()
        return search

    def _validate(self) -> None:
        if self.trainer not in SEARCHED:
            raise InvalidInputError(f"config['trainer'] is {self.trainer!r}; expected one of {', '.join(SEARCHED)}")
        if self.mode not in ("min", "max"):
            raise InvalidInputError(f"config['mode'] is {self.mode!r}; expected 'min' or 'max'")
        for name, number in (("num_samples", self.num_samples), ("max_concurrent", self.max_concurrent)):
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise InvalidInputError(f"config[{name!r}] is {number!r}; expected a whole number of at least 1")
        if not isinstance(self.space, Mapping) or not isinstance(self.config, Mapping):
            raise InvalidInputError("config['space'] and config['config'] must be dicts")
        for name, domain in self.space.items():
            _validate_domain(name, domain)
        self.trial_config(dict.fromkeys(self.space))

    def trial_config(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What the training loop gets: ``config`` with ``params`` in their places.

        :raises InvalidInputError: a parameter's name leads through something that is not a dict
        """
        merged = copy.deepcopy(dict(self.config))
        for name, value in params.items():
            *path, last = name.split(".")
            at: Any = merged
            for key in path:
                at = at.setdefault(key, {})
                if not isinstance(at, dict):
                    raise InvalidInputError(f"config['space'][{name!r}]: config['config'] has no dict at {key!r}")
            at[last] = value
        return merged

    def better(self, one: float, other: float) -> bool:
        """Whether value ``one`` is better than ``other``."""
        return one < other if self.mode == "min" else one > other


def _validate_domain(name: str, domain: Any) -> None:
    where = f"config['space'][{name!r}]"
    if "/" in name:
        raise InvalidInputError(f'{where}: a name cannot hold "/"; a dot leads into a nested dict')
    if isinstance(domain, list):
        if not domain or any(not isinstance(choice, str | int | float | bool | None) for choice in domain):
            raise InvalidInputError(f"{where} is {domain!r}; expected a list of at least one number, text or null")
        return
    if not isinstance(domain, Mapping) or domain.get("type") not in ("float", "int"):
        raise InvalidInputError(
            f"{where} is {domain!r}; expected a list of choices, or "
            '{"type": "float" or "int", "low": ..., "high": ...}'
        )
    if unknown := sorted(set(domain) - {"type", "low", "high", "log", "step"}):
        raise InvalidInputError(f"{where} has an unknown entry {unknown[0]!r}; expected type, low, high, log or step")
    kinds: Any = int if domain["type"] == "int" else int | float
    for key in ("low", "high", "step"):
        value = domain.get(key)
        if value is None and key == "step":
            continue
        if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
            raise InvalidInputError(f"{where}[{key!r}] is {value!r}; expected a number of type {domain['type']}")
    if not domain["low"] <= domain["high"]:
        raise InvalidInputError(f"{where}: low {domain['low']} is above high {domain['high']}")
    if domain.get("step") is not None and not domain["step"] > 0:
        raise InvalidInputError(f"{where}['step'] is {domain['step']}; expected more than 0")
    if domain.get("log") and (domain["low"] <= 0 or domain.get("step") is not None):
        raise InvalidInputError(f"{where}: a logarithmic scale needs low > 0 and no step")
