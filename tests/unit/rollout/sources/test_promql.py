"""Queries: placeholders stay within their strings, selectors are found, and what gives no counts is refused."""

from __future__ import annotations

import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout.sources.promql import check_counts, placeholders, render, selectors, union, value_and_time
from airflow_mlops.rollout.sources.query_sets import COUNT, HISTOGRAM, MOMENTS, QUERY_SETS, metric_from, queries_of


@pytest.mark.parametrize(
    ("template", "value", "expected"),
    [
        ('a{v="{version}"}', "3", 'a{v="3"}'),
        ('a{v=~"{version}|x"}', "1.5", 'a{v=~"1\\\\.5|x"}'),
        ('a{v="{version}"}', '3",b="', 'a{v="3\\",b=\\""}'),
        ("a{v='{version}'}", "it's", "a{v='it\\'s'}"),
        ('a{v="{version}"}', "back\\slash", 'a{v="back\\\\slash"}'),
        ('a{v!~"{version}.{2,3}"}', "x", 'a{v!~"x.{2,3}"}'),
    ],
)
def test_a_value_stays_within_its_string(template, value, expected):
    assert render(template, {"version": value}) == expected


def test_only_known_placeholders_are_filled_and_only_in_strings():
    assert placeholders('sum by (pod) (a{x="{name}",y=~"{stable}|{canary}"})') == {"name", "stable", "canary"}
    with pytest.raises(
        InvalidInputError, match=r"\{vresion\} in .* has no value here; known are \{name\}, \{version\}"
    ):
        render('a{v="{vresion}"}', {"version": "3", "name": "x", "namespace": None})
    with pytest.raises(InvalidInputError, match=r"\{namespace\}"):
        render('a{v="{namespace}"}', {"namespace": None})
    assert render('sum by (pod) (a{v="1"})', {}) == 'sum by (pod) (a{v="1"})'


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ('a{b="c"}', ['a{b="c"}']),
        ("sum by (pod) (a_total{b=\"}{\"}) + ns:rule{b='c'}", ['a_total{b="}{"}', "ns:rule{b='c'}"]),
        ('{__name__="a",b="c"}', ['{__name__="a",b="c"}']),
        ('a{b="c"} # d{e="f"}', ['a{b="c"}']),
        ("sum(a)", []),
    ],
)
def test_selectors_are_found(expression, expected):
    assert selectors(expression) == expected


def test_a_bare_selector_is_summed_up_and_an_expression_left_alone():
    value, time = value_and_time('a{b="c"}', ("pod",), ["le"])
    assert value == 'sum by (le, pod) (a{b="c"})' and time == 'max by (pod) (timestamp(a{b="c"}))'
    value, time = value_and_time('a{b="c"} + d{b="c"}', ("pod",))
    assert value == '(a{b="c"} + d{b="c"})'
    assert time == 'max by (pod) (timestamp(a{b="c"}) or timestamp(d{b="c"}))'
    assert union({"x": "1", "y": "2"}).count("label_replace") == 2


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ('rate(a{v="{version}"}[5m])', r"uses rate\(\)"),
        ('sum by (pod) (increase(a{v="{version}"}[1h]))', r"uses increase\(\)"),
        ('histogram_quantile(0.9, sum by (le) (a_bucket{v="{version}"}))', r"uses histogram_quantile\(\)"),
        ('avg by (pod) (a{v="{version}"})', r"uses avg\(\)"),
        ("sum(a_total)", "selects nothing by a label"),
        ('sum(a_total{v="{version}")', "brace that is not closed"),
    ],
)
def test_what_gives_no_counts_is_refused(query, message):
    with pytest.raises(InvalidInputError, match=message):
        check_counts("errors", query)


def test_names_that_only_contain_a_function_are_not_refused():
    check_counts("errors", 'error_rate_total{v="rate(x)"}')
    check_counts("errors", 'sum by (avg_zone) (delta_total{v="{version}"})')


def test_kinds_and_units_are_seen_in_the_query():
    assert metric_from("errors", 'a_total{v="{version}"}').kind == COUNT
    found = metric_from("latency", 'sum by (le, pod) (a_milliseconds_bucket{v="{version}"})')
    assert (found.kind, found.scale) == (HISTOGRAM, 1e-3)
    assert metric_from("latency", {"query": 'a_bucket{v="x"}', "unit": "microseconds"}).scale == 1e-6
    assert metric_from("value", {"count": 'a{v="x"}', "sum": 'b{v="x"}'}).kind == MOMENTS


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "",
        {},
        {"count": 'a{v="x"}'},
        {"query": 'a{v="x"}', "count": 'a{v="x"}'},
        {"query": 'a{v="x"}', "sum": 'a{v="x"}'},
        {"query": 'a{v="x"}', "unit": "weeks"},
        {"count": 'a{v="x"}', "sum": 'a{v="x"}', "variance": 'a{v="x"}'},
    ],
)
def test_other_forms_are_refused(value):
    with pytest.raises(InvalidInputError):
        metric_from("errors", value)


def test_a_set_can_be_changed_query_by_query():
    changed = queries_of(
        "istio", {"latency": None, "timeouts": 'istio_requests_total{response_flags="UT",x="{version}"}'}
    )
    assert set(changed.metrics) == {"requests", "errors", "timeouts"}
    # The same counter with one more matcher: where it is not there, nothing has happened.
    assert changed.metrics["errors"].zero and changed.metrics["timeouts"].zero
    assert not queries_of("istio", {"fallbacks": 'other_total{x="{version}"}'}).metrics["fallbacks"].zero
    assert not changed.metrics["requests"].zero and QUERY_SETS["istio"].metrics["latency"].kind == HISTOGRAM


def test_an_unknown_set_and_missing_requests_are_explained():
    with pytest.raises(InvalidInputError, match="the query set 'linkerd' is unknown; expected one of kserve, knative"):
        queries_of("linkerd")
    with pytest.raises(InvalidInputError, match="no counter 'requests'"):
        queries_of(None, {"errors": 'a{v="{version}"}'})
    with pytest.raises(InvalidInputError, match="no counter 'requests'"):
        queries_of("istio", {"requests": 'a_bucket{v="{version}"}'})
