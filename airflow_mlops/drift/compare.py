"""The verdict on drift between two profiles.

A column has drifted when its effect is at least ``min_effect`` *and* its p-value survives the control of the false
discovery rate over all columns (:mod:`airflow_mlops.drift.discoveries`). The first keeps harmless changes of huge
windows silent, the second keeps small windows from crying wolf.

The p-values take rows for independent. Where rows hang together (the flights of a day share its weather) they are too
small, and ``min_effect`` alone keeps a chance difference of few days from being called drift.

Four kinds of finding are judged apart, each by fields of its own in :class:`DriftPolicy`: drift of the ``data``, drift
of the ``prediction``, breaks of ``quality``, and what the ``calendar`` explains, which is shown and never counts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from airflow_mlops.drift import distances
from airflow_mlops.drift.column import Column
from airflow_mlops.drift.discoveries import adjust
from airflow_mlops.drift.limits import DriftPolicy
from airflow_mlops.drift.profile import Profile
from airflow_mlops.drift.quality import find_break, lost
from airflow_mlops.drift.report import ColumnDrift, DriftReport
from airflow_mlops.exceptions import DataError, InvalidInputError

__all__ = ["ColumnDrift", "DriftPolicy", "DriftReport", "adjust", "compare"]


def compare(
    reference: Profile, current: Profile, policy: DriftPolicy | None = None, *, season: Profile | None = None
) -> DriftReport:
    """Whether ``current`` has drifted from ``reference``.

    :param reference: profile of the data the model was trained on
    :param current: profile of the window to judge
    :param policy: what counts as drift
    :param season: profile of the same season in another year: a column that has drifted from the reference and is as
        in that season, up to the least effect that counts, is ``calendar``. A drift that happens to lead where the
        season was is taken for the season too.
    :raises DataError: the two have no column in common
    :raises InvalidInputError: the policy is out of range, or names a column that neither profile has
    """
    policy = policy or DriftPolicy()
    policy.check()
    _check_names(reference, current, policy)
    common = [name for name in reference.columns if name in current.columns]
    if not common:
        raise DataError(
            f"no column in common: the reference has {', '.join(reference.columns)}, the current data "
            f"{', '.join(current.columns)}. Compare windows of the same dataset."
        )
    gone = "missing: the current data lack this column"
    found = [
        ColumnDrift(name, "broken", reason=gone, kind="quality") for name in reference.columns if name not in common
    ]
    found += [_judge_column(name, reference.columns[name], current.columns[name], policy) for name in common]
    found = _control_discoveries(_weigh(found, policy), policy)
    if season is not None:
        found = [_in_season(column, season, reference, current, policy) for column in found]
    found.sort(key=lambda column: (_ORDER.index(column.status), -(column.effect or 0.0), column.name))
    new = [name for name in current.columns if name not in reference.columns]
    verdict, kinds, reasons = _judge_dataset(found, new, reference, current, policy)
    breaks = {name: "new: the reference lacks this column" for name in new}
    return DriftReport(
        verdict,
        tuple(reasons),
        tuple(found),
        {column.name: column.reason for column in found if column.status == "broken"} | breaks,
        (reference.rows, current.rows),
        (reference.digest, current.digest),
        policy,
        kinds,
    )


_ORDER = ("broken", "drift", "calendar", "uncounted", "not_enough_data", "stable")
# Fields of a policy that are of use for columns of one kind only.
_KIND_OF = {"ranges": "numeric", "max_age": "time"}


def _check_names(reference: Profile, current: Profile, policy: DriftPolicy) -> None:
    """:raises InvalidInputError: the policy names columns that are not there, or asks what they cannot answer"""
    columns = current.columns | reference.columns
    for name, named in policy.named().items():
        if unknown := sorted(named - set(columns)):
            raise InvalidInputError(f"{name} names {', '.join(unknown)}, which neither profile has; correct the names")
    for name, kind in _KIND_OF.items():
        for column in sorted(policy.named()[name]):
            if columns[column].kind not in (kind, "empty"):
                raise InvalidInputError(f"{name} names {column}, which is {columns[column].kind}; expected {kind}")
    for column, method in policy.method.items():
        if (kind := columns[column].kind) != "empty" and method not in distances.METHODS.get(kind, ()):
            known = " or ".join(distances.METHODS.get(kind, ())) or "none: such a column is not compared"
            raise InvalidInputError(f"method of {column} is {method}, but the column is {kind}; expected {known}")


def _judge_column(name: str, reference: Column, current: Column, policy: DriftPolicy) -> ColumnDrift:
    """The distance of one column, or why there is none; status ``stable`` until the p-values are adjusted."""
    base: dict[str, Any] = {"missing": (lost(reference), lost(current)), "kind": _kind(name, policy)}
    if broken := find_break(name, reference, current, policy):
        return ColumnDrift(name, "broken", reason=broken, **(base | {"kind": "quality"}))
    fewer = min(reference.count, current.count)
    if fewer < policy.min_rows:
        reason = f"{fewer} values, at least {policy.min_rows} needed"
        return ColumnDrift(name, "not_enough_data", reason=reason, **base)
    if reference.kind == "time":
        spans = [f"{column.minimum} to {column.maximum}" for column in (reference, current)]
        reason = f"times, not compared: from {spans[0]} in the reference, {spans[1]} now"
        return ColumnDrift(name, "stable", reason=reason, **base)
    numeric = reference.kind == "numeric"
    distance = distances.between(reference, current, policy.method.get(name))
    base |= {
        "method": distance.method,
        "distance": distance.raw,
        "effect": distance.effect,
        "psi": distance.psi,
        "p_value": distance.p_value,
        "reference": reference.mean if numeric else reference.categories.distinct(),
        "current": current.mean if numeric else current.categories.distinct(),
    }
    if distance.unseen > policy.max_unseen and name not in policy.calendar_columns:
        reason = f"unseen: at least {distance.unseen:.1%} of the values are in categories that the reference never had"
        return ColumnDrift(name, "drift", reason=reason, **base)
    return ColumnDrift(name, "stable", **base)


def _kind(name: str, policy: DriftPolicy) -> str:
    if name in policy.calendar_columns:
        return "calendar"
    return "prediction" if name in policy.prediction_columns else "data"


def _weigh(found: list[ColumnDrift], policy: DriftPolicy) -> list[ColumnDrift]:
    """Weights with mean 1 over the columns of a kind that were compared, so that the bound on false ones stays."""
    if not policy.weights:
        return found
    above = [weight for weight in policy.weights.values() if weight > 0]
    usual = sum(above) / len(above) if above else 1.0
    raw = {column.name: policy.weights.get(column.name, usual) for column in found}
    means = {}
    for kind in _FDR:
        heavy = [raw[c.name] for c in found if c.kind == kind and c.p_value is not None and raw[c.name] > 0]
        means[kind] = sum(heavy) / len(heavy) if heavy else usual
    return [replace(column, weight=raw[column.name] / means.get(column.kind, usual)) for column in found]


# Kind to the field of the policy that bounds its false discoveries. Each is a family of its own, so that the many
# discoveries among calendar columns do not loosen the threshold for the others.
_FDR = {"data": "fdr", "prediction": "prediction_fdr", "calendar": "fdr"}


def _control_discoveries(found: list[ColumnDrift], policy: DriftPolicy) -> list[ColumnDrift]:
    """Adjusted p-values by family, and by them which columns have drifted."""
    adjusted: dict[str, float] = {}
    families: dict[tuple[str, bool], list[ColumnDrift]] = {}
    for column in found:
        if column.p_value is not None:
            families.setdefault((column.kind, column.weight > 0), []).append(column)
    for (_, counts), family in families.items():
        p_values = [column.p_value for column in family if column.p_value is not None]
        values = adjust(p_values, [column.weight for column in family] if counts else None, policy.control)
        adjusted |= {column.name: value for column, value in zip(family, values)}
    found = [
        _with_status(column, adjusted[column.name], policy) if column.name in adjusted else column for column in found
    ]
    return [replace(c, status="uncounted") if c.status == "drift" and c.weight == 0 else c for c in found]


def _with_status(column: ColumnDrift, adjusted: float, policy: DriftPolicy) -> ColumnDrift:
    status, reason = column.status, column.reason
    least = policy.least_effect(column.name, _METHOD[str(column.method)])
    if status == "stable" and column.effect is not None and adjusted <= getattr(policy, _FDR[column.kind]):
        if column.effect >= least:
            status = "calendar" if column.kind == "calendar" else "drift"
            p = "below 1e-16" if adjusted < 1e-16 else f"{adjusted:.2g}"
            reason = f"{column.method} {column.effect:.3f} (at least {least:g}), adjusted p {p}"
        else:
            reason = f"a real change, too small to matter: {column.effect:.3f} below {least:g}"
    return replace(column, status=status, reason=reason, adjusted_p=adjusted)


# A report's name of a method to a policy's.
_METHOD = {"wasserstein": "wasserstein", "jensenshannon": "js", "psi": "psi", "ks": "ks"}


def _in_season(
    column: ColumnDrift, season: Profile, reference: Profile, current: Profile, policy: DriftPolicy
) -> ColumnDrift:
    """A drifted column again, against the same season of another year."""
    if column.status != "drift" or column.kind != "data":
        return column
    before, now = season.columns.get(column.name), current.columns[column.name]
    if before is None or before.kind != now.kind or before.count < policy.min_rows:
        return replace(column, reason=f"{column.reason}; the season's profile cannot tell, it has too little of it")
    distance = distances.between(before, now, policy.method.get(column.name), reference.columns[column.name].std)
    least = policy.least_effect(column.name, _METHOD[distance.method])
    fits = distance.effect < least and distance.unseen <= policy.max_unseen
    if not fits:
        reason = f"{column.reason}; {distance.effect:.3f} from the same season of another year too"
        return replace(column, reason=reason, season_effect=distance.effect)
    reason = (
        f"as in the same season of another year: {distance.effect:.3f} from it, {column.effect:.3f} from the reference"
    )
    return replace(column, status="calendar", kind="calendar", reason=reason, season_effect=distance.effect)


def _judge_dataset(
    found: list[ColumnDrift], new: list[str], reference: Profile, current: Profile, policy: DriftPolicy
) -> tuple[str, dict[str, str], list[str]]:
    """The verdict, that of each kind, and the reasons."""
    counted = [column for column in found if column.weight > 0]
    broken, drifted = ([c for c in counted if c.status == status] for status in ("broken", "drift"))
    reasons = [f"{column.name}: {column.reason}" for column in broken + drifted]
    reasons += _asides(found, new, policy)
    kinds = {"data": _judge_data(counted, policy), "quality": "broken" if broken else "stable"}
    if policy.prediction_columns:
        kinds["prediction"] = _judge_prediction(counted)
    fewer = min(reference.rows, current.rows)
    if fewer < policy.min_rows:
        kinds |= {kind: "not_enough_data" for kind in kinds if kind != "quality"}
        return "not_enough_data", kinds, [f"{fewer} rows, at least {policy.min_rows} needed", *reasons]
    if broken or "drift" in kinds.values():
        return "drift", kinds, reasons
    for kind, what in (("data", "column"), ("prediction", "prediction")):
        if kinds.get(kind) == "not_enough_data":
            return "not_enough_data", kinds, [*reasons, f"no {what} that counts could be compared"]
    judged = [column for column in counted if column.p_value is not None and column.kind in ("data", "prediction")]
    return "stable", kinds, [*reasons, f"{len(judged)} column(s) compared, {len(drifted)} drifted"]


def _judge_data(counted: list[ColumnDrift], policy: DriftPolicy) -> str:
    judged = [column for column in counted if column.kind == "data" and column.p_value is not None]
    drifted = [column for column in judged if column.status == "drift"]
    weight = sum(column.weight for column in drifted)
    # A sum of floats: all columns together must reach all of the weight.
    enough = weight >= policy.min_weight * sum(column.weight for column in judged) * (1 - 1e-12)
    if drifted and len(drifted) >= policy.min_columns and enough:
        return "drift"
    explained = any(column.status == "calendar" and column.season_effect is not None for column in counted)
    return "stable" if judged or explained else "not_enough_data"


def _judge_prediction(counted: list[ColumnDrift]) -> str:
    judged = [column for column in counted if column.kind == "prediction" and column.p_value is not None]
    if any(column.status == "drift" for column in judged):
        return "drift"
    return "stable" if judged else "not_enough_data"


def _asides(found: list[ColumnDrift], new: list[str], policy: DriftPolicy) -> list[str]:
    """What does not count, and is not to be overlooked."""
    asides = []
    if weightless := [c.name for c in found if c.weight == 0 and c.status in ("broken", "uncounted")]:
        asides.append(f"of weight 0, not counted: {', '.join(weightless)}")
    if calendar := [column.name for column in found if column.status == "calendar" and column.weight > 0]:
        asides.append(f"drifted with the calendar, not counted: {', '.join(calendar)}")
    if lacking := [f"{c.name} ({c.reason})" for c in found if c.status == "not_enough_data"]:
        asides.append(f"not enough data: {', '.join(lacking)}")
    if new:
        asides.append(f"new column(s), not in the reference: {', '.join(new)}")
    if unknown := sorted(set(policy.prediction_columns) & set(new)):
        asides.append(f"predictions not judged, the reference has none: {', '.join(unknown)}")
    return asides
