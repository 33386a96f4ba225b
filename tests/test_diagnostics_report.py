"""report.html of the diagnostic: whole, self-contained, and usable in a browser."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from support.patience import patience
from support.planted_bank import planted_columns, write_table

from megatron_taopd.diagnostics import figures
from megatron_taopd.diagnostics.analysis import analyze
from megatron_taopd.diagnostics.gains import read_gains, shape_variables
from megatron_taopd.diagnostics.page import pivot, read_views
from megatron_taopd.diagnostics.write import FIGURES, write_analysis

pytestmark = pytest.mark.slow  # figures
NASTY = ["Let", " x", " <", "b>", "&", " \n", "</script>", '"', " é", "'"]


def stored_view(bank: str = "planted", positions: int = 10) -> dict:
    shown = [
        {
            "text": text,
            "student": [[text, 0.6], [" so", 0.4]],
            "teacher": [["</td>", 0.9], ["z", 0.1]],
        }
        for text in NASTY[:positions]
    ]
    messages = [{"role": "user", "content": "1 < 2?\n</script>"}]
    return {
        "bank": bank,
        "sequences": [{"sequence": 1, "prompt": 0, "messages": messages, "positions": shown}],
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report over two seeds with one response to look at; its directory and tables."""
    place = tmp_path_factory.mktemp("report")
    paths = []
    for seed in range(2):
        columns = planted_columns(0, 12, 20, learnable=2.0)
        columns["gain"] = columns["gain"] + np.random.default_rng(seed).normal(size=240)
        paths.append(place / f"seed{seed}.parquet")
        write_table(paths[-1], columns)
    view = place / "before.view.json"
    view.write_text(json.dumps(stored_view()))
    tables = write_analysis(paths, place / "out", view, resamples=100)
    return place / "out", tables, paths, view


def test_every_table_and_figure_is_a_file(report):
    out, tables, _, _ = report
    expected = {"report.html"} | {f"{name}.csv" for name in tables}
    expected |= {f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")}
    assert {path.name for path in out.iterdir()} == expected
    for name, rows in tables.items():
        with (out / f"{name}.csv").open(encoding="utf-8") as file:
            read = list(csv.DictReader(file))
        assert [row["seed"] for row in read if "seed" in row] == [
            row["seed"] for row in rows if "seed" in row
        ]
        assert len(read) == len(rows)


class Page(HTMLParser):
    """What it refers to, its open tags at the end, and the JSON it carries."""

    VOID = ("meta", "br", "img", "link", "hr")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.outside, self.data, self.json = [], [], [], False
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.json = attributes.get("type") == "application/json"
        self.ids += [attributes["id"]] if "id" in attributes else []
        for key in ("src", "href", "xlink:href"):
            if not (attributes.get(key) or "#").startswith(("#", "data:")):
                self.outside.append(attributes[key])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.json = False

    def handle_data(self, data):
        if self.json:
            self.data.append(json.loads(data))


def test_page_is_whole_and_loads_nothing(report):
    text = (report[0] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and page.outside == []
    assert "@import" not in text and "url(http" not in text
    assert len(page.ids) == len(set(page.ids))
    assert [[token["text"] for token in tokens] for tokens in page.data] == [NASTY]
    assert "D<sup>L</sup>" in text and "D^L" not in text
    for title, _ in FIGURES.values():
        assert f'aria-label="{title}"' in text
    assert ">nan" not in text and "[nan" not in text


def test_view_shows_the_scores_of_its_rows(report):
    _, _, paths, path = report
    bank, gains = read_gains(paths)
    (view,) = read_views(path, bank, gains["seed1"], 16)
    assert view.prompt == "1 < 2?\n</script>"
    rows = np.flatnonzero(bank.sequence == 1)
    for name, column in (
        ("learnable", shape_variables(bank, 16)["D^L"]),
        ("C", bank.columns["C_16"]),
        ("gain", gains["seed1"]),
    ):
        np.testing.assert_allclose([t[name] for t in view.tokens], column[rows], atol=1e-5)


def test_mistakes_are_told_in_one_line(report, tmp_path):
    _, _, paths, _ = report
    for stored, message in (
        ("no JSON", "not a file that `score --view` wrote"),
        (json.dumps([]), "not a file that `score --view` wrote"),
        (json.dumps(stored_view("other")), "of bank other, the tables are of planted"),
        (json.dumps(stored_view(positions=9)), "sequence 1 has 9 positions, 10 in the tables"),
    ):
        view = tmp_path / "view.json"
        view.write_text(stored)
        with pytest.raises(ValueError, match=message):
            write_analysis(paths, tmp_path / "out", view)
    with pytest.raises(ValueError, match="--resamples: 20 is too few"):
        write_analysis(paths, tmp_path / "out", resamples=20)
    assert not (tmp_path / "out").exists()


def test_one_seed_draws_that_seed(report):
    bank, gains = read_gains(report[2][:1])
    tables = analyze(bank, gains, resamples=50)
    assert {row["seed"] for row in tables["table9_regression"]} == {"seed0"}
    assert list(figures.draw(tables, 16)) == list(FIGURES)


def test_pivot_marks_what_excludes_zero():
    rows = [
        {"name": "a", "K": 8, "estimate": 1.0, "low": 0.5, "high": 1.5},
        {"name": "a", "K": 16, "estimate": -1.0, "low": -2.0, "high": 0.5},
    ]
    table = pivot(rows, "name", "K", "K = {}")
    assert "<b>+1</b> <small>[+0.5, +1.5]</small>" in table
    assert '<td class="num">−1 <small>[−2, +0.5]</small>' in table


@pytest.mark.parametrize("name", ["ΔR² (+ C), 10⁻³", "ΔR² (decomposed), 10⁻³", "R² (baseline)"])
def test_an_in_sample_r2_is_never_marked(report, name):
    """More variables raise it, so that its interval excludes 0 without an effect, too."""
    rows = [row for row in report[1]["table9_regression"] if row["quantity"] == name]
    (row, *_) = [row for row in rows if row["seed"] == "seed0"]
    assert row["low"] > 0 or "decomposed" in name
    assert "<b>" not in pivot([row | {"low": 0.1}], "quantity", "K", "K = {}")
    assert "<b>" in pivot([row | {"low": 0.1, "quantity": "gap"}], "quantity", "K", "K = {}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_chosen_token_shows_what_both_models_say(report, browser, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.set_default_timeout(1e3 * patience(60))
    failures, requests = [], []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    url = (report[0] / "report.html").as_uri()
    page.goto(url)
    aside, tokens = page.locator("aside"), page.locator(".t")
    assert "No token chosen" in aside.inner_text()
    tokens.nth(2).click()
    assert tokens.nth(2).get_attribute("aria-selected") == "true"
    shown = aside.inner_text()
    assert "␣<" in shown and "learnable" in shown and "gain, nats" in shown
    assert "60.0 %" in shown and "</td>" in shown and "90.0 %" in shown
    page.keyboard.press("ArrowRight")
    assert aside.locator("h3").inner_text() == "b>"
    tokens.nth(6).hover()
    assert aside.locator("h3").inner_text() == "</script>"
    page.mouse.move(0, 0)
    assert aside.locator("h3").inner_text() == "b>"
    # Wide tables and figures scroll by themselves; the page does not.
    page.set_viewport_size({"width": 420, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    assert (failures, requests) == ([], [url])
    page.close()
