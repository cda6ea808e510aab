"""The model card says what the record says, in Markdown and on a page that loads nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from airflow_mlops.provenance import ModelRecord
from airflow_mlops.provenance.card import html, markdown


@pytest.fixture
def record(told):
    return told.record


def text_of(page):
    return re.sub(r"<[^>]+>", " ", page)


@pytest.mark.parametrize("render", [markdown, html])
def test_both_say_what_the_record_says(record, render):
    text = text_of(render(record))
    for told in (
        "late, version 1",
        "Whether a flight is late.",
        record.get("data.training_set.sha256"),
        record.get("data.snapshot.md5"),
        record.get("code.revision"),
        "params.seed = 7",
        "approved by ada (rollout, step 1)",
        "Passed against version 1, on 900 rows held out.",
        "origin = JFK",
        "0.00333 kWh, estimated at 10.0 W a busy core",
        "PROMOTE",
    ):
        assert told in text, told


def test_the_page_loads_nothing_and_escapes_what_it_shows(record):
    page = html(replace(record, documentation={"description": "<script>alert(1)</script>", "purpose": "a & b"}))
    assert "<script" not in page and "&lt;script&gt;" in page and "a &amp; b" in page
    assert not re.search(r"\b(src|href)\s*=", page)


def test_the_markdown_is_tables_whose_cells_hold(record):
    rendered = MarkdownIt("commonmark").enable("table").render(markdown(replace(record, run_key="a | b\nc")))
    assert rendered.count("<table>") >= 8
    assert "<td>a | b c</td>" in rendered
    for row in re.findall(r"<tr>(.*?)</tr>", rendered, re.DOTALL):
        assert row.count("<td") in (0, 2, 3, 4, 5)


def test_what_is_not_known_is_listed(record):
    bare = ModelRecord("late", "1")
    text = markdown(bare)
    assert "## Not known" in text and "- code.revision" in text and "No gate has judged this version." in text
    complete = markdown(replace(record, environment={**record.environment, "image_digest": "none"}))
    assert "Every question that a record asks is answered." in complete


def test_a_changed_checkout_is_said(record):
    assert "with changes" in markdown(replace(record, code={**record.code, "dirty": True}))
    assert "with changes" not in markdown(replace(record, code={**record.code, "dirty": False}))
