"""What the table and the page say follows from the ledger, the reason of a worse month included."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from airflow_mlops.embedded import charts, page, summary
from airflow_mlops.embedded.summary import MonthSummary, Score

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def year(ledger: Make) -> list[MonthSummary]:
    entries = [
        ledger("2013-03", trained=True, gate=True, after=1),
        ledger("2013-04", champion=(1, 0.73, 0.43), frozen=(1, 0.73, 0.43), verdict="stable", before=1, after=1),
        ledger("2013-05", champion=(1, 0.72, 0.45), frozen=(1, 0.72, 0.45), verdict="harm", trained=True, gate=True,
               canary="PROMOTE", before=1, after=2, rate=0.22),
        ledger("2013-06", champion=(2, 0.75, 0.51), frozen=(1, 0.72, 0.53), verdict="harm", trained=True, gate=False,
               before=2, after=2),
        ledger("2013-07", champion=(2, 0.70, 0.57), frozen=(1, 0.71, 0.56), verdict="stable", before=2, after=2,
               rate=0.31),
        ledger("2013-08", champion=(2, 0.74, 0.44), frozen=(1, 0.72, 0.46), verdict="harm", trained=True, gate=True,
               canary="ROLLBACK", before=2, after=2),
    ]  # fmt: skip
    return [summary.summarise(entry) for entry in entries]


def test_a_ledger_entry_becomes_what_is_shown(year: list[MonthSummary]) -> None:
    first, may, august = year[0], year[2], year[5]
    assert (first.verdict, first.champion, first.retrained, first.promoted) == ("no_champion", None, True, True)
    assert (may.gate, may.canary, may.cpu_seconds, may.promoted) == ("passed", "promote", 21.5, True)
    assert may.columns == ("origin_delay", "wind_gust")
    assert may.base_rate == 0.22
    assert (august.gate, august.canary, august.promoted) == ("passed", "rollback", False)
    assert year[3].gain == pytest.approx(0.02)
    assert (year[3].gate, year[1].gate) == ("lost", "-")


def test_months_without_an_entry_are_left_out(tmp_path: Path, ledger: Make) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "2013-04.json").write_text(json.dumps(ledger("2013-04")))
    read = summary.read(tmp_path, ["2013-03", "2013-04", "2013-05"])
    assert [month.month for month in read] == ["2013-04"]
    assert read[0].gain is None


def test_a_month_that_is_not_better_says_why(year: list[MonthSummary]) -> None:
    reasons = [summary.explain(year, index) for index in range(len(year))]
    assert "no champion yet" in reasons[0]
    assert "still the frozen model itself (version 1)" in reasons[1]
    assert "was better than the frozen model by 0.0200" in reasons[3]
    assert "version 2, was worse than the frozen model by 0.0100" in reasons[4]
    assert "promoted after 2013-05" in reasons[4] and "from 0.220 to 0.310" in reasons[4]
    assert "no reason to retrain" in reasons[4]


class _Links(HTMLParser):
    """Collects what a browser would load, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_is_whole_and_loads_nothing(year: list[MonthSummary], tmp_path: Path) -> None:
    text = page.write(tmp_path / "demo.html", year).read_text()
    parser = _Links()
    parser.feed(text)
    assert parser.open == [] and parser.loaded == []
    assert "url(" not in text and "@import" not in text
    # Three months in which champion and frozen model differ, better in two of them.
    assert "<b>2 of 3</b>" in text
    assert "<b>4 / 2</b>" in text
    assert "log loss &lt;0.51&gt; against 0.44" in text
    assert "/somewhere/else" not in text


def test_months_that_are_not_better_are_open_on_the_page(year: list[MonthSummary]) -> None:
    text = page.render(year)
    for month, is_open in [("2013-04", True), ("2013-06", False), ("2013-07", True)]:
        assert (f"<details open><summary>{month}" in text) is is_open
        assert (f"<details><summary>{month}" in text) is not is_open


def test_drift_is_held_against_the_loss_it_came_with(year: list[MonthSummary]) -> None:
    """Counts of drifted columns and losses of the frozen model, set by hand."""

    def told(counts: list[int], losses: list[float]) -> str:
        months = [
            replace(month, columns=("x",) * count, frozen=Score("1", 0.7, loss))
            for month, count, loss in zip(year[1:], counts, losses)
        ]
        return page._drift_and_loss(months)

    losses = [0.43, 0.45, 0.53, 0.56, 0.46]
    assert "10 of 10 cases: drift of the columns alone goes with loss here" in told([1, 2, 4, 5, 3], losses)
    assert "4 of 10 cases: drift of the columns alone does not tell of loss" in told([2, 5, 1, 3, 4], losses)
    assert "Too few months" in told([1, 2, 4], losses)
    assert "Too few months" in told([0, 0, 0, 0, 0], losses)
    text = told([1, 2, 4, 5, 3], losses)
    assert '<td class="n">+0.1300</td>' in text, "July's loss against April's"
    many = replace(year[1], columns=("x",) * 15, ledger={"drift": {"drifted": 22}})
    shown = page._drift_and_loss([many])
    assert '<td class="n">22</td>' in shown, "the list of the columns ends at fifteen"
    assert ">22</text>" in shown, "columns are counted in whole numbers"


def test_the_page_of_nothing_is_a_page() -> None:
    assert "Nothing is on record yet" in page.render([])


def test_lines_leave_a_gap_and_names_do_not_overlap() -> None:
    svg = charts.lines("t", ["a", "b", "c"], {"champion": [None, 0.5, 0.6], "frozen": [None, 0.5, 0.6001]})
    assert svg.count("<circle") == 4
    heights = [float(part.split('y="')[1].split('"')[0]) for part in svg.split("<text") if 'class="name"' in part]
    assert abs(heights[0] - heights[1]) >= 15


def test_a_higher_value_is_drawn_higher() -> None:
    svg = charts.lines("t", ["a", "b"], {"champion": [0.1, 0.9]})
    low, high = [float(part.split('cy="')[1].split('"')[0]) for part in svg.split("<circle")[1:]]
    assert high < low


@pytest.mark.parametrize(("low", "high"), [(0.42, 0.57), (0.0, 0.33), (0.7, 0.7), (-3, 12_000)])
def test_ticks_are_few_and_span_the_values(low: float, high: float) -> None:
    marks = charts.ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high
    assert 2 <= len(marks) <= 7


def test_the_page_shows_what_the_scores_let_expect_beside_what_came(year: list[MonthSummary]) -> None:
    auc = {"value": 0.731, "low": 0.71, "high": 0.752, "reference": 0.74}
    told = replace(year[1], ledger={"drift": {"estimate": {"metrics": {"auc": auc}}}})
    assert "0.731 (0.710 to 0.752)" in page._drift_and_loss([told])
    unsure = replace(year[1], ledger={"drift": {"estimate": {"metrics": {"auc": auc | {"low": None, "high": None}}}}})
    assert "0.731 (– to –)" in page._drift_and_loss([unsure])
    assert "None" not in page._drift_and_loss([replace(year[1], ledger={"drift": {"estimate": None}})])
