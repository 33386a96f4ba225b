"""report.html as a person meets it: in a browser, on every screen, with keyboard and colours."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from support.made_up_run import CONFIG, made_up_kept, made_up_look, made_up_records
from support.patience import patience

from megatron_taopd.monitoring.report import changed_keys, paired, render_report
from megatron_taopd.monitoring.summary import phase_times, summarize

# Every text that is seen, its size on the screen, and its contrast to what is behind it (WCAG 2.1).
TEXTS = """() => {
  const parse = (css) => {
    const [r, g, b, a = 1] = css.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = ([r, g, b, a], [R, G, B]) => [r, g, b].map((v, i) => a * v + (1 - a) * [R, G, B][i]);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) =>
      v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      layers.push(parse(getComputedStyle(at).backgroundColor));
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const found = new Map();
  const walk = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  for (let node; node = walk.nextNode();) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("script") || !element.checkVisibility()) continue;
    const style = getComputedStyle(element), ground = behind(element);
    const ink = over(parse(style.color), ground);
    const [light, dark] = [luminance(ink), luminance(ground)].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    const size = parseFloat(style.fontSize);
    const where = `${element.tagName}.${element.className}`;
    const key = `${where} ${style.color} on ${ground.map(Math.round)}`;
    found.set(key, {size, ratio, text: node.data.trim().slice(0, 30)});
  }
  return [...found].map(([where, rest]) => ({where, ...rest}));
}"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    place = tmp_path_factory.mktemp("page") / "report.html"
    html = render_report(made_up_records(), "made up", CONFIG, made_up_kept())
    place.write_text(html, encoding="utf-8")
    return place


@pytest.fixture
def open_page(browser, path):
    """Opens the report; at the end nothing went wrong in it, and nothing else was asked for."""
    failures, requests, pages = [], [], []

    def opened(width=1280, scheme="light", of=path):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(1e3 * patience(60))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("console", lambda message: failures.append(message.text))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(of.as_uri())
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert failures == [] and set(requests) <= {path.as_uri()}


@pytest.mark.parametrize("count", [4, 16])
def test_a_run_of_300_steps_is_at_most_a_megabyte(count):
    html = render_report(made_up_records(300), "made up", CONFIG, made_up_kept(count))
    assert len(html.encode()) <= 1_000_000


