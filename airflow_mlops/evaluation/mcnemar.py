"""Accuracy of two classifiers on the same rows: only the rows on which just one of them is right tell them apart."""

from __future__ import annotations

import math
from typing import Any

from scipy import optimize, stats

from airflow_mlops.evaluation.metrics import Floats, row_loss
from airflow_mlops.evaluation.paired import Gain, NonparametricGain, loss_gain


def accuracy_gain(
    label: Any,
    champion: Floats,
    challenger: Floats,
    clusters: Any = None,
    alpha: float = 0.05,
    threshold: float = 0.5,
) -> Gain:
    """The gain in accuracy at ``threshold``.

    Without clusters the exact McNemar test (McNemar, Psychometrika 1947), conditional on the discordant rows, whose
    error rate cannot exceed the stated one; against a margin the score test of Tango, Statistics in Medicine 1998,
    whose inversion is the interval. With clusters the discordance is summed by cluster, with t on clusters - 1 degrees
    (the moment test of Durkalski et al., Statistics in Medicine 2003, with the t distribution for few clusters).
    """
    if clusters is not None:
        return loss_gain("accuracy", label, champion, challenger, clusters, alpha, threshold)
    difference = row_loss("accuracy", label, champion, threshold) - row_loss("accuracy", label, challenger, threshold)
    wins, losses, rows = int((difference > 0).sum()), int((difference < 0).sum()), len(difference)
    mean = (wins - losses) / rows
    error = math.sqrt(max(wins + losses - rows * mean**2, 0.0)) / rows
    return NonparametricGain(
        metric="accuracy",
        method=f"exact McNemar, {wins} rows won and {losses} lost",
        estimate=mean,
        standard_error=error,
        degrees=rows - 1,
        interval=tango_interval(wins, losses, rows, alpha),
        confidence=1 - 2 * alpha,
        test=lambda bound: mcnemar(wins, losses) if bound == 0 else tango(wins, losses, rows, bound),
    )


def mcnemar(wins: int, losses: int) -> float:
    """One-sided exact p-value that winning a discordant row has probability 1/2 at most; 1 when there is none."""
    return float(stats.binom.sf(wins - 1, wins + losses, 0.5)) if wins + losses else 1.0


def tango(wins: int, losses: int, rows: int, bound: float) -> float:
    """One-sided p-value that the difference of two paired proportions is at most ``bound``, by the score test."""
    return float(stats.norm.sf(_score(wins, losses, rows, bound)))


def tango_interval(wins: int, losses: int, rows: int, alpha: float) -> tuple[float, float]:
    """The differences that neither one-sided score test at ``alpha`` rejects."""
    z = float(stats.norm.isf(alpha))
    mean = (wins - losses) / rows
    low, high = -1 + 1e-9, 1 - 1e-9
    # The score falls in the bound, from above z to below -z, unless all rows are discordant one way.
    lower = optimize.brentq(lambda d: _score(wins, losses, rows, d) - z, low, mean) if wins - losses > -rows else -1.0
    upper = optimize.brentq(lambda d: _score(wins, losses, rows, d) + z, mean, high) if wins - losses < rows else 1.0
    return float(lower), float(upper)


def _score(wins: int, losses: int, rows: int, bound: float) -> float:
    distance = wins - losses - rows * bound
    if distance == 0:
        return 0.0
    if bound < 0:
        return -_score(losses, wins, rows, -bound)
    # The likeliest chance of losing a row, given that the chance of winning one is greater by the bound.
    b = wins * (1 + bound) + losses * (1 - bound) - 2 * rows * bound
    chance = (b + math.sqrt(max(b * b + 8 * rows * losses * bound * (1 - bound), 0.0))) / (4 * rows)
    variance = rows * (2 * max(chance, 0.0) + bound - bound**2)
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)
