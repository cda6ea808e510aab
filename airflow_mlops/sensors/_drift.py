"""What a :class:`airflow_mlops.sensors.drift.DriftSensor` reads and compares, and how it shows it in the log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlops import storage
from airflow_mlops.exceptions import DataError, RegistryError
from airflow_mlops.shell import as_mapping, log_table

if TYPE_CHECKING:
    from airflow_mlops.drift import DriftPolicy, DriftReport, Profile
    from airflow_mlops.hooks.mlflow import MlflowHook


def policy_of(kind: Any, value: Any, name: str) -> Any:
    return value if isinstance(value, kind) else kind.from_json(as_mapping(value, name))


def tagged_json(hook: MlflowHook, champion: Any, tag: str, what: str) -> Any:
    """The JSON that a tag of the champion's version names.

    :param what: how an error calls it
    :raises RegistryError: there is no such tag, or not what it names
    """
    uri = (champion.tags or {}).get(tag)
    name = f"{champion.name} version {champion.version}"
    fix = (
        f"register the version with MlflowRegisterOperator, or write the JSON and set it: MlflowClient()"
        f".set_model_version_tag({champion.name!r}, {str(champion.version)!r}, {tag!r}, <uri>)"
    )
    if not uri:
        raise RegistryError(f"{name} has no {what} (tag {tag}); {fix}")
    try:
        return read_json(hook, uri)
    except FileNotFoundError:
        raise RegistryError(f"the {what} of {name} is not at {uri} any more; restore it, or {fix}") from None
    except ValueError as error:
        raise RegistryError(f"the {what} of {name} at {uri} is no JSON ({error}); {fix}") from error


def read_json(hook: MlflowHook, uri: str) -> Any:
    if not uri.startswith(("runs:/", "models:/", "mlflow-artifacts:")):
        return storage.read_json(uri)
    import mlflow

    with hook.session():
        try:
            return mlflow.artifacts.load_dict(uri)
        except (OSError, mlflow.exceptions.MlflowException) as error:
            raise FileNotFoundError(uri) from error


def drift_table(report: DriftReport) -> str:
    header = ["column", "status", "distance", "effect", "adjusted p", "reference", "current", "missing", "reason"]
    rows: list[list[object]] = []
    for c in report.columns[:40]:
        numbers = [number(value) for value in (c.effect, c.adjusted_p, c.reference, c.current)]
        rows.append([c.name, c.status, c.method or "", *numbers, f"{c.missing[1]:.1%}", c.reason])
    return log_table(header, rows)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


@dataclass(frozen=True)
class Found:
    """What came of comparing the window's data with the champion's.

    :param profile: of the window
    :param report: the comparison
    :param drifted: whether it is drift that training can answer, unlike broken data
    :param share: of Evidently's drifted columns, and its limit, where it was the judge
    """

    profile: Profile
    report: DriftReport
    drifted: bool
    share: tuple[float, float] | None = None


def compare_window(
    reference: Profile,
    uri: str,
    columns: Sequence[str],
    categorical: Sequence[str],
    policy: DriftPolicy,
    season: Profile | None,
    build: Callable[..., Profile] | None = None,
) -> tuple[Profile, Found]:
    """The reference's columns that are asked for, and how the data at ``uri`` compare.

    :param columns: to compare; the reference's when empty
    :param categorical: numeric columns whose numbers are names
    :param build: makes the profile of the data; :meth:`Profile.of` when not given
    :raises DataError: a column asked for is nowhere, or the two have none in common
    """
    from airflow_mlops.drift import Profile, compare
    from airflow_mlops.drift.profile import column_names

    present = column_names(uri)
    wanted = columns or list(reference.columns)
    unknown = [name for name in wanted if name not in reference.columns and name not in present]
    if unknown:
        raise DataError(f"column(s) {', '.join(unknown)} are neither in the champion's profile nor in the data")
    reference = Profile(reference.rows, {name: column for name, column in reference.columns.items() if name in wanted})
    if not set(present) & set(reference.columns):
        raise DataError(
            f"{uri} has none of the columns of the champion's profile: it has {', '.join(present)}, "
            f"the profile {', '.join(reference.columns)}. Point current_uri at the feature set the model reads."
        )
    # Numbers that the training took for names are names here too.
    names = {n for n, c in reference.columns.items() if c.kind == "categorical" and "string" not in c.type}
    current = (build or Profile.of)(
        uri, columns=[name for name in wanted if name in present], categorical=sorted(names | set(categorical))
    )
    report = compare(reference, current, policy, season=season)
    return reference, Found(current, report, "drift" in report.kinds.values())


def judge_by_evidently(
    reference_uri: str, uri: str, reference: Profile, found: Found, options: Mapping[str, Any]
) -> Found:
    """``found`` with the verdict of Evidently's preset on all rows in place of ours."""
    from airflow_mlops.drift.preset import judge

    theirs = judge(reference_uri, uri, (reference, found.profile), found.report, options)
    return Found(found.profile, theirs.report, theirs.drifted, (theirs.share, theirs.limit))