def test_what_is_left_out_is_said(path):
    html = path.read_text()
    said = re.search(r"Not all is shown: (.*)\.</p>", html)[1]
    assert "lines of more than 240 steps are means of neighbouring steps" in said
    assert "the plane of step 300 shows 374 of 1,120 kept tokens and 388 of 10,080 others" in said
    assert "of long responses the first tokens are shown" in said


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_it_can_be_read_on_every_screen(open_page, width, scheme):
    page = open_page(width, scheme)
    page.locator("details summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    texts = page.evaluate(TEXTS)
    assert len(texts) > 30
    assert [text for text in texts if text["size"] < 11] == []
    assert [text for text in texts if text["ratio"] < 4.5] == []
    for part in (".axes .y", ".axes .x"):
        boxes = page.locator(part).evaluate_all(
            "all => all.filter((e) => e.checkVisibility()).map((e) => e.getBoundingClientRect())"
        )
        assert all(box["left"] >= 0 and box["right"] <= width for box in boxes), part


def test_texts_of_an_axis_do_not_meet(open_page):
    page = open_page(390)
    for axes in page.locator(".plot:not(.plane) .axes").all():
        boxes = axes.locator(".x").evaluate_all("all => all.map((e) => e.getBoundingClientRect())")
        for left, right in pairwise(boxes):
            assert left["right"] < right["left"]


def test_every_control_does_something(open_page):
    page = open_page()
    looks = page.locator("[data-step]")
    assert looks.nth(0).is_hidden() and looks.nth(1).is_visible()
    page.get_by_label("1, the first").click()
    assert looks.nth(0).is_visible() and looks.nth(1).is_hidden()
    page.get_by_label("300, the newest").click()
    assert looks.nth(1).is_visible()
    whole = page.locator("details pre")
    assert whole.is_hidden()
    page.locator("details summary").click()
    assert "ratio: 0.10" in whole.inner_text()
    for plot in page.locator(".plot:not(.plane)").all():
        plot.scroll_into_view_if_needed()
        plot.locator(".frame").hover()
        assert plot.locator(".tip").is_visible()
        assert plot.locator(".tip").inner_text().startswith("step ")


def test_a_token_shows_all_its_scores(open_page):
    page = open_page()
    article = page.locator("[data-step='300'] article.tokens").first
    response = made_up_look(300).responses[0]
    at = response.kept.index(True)
    token, tip = article.locator(".t").nth(at), article.locator(".tip")
    token.click()
    assert token.get_attribute("aria-selected") == "true" and token.evaluate(
        "e => e.matches('mark')"
    )
    scores = {name: values[at] for name, values in response.scores.items()}
    shown = dict(zip(*[iter(tip.locator("dt, dd").all_inner_texts())] * 2, strict=True))
    expected = {
        "D, nats": scores["D"],
        "C": scores["C"],
        "D̃": scores["d"],
        "C̃": scores["c"],
        "D̃·C̃, learnable": scores["d"] * scores["c"],
        "D̃·(1−C̃), incompatible": scores["d"] * (1 - scores["c"]),
        "log p, student": scores["log_p"],
        "log p, teacher": scores["log_q"],
        "entropy, student": scores["student"],
        "entropy, teacher": scores["teacher"],
    }
    assert shown.pop("rank") == str(scores["rank"])
    assert {name: float(value) for name, value in shown.items()} == pytest.approx(
        expected, rel=6e-3
    )
    assert "learnable, kept" in tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert article.locator(".t").nth(at + 1).evaluate("e => e === document.activeElement")
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_the_keyboard_reaches_everything(open_page):
    page = open_page()
    stops = page.locator("main").evaluate(
        "main => [...main.querySelectorAll('[tabindex=\"0\"], input, summary')]"
        ".filter((e) => e.checkVisibility()).length"
    )
    reached = set()
    for _ in range(stops):
        page.keyboard.press("Tab")
        seen = page.evaluate(
            "() => { const e = document.activeElement, s = getComputedStyle(e);"
            " return [e.className + e.tagName + [...document.querySelectorAll('*')].indexOf(e),"
            " s.outlineStyle]; }"
        )
        assert seen[1] != "none", seen
        reached.add(seen[0])
    assert len(reached) >= stops - 1  # the two radio buttons are one stop
    chart = page.locator("figure", has_text="Gradient norm").locator(".plot")
    chart.focus()
    page.keyboard.press("End")
    assert chart.locator(".tip").inner_text().startswith("step 299")  # the last of means of two
    page.keyboard.press("ArrowLeft")
    assert chart.locator(".tip").inner_text().startswith("step 297")
    plane = page.locator(".plane:visible")
    plane.focus()
    page.keyboard.press("ArrowRight")
    assert "kept" in plane.locator(".tip").inner_text()


def test_a_screen_reader_has_names_for_everything(open_page):
    page = open_page()
    unnamed = page.evaluate(
        "() => [...document.querySelectorAll('[role=img], [role=group], [role=listbox]')]"
        ".filter((e) => !e.getAttribute('aria-label')).length"
    )
    assert unnamed == 0
    accuracy = page.get_by_role("img", name=re.compile("^Held-out accuracy: "))
    assert accuracy.get_attribute("aria-label") == (
        "Held-out accuracy: accuracy 28 % at step 0, 68 % at step 300"
    )
    plane = page.get_by_role("img", name=re.compile("^The D–C plane: learnable"))
    assert re.search(r"learnable: [\d.]+ % of all tokens", plane.get_attribute("aria-label"))
    headings = page.get_by_role("heading").all_inner_texts()
    assert headings[0] == "made up" and "Where the time went" in headings


def test_the_clip_line_stands_at_its_value(open_page):
    figure = open_page().locator("figure", has_text="Gradient norm")
    assert "before clipping at 2, which " in figure.inner_text()
    assert figure.locator(".rule").inner_text() == "optimizer.clip 2"
    rule = figure.locator(".limit").bounding_box()
    tick = figure.locator(".axes .y", has_text=re.compile("^2$")).bounding_box()
    assert rule["y"] + rule["height"] / 2 == pytest.approx(tick["y"] + tick["height"] / 2, abs=1.5)


def test_phases_add_up_to_the_steps_time():
    records = made_up_records()
    phases = summarize(records)["phases"]
    steps = sum(record.get("time/step", 0) for record in records)
    evaluations = sum(record.get("time/eval", 0) for record in records)
    assert sum(phases.values()) == pytest.approx(steps + evaluations)
    assert phases["other"] == pytest.approx(0.1 * steps)
    assert dict(phase_times(records, "other"))[7] == pytest.approx(0.1 * records[7]["time/step"])


def test_the_page_says_what_ran_where(path):
    text = re.sub(r"<[^>]+>", " ", path.read_text())
    for said in (
        r"Hardware\s+4 ranks, An accelerator, 80 GiB",
        r"Versions\s+Python 3.11.7, torch 2.13.0",
        r"Started\s+2026-01-02 03:04:05 UTC",
        r"Duration\s+6.67 min in 2 starts",
        r"Best checkpoint\s+step 280, accuracy 65.3 %: runs/made_up/checkpoints/step_00000280",
        r"Student\s+runs/made_up/student \(a Hugging Face directory\)",
        r"95 % interval 65 – 71",
    ):
        assert re.search(said, text), said


def test_tokens_per_second_are_those_of_all_ranks_and_of_each_device(path):
    html = path.read_text()
    chart = html[html.index("<h2>Tokens per second") :]
    at = re.search(r'<script type="application/json">(.*?)</script>', chart)[1]
    numbers = [
        [float(v.replace(",", "").replace("k", "e3")) for v in pair]
        for pair in re.findall(r'\{"0":"([\d.,k]+)","1":"([\d.,k]+)"\}', at)
    ]
    assert numbers[0][0] / numbers[0][1] == pytest.approx(2, rel=0.01)  # of two ranks
    assert numbers[-1][0] / numbers[-1][1] == pytest.approx(4, rel=0.01)  # later of four


def test_keys_that_differ_from_their_defaults():
    changed = {
        key: (value, default)
        for key, value, default in changed_keys(
            {
                "run": {"dir": "runs/a", "seed": 0},
                "train": {"steps": 7, "precision": "fp32"},
                "optimizer": {"clip": 1.0},
                "eval": {"pass_at": [1, 2], "prompts": None},
            }
        )
    }
    assert changed.pop("run.dir") == ("runs/a", "required")
    assert changed.pop("eval.pass_at") == ("[1, 2]", "[]")
    assert changed.pop("train.steps")[0] == "7"
    assert "run.seed" not in changed and "optimizer.clip" not in changed


def test_no_evaluation_has_no_pairs():
    assert paired([]) == []
