"""The page and the image of a rollout: what they say, that nothing can be put into them, that gaps do no harm."""

from __future__ import annotations

import copy
import io
import re
from html.parser import HTMLParser

import pytest

from airflow_mlops.rollout import plots
from airflow_mlops.rollout.history import History
from airflow_mlops.rollout.judge import Verdict
from airflow_mlops.rollout.policy import Guardrail, RolloutPolicy
from airflow_mlops.rollout.report import render_html, render_png
from airflow_mlops.rollout.spec import RolloutSpec, result_of

GUARDRAILS = (Guardrail.errors(), Guardrail.latency(), Guardrail.loss())
SPEC = RolloutSpec("churn", "8", "u8", "7", "u7", "dag/task/run/-1", RolloutPolicy(steps=(10, 50, 100)), GUARDRAILS)
START = 1_770_000_000.0


def accounts(e_harm=0.5, e_ok=2.0, status="open", **changes):
    """What a judge says of the three guardrails; ``status`` and the e-values are those of errors."""
    needed = {"e_harm_needed": 60.0, "e_ok_needed": 20.0}
    found = {
        "errors": {
            "status": status, "stable": 0.005, "canary": 0.0213, "requests": [1000, 100], "events": [5, 2],
            "e_harm": e_harm, "e_ok": e_ok, **needed,
        },
        "latency": {
            "status": "ok", "stable": 0.04, "canary": 0.05, "requests": [1000, 100], "events": [40, 5],
            "slower_than_seconds": 0.0694, "e_harm": 0.3, "e_ok": 1.9e130, **needed,
        },
        "log_loss": {
            "status": "open", "stable": 0.45, "canary": 0.46, "values": [900, 90], "difference": 0.01,
            "worse_by_at_least": -0.02, "worse_by_at_most": 0.04, "margin": 0.05,
        },
    }  # fmt: skip
    return {**found, **changes}


def rollout(last="ROLLBACK", looks=30, final=None, reasons=("errors: the canary is worse",)):
    """A result whose looks hold at 10 %, from the tenth at 50 %, and end with ``last``."""
    history = History()
    for look in range(1, looks + 1):
        decision = last if look == looks else "PROMOTE_STEP" if look == 10 else "HOLD"
        weight = {"ROLLBACK": 0, "PROMOTE": 100, "CONCLUDE": 0}.get(decision, 50 if look >= 10 else 10)
        seen = accounts(e_harm=2.0**look, e_ok=0.5**look)
        if decision == last:
            seen = final or seen
        verdict = Verdict(decision, weight, 0, look, list(reasons), seen, {"stable": 90 * look, "canary": 10 * look})
        history.add(START + 60 * look, verdict)
    steps = [
        {"weight": 10, "seconds": 600.0, "looks": 10, "requests": [900, 100], "decision": "PROMOTE_STEP"},
        {"weight": 50, "seconds": 1140.0, "looks": 20, "requests": [1800, 200], "decision": last},
    ]
    return {**result_of(SPEC, verdict, steps, "7", 1740.0), "history": history.to_json()}


@pytest.fixture
def undrawn(monkeypatch):
    """Plots are empty: for tests of the page's words, which need no drawing."""
    monkeypatch.setattr(plots, "_svg", lambda figure, salt, alternative: "<svg></svg>")


