"""What each month brought, read from the ledger that the Dag's last task writes.

``{project}/ledger/YYYY-MM.json`` holds the XComs of the month's run; a part that did not run is null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow_mlops import storage


@dataclass(frozen=True)
class Score:
    """One model's quality on one month.

    :param version: of the registered model
    :param auc: area under the ROC curve
    :param log_loss: mean, in nats
    """

    version: str | None
    auc: float | None
    log_loss: float | None


@dataclass(frozen=True)
class MonthSummary:
    """One month of the loop, ready to be shown.

    :param month: ``YYYY-MM``
    :param verdict: of the drift sensor; ``no_champion`` when there was nothing to compare with
    :param columns: the columns that drifted most
    :param retrained: whether a challenger was trained
    :param promoted: whether the champion changed
    :param champion: score of the version that served the month; None in the first month
    :param frozen: score of the model that was never retrained
    :param base_rate: share of positive labels in the month
    :param gate: ``passed``, ``lost`` or ``-``
    :param canary: the rollout's verdict, lower case, or ``-``
    :param cpu_seconds: of the training
    :param gpu_seconds: of the training
    :param champion_after: version that serves after the month
    :param ledger: everything on record
    """

    month: str
    verdict: str
    columns: tuple[str, ...]
    retrained: bool
    promoted: bool
    champion: Score | None
    frozen: Score | None
    base_rate: float | None
    gate: str
    canary: str
    cpu_seconds: float | None
    gpu_seconds: float | None
    champion_after: str | None
    ledger: Mapping[str, Any]

    @property
    def gain(self) -> float | None:
        """Log loss of the frozen model less the champion's; positive when the champion is better."""
        if self.champion is None or self.frozen is None:
            return None
        if self.champion.log_loss is None or self.frozen.log_loss is None:
            return None
        return self.frozen.log_loss - self.champion.log_loss


def column_name(column: Any) -> str:
    """The name of a drifted column, given as its name or as a record with one."""
    return str(column.get("column") or column.get("name")) if isinstance(column, Mapping) else str(column)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _score(models: Mapping[str, Any], name: str) -> Score | None:
    model = models.get(name)
    return Score(_text(model.get("version")), model.get("auc"), model.get("log_loss")) if model else None


def summarise(ledger: Mapping[str, Any]) -> MonthSummary:
    """One ledger entry as a :class:`MonthSummary`."""
    drift, scored = ledger.get("drift") or {}, ledger.get("score") or {}
    training, gate, canary = ledger.get("training") or {}, ledger.get("gate") or {}, ledger.get("canary") or {}
    models = scored.get("models") or {}
    rates = [model.get("late_rate", model.get("base_rate")) for model in models.values() if isinstance(model, Mapping)]
    before, after = _text(ledger.get("champion_before")), _text(ledger.get("champion_after"))
    return MonthSummary(
        month=ledger["month"],
        verdict=str(drift.get("verdict") or "no_champion"),
        columns=tuple(column_name(column) for column in drift.get("columns") or ()),
        retrained=bool(training),
        promoted=after is not None and after != before,
        champion=_score(models, "champion"),
        frozen=_score(models, "frozen"),
        base_rate=next((rate for rate in [scored.get("base_rate"), *rates] if rate is not None), None),
        gate=("passed" if gate.get("passed") else "lost") if gate else "-",
        canary=str(canary.get("verdict") or "-").lower(),
        cpu_seconds=training.get("cpu_seconds"),
        gpu_seconds=training.get("gpu_seconds"),
        champion_after=after,
        ledger=ledger,
    )


def read(project: Path, months: Sequence[str]) -> list[MonthSummary]:
    """The months' summaries in order; a month without a ledger entry is left out."""
    paths = [project / "ledger" / f"{month}.json" for month in months]
    return [summarise(storage.read_json(str(path))) for path in paths if path.exists()]


def card_of(months: Sequence[MonthSummary]) -> str | None:
    """Where the model card of the last champion that was promoted lies; None where there is none."""
    cards = ((month.ledger.get("papers") or {}).get("card_uri") for month in reversed(months) if month.promoted)
    return next((str(card) for card in cards if card), None)


def explain(months: Sequence[MonthSummary], index: int) -> str:
    """Why the champion was or was not better than the frozen model in ``months[index]``, from what is on record."""
    month = months[index]
    if month.champion is None:
        return "There was no champion yet: this month's run trained the first one, which is also the frozen model."
    if month.gain is None:
        return "The month could not be scored for both models, so they are not compared."
    assert month.frozen is not None
    if month.champion.version is not None and month.champion.version == month.frozen.version:
        return (
            f"The champion was still the frozen model itself (version {month.frozen.version}), so both score the "
            "same: a replacement can only serve the months after the one it was trained on."
        )
    size = f"{abs(month.gain):.4f} in log loss"
    if month.gain > 0:
        return f"The champion, version {month.champion.version}, was better than the frozen model by {size}."
    return f"The champion, version {month.champion.version}, was worse than the frozen model by {size}. " + " ".join(
        _excuses(months, index)
    )


def _excuses(months: Sequence[MonthSummary], index: int) -> list[str]:
    month = months[index]
    assert month.champion is not None
    found = []
    origin = next(
        (m for m in reversed(months[:index]) if m.promoted and m.champion_after == month.champion.version), None
    )
    if origin is not None:
        found.append(f"It was promoted after {origin.month}, on the evidence of the last days of that month.")
        if origin.base_rate is not None and month.base_rate is not None:
            found.append(
                f"The late rate then moved from {origin.base_rate:.3f} to {month.base_rate:.3f}, after it was trained."
            )
    if month.verdict == "harm":
        found.append("The drift sensor called it harm, and a challenger was trained.")
    elif month.verdict != "no_champion":
        found.append(
            f"The sensor said {month.verdict}: the loss was within what the champion's own reference allows, so the "
            "difference is no reason to retrain."
        )
    return found
