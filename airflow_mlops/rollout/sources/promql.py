"""Just enough PromQL: fill in placeholders safely, find an expression's selectors, put many parts in one query."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from airflow_mlops.exceptions import InvalidInputError

#: What turns counters into something that is no count any more, so that no test of it is valid.
NOT_COUNTS = (
    "rate",
    "irate",
    "increase",
    "delta",
    "idelta",
    "deriv",
    "predict_linear",
    "histogram_quantile",
    "histogram_avg",
    "avg",
    "avg_over_time",
    "quantile",
    "quantile_over_time",
)
PART = "mlops_part"

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'|`[^`]*`')
_MATCHER = re.compile(r"(=~|!~|!=|=)?(\s*)(" + _STRING.pattern + ")", re.S)
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_NAME = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*$")
_FUNCTION = re.compile(r"\b(" + "|".join(NOT_COUNTS) + r")\s*(?:by\b|without\b|\()")


def placeholders(template: str) -> set[str]:
    """The names in braces within the strings of a query."""
    return {name for found in _STRING.finditer(template) for name in _PLACEHOLDER.findall(found.group())}


def render(template: str, values: Mapping[str, str | None]) -> str:
    """Fill ``{name}`` within the strings of a query: whatever the value, it stays within its string.

    :raises InvalidInputError: a placeholder is unknown or has no value
    """

    def filled(match: re.Match[str]) -> str:
        operator, space, text = match.group(1) or "", match.group(2), match.group(3)
        names = _PLACEHOLDER.findall(text)
        if not names:
            return match.group()
        if text.startswith("`"):
            raise InvalidInputError(f"{text} has a placeholder; write it in double quotes")
        for name in names:
            if values.get(name) is None:
                known = ", ".join(sorted(f"{{{known}}}" for known, value in values.items() if value is not None))
                raise InvalidInputError(f"{{{name}}} in {text} has no value here; known are {known}")
        literal = re.escape if "~" in operator else str
        return operator + space + _PLACEHOLDER.sub(lambda found: _quoted(literal(str(values[found.group(1)]))), text)

    return _MATCHER.sub(filled, template)


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("'", "\\'").replace("\n", "\\n")


def selectors(expression: str) -> list[str]:
    """The vector selectors with label matchers in an expression, as they stand there."""
    found, position = [], 0
    while position < len(expression):
        string = _STRING.match(expression, position)
        if string:
            position = string.end()
        elif expression[position] == "#":
            end = expression.find("\n", position)
            position = len(expression) if end < 0 else end
        elif expression[position] == "{":
            name = _NAME.search(expression[:position])
            end = _closing(expression, position)
            found.append(expression[name.start() if name else position : end])
            position = end
        else:
            position += 1
    return found


def _closing(expression: str, position: int) -> int:
    while position < len(expression):
        string = _STRING.match(expression, position)
        if string:
            position = string.end()
            continue
        position += 1
        if expression[position - 1] == "}":
            return position
    raise InvalidInputError(f"the query {expression!r} has a brace that is not closed")


def metric_of(selector: str) -> str:
    """The metric's name in a selector; empty where it has none."""
    return selector.split("{", 1)[0].strip()


def check_counts(name: str, template: str) -> None:
    """:raises InvalidInputError: the query cannot give counts, or names no series by a label"""
    bare = _STRING.sub('""', template)
    function = _FUNCTION.search(bare)
    if function:
        raise InvalidInputError(
            f"the query {name!r} uses {function.group(1)}(): {template!r}. Give the counter itself, since a ratio or "
            "rate that was computed before cannot be tested, for example sum by (pod) (errors_total{...})"
        )
    if not selectors(template):
        raise InvalidInputError(
            f"the query {name!r} selects nothing by a label: {template!r}. Which arm a series belongs to is told by "
            'one, for example errors_total{version="{version}"}'
        )


def value_and_time(expression: str, replica: Sequence[str], extra: Sequence[str] = ()) -> tuple[str, str]:
    """Two queries: the values by replica, and when their newest samples were taken.

    A bare selector is summed up by replica; an expression stays as it is. Prometheus gives an instant query samples
    of up to five minutes ago, and only ``timestamp()`` of a selector says so.
    """
    found = selectors(expression)
    by = ", ".join(replica)
    if found == [expression.strip()]:
        value = f"sum by ({', '.join([*extra, *replica])}) ({expression.strip()})"
    else:
        value = f"({expression})"
    stamps = " or ".join(f"timestamp({selector})" for selector in dict.fromkeys(found))
    return value, f"max by ({by}) ({stamps})"


def labelled(expression: str, part: str) -> str:
    """The expression, each series marked as that part of a larger query."""
    return f'label_replace({expression}, "{PART}", "{part}", "", "")'


def union(parts: Mapping[str, str]) -> str:
    """One query for many, evaluated on one snapshot: parts of it fit together as those of several would not."""
    return "\nor ".join(_marked(parts))


def _marked(parts: Mapping[str, str]) -> Iterator[str]:
    for part, expression in parts.items():
        yield labelled(expression, part)