class Page(HTMLParser):
    """The text of a page, its tags, and whatever it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action") and not value.startswith("#"):
                self.loaded.append(value)
            if name == "id":
                self.ids.append(value)
            assert not name.startswith("on"), (tag, name)

    def handle_endtag(self, tag):
        if tag in self.open:
            del self.open[len(self.open) - 1 - self.open[::-1].index(tag) :]

    def handle_data(self, data):
        if not {"style", "svg", "title"} & set(self.open):
            self.texts.append(data)


def test_a_rollback_says_what_was_worse_and_where_the_traffic_is(undrawn):
    final = accounts(e_harm=812.3, e_ok=0.0001, status="harm")
    page = Page(render_html(rollout(final=final), SPEC))
    assert "churn, version 8 rolled back" in page.text
    assert "Version 8 was shown to be worse than version 7 in errors; version 7 serves all traffic." in page.text
    assert "errors: the canary is worse" in page.text
    assert "0.5 % 2.13 % of requests harm 812 of 60 to 1, no harm <0.01 of 20 to 1" in page.text
    assert "slower than 69.4 ms harm 0.3 of 60 to 1, no harm >1,000,000 of 20 to 1" in page.text
    assert "worse by -0.02 to 0.04, to be below 0.05" in page.text
    assert "10 % 10 min 10 900 100 to the next step 50 % 19 min 20 1,800 200 rolled back" in page.text
    assert "300 requests to the canary 2,700 requests to stable" in page.text
    assert "50 % largest share of traffic 29 min from start to verdict, 30 looks" in page.text


def test_a_promotion_says_that_every_guardrail_has_shown_it(undrawn):
    final = accounts(e_ok=31.0, status="ok")
    page = Page(render_html(rollout("PROMOTE", final=final, reasons=["all shown"]), SPEC))
    assert "churn, version 8 promoted" in page.text
    assert "every guardrail has shown that it is not worse than version 7" in page.text
    assert "shown to be worse" not in page.text


def test_a_rollback_at_the_deadline_is_not_called_harm(undrawn):
    page = Page(render_html(rollout(reasons=["not decided within the deadline of 3600 s"]), SPEC))
    assert "Version 8 was rolled back; version 7 serves all traffic." in page.text
    assert "not decided within the deadline of 3600 s" in page.text
    assert "shown to be worse" not in page.text


def test_a_promotion_without_a_comparison_says_so():
    result = result_of(SPEC, Verdict("PROMOTE", 100, 0, 0, ["there is no champion"]), [], None, 0.0)
    page = Page(render_html(result, SPEC))
    assert "It was not compared with any other version." in page.text
    assert "No look is on record." in page.text and "No step was finished." in page.text
    assert "has shown" not in page.text and "no worse" not in page.text
    assert "not enough data of both arms" in page.text


def test_the_rules_are_told_where_they_are_known(undrawn):
    told = Page(render_html(rollout(), SPEC)).text
    assert "Harm is a share above 1.25 times stable's, no harm one below 1.5 times; up to 0.2 % is no harm" in told
    assert "Worse is higher; harm is more than 0, no harm less than 0.05." in told
    assert "at most 5 %, over all guardrails" in told
    assert "Harm is" not in Page(render_html(rollout())).text


def test_an_ab_test_tells_effects_with_their_intervals(undrawn):
    result = rollout("CONCLUDE")
    result["report"] = {
        "errors": {"effect": "ratio of rates", "estimate": 1.2, "interval": [0.9, 1.6], "confidence": 0.95},
        "log_loss": {"effect": "difference of means", "estimate": 0.03, "interval": [0.01, 0.05], "confidence": 0.95},
        "latency": {"effect": "ratio of rates", "estimate": None, "interval": None},
    }
    page = Page(render_html(result, SPEC))
    assert "test concluded" in page.text and "version 7 serves all traffic again" in page.text
    assert (
        "Ratio of rates, canary against stable: 1.2, between 0.9 and 1.6, sure to 95 %; no difference is shown."
        in page.text
    )
    assert "against stable: 0.03, between 0.01 and 0.05, sure to 95 %; a difference is shown." in page.text
    assert "slower than 69.4 ms, of stable's 4 %. How large the difference is cannot be said." in page.text
    assert "Effects" not in Page(render_html(rollout(), SPEC)).text


def test_nothing_is_loaded_and_no_name_is_given_twice():
    html = render_html(rollout(), SPEC)
    page = Page(html)
    assert page.loaded == [] and "@import" not in html and "script" not in page.tags
    assert page.tags.count("svg") == 4
    assert len(page.ids) == len(set(page.ids))
    assert not re.findall(r"url\((?!#)", html)


def test_the_plots_have_the_colours_of_the_page():
    html = render_html(rollout(), SPEC)
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert {f"var(--{name})" for name in ("stable", "canary", "good", "bad", "muted", "rule")} <= set(
        re.findall(r"var\(--\w+\)", drawn)
    )
    assert not set(re.findall(r"#[0-9a-f]{6}\b", drawn)) - {"#000000"}
    style = html[: html.index("</style>")]
    assert all(f"--{name}:" in style for name in plots.COLOURS)


def test_equal_results_give_equal_pages():
    assert render_html(rollout(), SPEC) == render_html(copy.deepcopy(rollout()), SPEC)


HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '"><b x="',
    "$\\frac{$",
    "a\nb\x00",
    "名" * 90,
]


def test_names_and_reasons_cannot_put_anything_into_the_page():
    names, errors = "".join(HOSTILE), accounts()["errors"]
    result = rollout(reasons=HOSTILE)
    result |= {"model": names, "version": names, "previous": names}
    result["steps"][0]["decision"] = names
    result["guardrails"] = {name: {**errors, "status": name, "remark": name} for name in HOSTILE}
    for look in result["history"]["looks"][:-1]:
        look[3] = {name: look[3]["errors"] for name in HOSTILE}
    page = Page(render_html(result))
    assert not {"script", "img"} & set(page.tags) and page.loaded == []
    assert page.tags.count("b") == 4  # the tiles'
    assert page.tags.count("svg") == 1 + len(HOSTILE)
    assert page.text.count("<script>alert(1)</script>") >= 5
    assert render_png(result).startswith(b"\x89PNG")


def gaps():
    """Results with something missing, by what it is."""
    empty = rollout()
    empty["history"] = History().to_json()
    without = {key: value for key, value in rollout().items() if key != "history"}
    none = rollout()
    none["guardrails"] = {name: {"status": "no data", "stable": None, "canary": None} for name in accounts()}
    for look in none["history"]["looks"]:
        look[3] = {name: ["no data", None, None, None, None] for name in look[3]}
    one = rollout(looks=1)
    odd = rollout()
    odd["history"]["looks"] = [look[:4] for look in odd["history"]["looks"]]  # of a history without requests
    for look in odd["history"]["looks"][::3]:
        look[3]["errors"] = ["open", float("nan"), None, float("inf"), None]
        look[1] = None
    odd["guardrails"]["errors"] |= {"e_harm_needed": None, "e_harm": None, "canary": float("nan")}
    odd["guardrails"]["log_loss"] |= {"margin": None, "worse_by_at_least": None}
    odd["steps"][0] = {"weight": None}
    bare = {"verdict": "ROLLBACK", "model": "m", "version": "1"}
    return {"history": empty, "no history": without, "no data": none, "one look": one, "odd": odd, "bare": bare}


@pytest.mark.parametrize("what", gaps())
@pytest.mark.parametrize("spec", [SPEC, None])
def test_what_is_missing_is_left_out(what, spec):
    result = gaps()[what]
    page = Page(render_html(result, spec))
    assert "rolled back" in page.text
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b", page.text)
    assert ("No look is on record." in page.text) == (what in ("history", "no history", "bare"))
    if spec:
        assert render_png(result, spec).startswith(b"\x89PNG")


def test_a_guardrail_without_numbers_has_no_plot(undrawn):
    page = Page(render_html(gaps()["no data"], SPEC))
    assert page.tags.count("svg") == 1
    assert "There are no numbers of both arms for errors." in page.text


def size(image: bytes) -> tuple[int, int]:
    from matplotlib.image import imread

    height, width, _ = imread(io.BytesIO(image)).shape
    return width, height


def test_the_image_has_a_row_per_guardrail():
    width, height = size(render_png(rollout(), SPEC))
    short = {**rollout(), "guardrails": {}, "history": {**rollout()["history"]}}
    short["history"]["looks"] = [
        [*look[:3], {"errors": look[3]["errors"]}, look[4]] for look in short["history"]["looks"]
    ]
    assert size(render_png(short)) == (width, pytest.approx(height * 2.2 / 4.2, rel=0.03))


def drawn(result, name):
    """The lines of a guardrail's second plot: points by colour."""
    _, axes = plots._figure(1)
    looks = plots.looks_of(result)
    plots._guardrail(axes[0], looks, plots.marks_of(looks), name, result["guardrails"][name])
    return axes[0][1]


def test_evidence_is_drawn_on_a_logarithmic_scale_with_what_it_needs():
    axes = drawn(rollout(), "errors")
    assert axes.get_yscale() == "log"
    heights = sorted(float(line.get_segments()[0][0][1]) for line in axes.collections)
    assert heights == [20.0, 60.0]
    harm = next(line for line in axes.lines if line.get_color() == plots.COLOURS["bad"] and len(line.get_xdata()) > 2)
    assert list(harm.get_ydata()[:3]) == [2.0, 4.0, 8.0]
    low, high = axes.get_ylim()
    assert all(low <= value <= high for line in axes.lines for value in line.get_ydata() if len(line.get_ydata()) > 2)


def test_bounds_are_drawn_with_the_margin_and_not_squeezed_by_the_first_ones():
    result = rollout()
    result["history"]["looks"][0][3]["log_loss"] = ["open", 0.45, 0.46, -500.0, 500.0]
    axes = drawn(result, "log_loss")
    low, high = axes.get_ylim()
    assert -1 < low < -0.02 and 0.05 < high < 1
    assert any(
        float(line.get_segments()[0][0][1]) == 0.05 for line in axes.collections if hasattr(line, "get_segments")
    )


def test_planned_looks_are_drawn_with_their_bounds(undrawn):
    result = rollout()
    planned = {"z_harm": 1.0, "z_ok": 2.0, "z_harm_needed": 2.5, "z_ok_needed": 8.0, "planned_look": 3}
    result["guardrails"]["errors"] = {"status": "open", "stable": 0.1, "canary": 0.1, "events": [1, 1], **planned}
    axes = drawn(result, "errors")
    assert [float(line.get_segments()[0][0][1]) for line in axes.collections] == [2.5]
    assert "planned look 3: harm z 1 of 2.5, no harm z 2 of 8" in Page(render_html(result)).text


def test_marks_stand_where_the_weight_changed_and_where_the_verdict_fell():
    marks = plots.marks_of(plots.looks_of(rollout()))
    assert (marks.unit, marks.steps, marks.verdict) == ("min", [(9.0, 50)], (29.0, "bad"))
    waiting = rollout("HOLD")
    assert plots.marks_of(plots.looks_of(waiting)).verdict is None


@pytest.mark.parametrize(("minutes", "unit"), [(0.05, "s"), (2, "min"), (60, "h"), (1440, "d")])
def test_time_has_the_unit_that_fits(minutes, unit):
    result = rollout()
    for index, look in enumerate(result["history"]["looks"]):
        look[0] = START + 60 * minutes * index
    assert plots.marks_of(plots.looks_of(result)).unit == unit
