import importlib.machinery
import importlib.util
import io
import json
import re
import resource
import socket
import struct
import subprocess
import sys
import time
import types
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.patience import patience

from megatron_taopd.config import values
from megatron_taopd.config.schema import LogSection, RunSection
from megatron_taopd.evaluation.in_loop import Example
from megatron_taopd.monitoring.charts import HEIGHT, MOST_POINTS, WIDTH, ticks
from megatron_taopd.monitoring.monitor import Monitor
from megatron_taopd.monitoring.numbers import number, percent, seconds
from megatron_taopd.monitoring.progress import PLAIN_LINES
from megatron_taopd.monitoring.report import render_report
from megatron_taopd.monitoring.samples import Answers, Samples
from megatron_taopd.monitoring.sinks import truncate_records
from megatron_taopd.monitoring.summary import PHASES, column, summarize, summary_table

CONFIG = """\
run: {dir: runs/tiny, seed: 0}
student: {path: pairs/small, parallel: {tp: 2, pp: 1}}
teacher: {path: pairs/large, parallel: {tp: 1, pp: 2}}
selection: {selector: teachability, ratio: 0.10, k: 16}
loss: {kind: reverse_kl}  # <not a tag>
"""


def fake_metrics(step):
    """What the loop logs at one step; step 0 is the evaluation before training."""
    if step == 0:
        return {"eval/accuracy": 0.25, "time/eval": 1.0}
    metrics = {
        "loss": 2.0 / step,
        "grad_norm": 3.0 / step,
        "lr": 1e-3,
        "kept_rows": 10,
        "valid_rows": 100,
        "tokens_trained": 80,
        "tokens_rolled_out": 160,
        "time/step": 0.5,
        "rollout/logprob_gap_mean": 1e-7,
        "rollout/logprob_gap_max": 1e-6,
        "rollout/response_length_mean": 20.0,
        "rollout/truncated_share": 0.0,
    }
    metrics |= {f"time/{phase}": 0.05 * i for i, phase in enumerate(PHASES[:6], 1)}
    for score in ("disagreement", "compatibility", "student_entropy", "teacher_entropy"):
        metrics |= {f"scores/{score}_{q}": v for q, v in (("q05", 0.0), ("q50", 0.3), ("q95", 0.9))}
    if step % 10 == 0:
        metrics["eval/accuracy"] = 0.25 + step / 100
    return metrics


def fake_records(steps=30):
    return [{"step": step} | fake_metrics(step) for step in range(steps + 1)]


QUIETLY = LogSection(tensorboard=False)


def quiet():
    return Console(file=io.StringIO(), width=120)


@pytest.fixture
def make_monitor(tmp_path):
    def make(steps=30, console=None, log=QUIETLY, **options):
        run = RunSection(dir=str(tmp_path / "run"))
        return Monitor(run, log, steps, console=console or quiet(), **options)

    return make


def read(monitor):
    return [json.loads(line) for line in (monitor.run_dir / "metrics.jsonl").open()]


# --- records ------------------------------------------------------------------------------------


def test_prometheus_serves_the_newest_numbers(tmp_path):
    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = RunSection(dir=str(tmp_path), name="tiny")
    log = LogSection(tensorboard=False, prometheus_port=port)
    monitor = Monitor(run, log, 3, console=quiet())
    for step in (1, 2):
        monitor.log(step, {"loss": 2.0 / step, "time/step": 0.5, "broken": float("nan")})
    page = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert 'taopd_step{run="tiny"} 2.0' in page
    assert 'taopd_loss{run="tiny"} 1.0' in page and 'taopd_time_step{run="tiny"} 0.5' in page
    assert "broken" not in page
    monitor.close()
    Monitor(run, log, 3, console=quiet()).close()  # the port is free
    with socket.socket() as user:
        user.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        user.bind(("127.0.0.1", port))
        user.listen()
        with pytest.raises(ValueError, match=f"log.prometheus_port: {port} of 127.0.0.1: "):
            Monitor(run, log, 3, console=quiet())


def test_each_step_is_one_json_object(make_monitor):
    monitor = make_monitor()
    monitor.log(0, {"loss": torch.tensor(1.5), "kept_rows": 7})
    monitor.log(1, {"loss": 1.25, "grad_norm": float("nan"), "lr": float("inf")})
    assert read(monitor) == [
        {"step": 0, "loss": 1.5, "kept_rows": 7},
        {"step": 1, "loss": 1.25, "grad_norm": None, "lr": None},
    ]
    assert isinstance(read(monitor)[0]["kept_rows"], int)


def test_spans_of_a_step_add_up_and_start_anew_with_the_next(make_monitor):
    calls = []
    monitor = make_monitor(synchronize=lambda: calls.append("sync"))
    began = time.monotonic()
    for _ in range(2):
        with monitor.span("rollout"):
            calls.append("work")
            time.sleep(0.02)
    took = time.monotonic() - began
    with pytest.raises(RuntimeError), monitor.span("training"):
        raise RuntimeError
    assert calls[:3] == ["sync", "work", "sync"]
    first, second = monitor.log(0, {}), monitor.log(1, {})
    assert 0.04 <= first["time/rollout"] <= took
    assert first.keys() == {"step", "time/rollout", "time/training"}
    assert second.keys() == {"step"}


def test_a_resumed_run_takes_back_what_its_checkpoint_does_not_know(make_monitor):
    monitor = make_monitor()
    for step in range(6):
        monitor.log(step, {"loss": float(step)})
    with (monitor.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing

    resumed = make_monitor(first_step=4)
    assert [record["step"] for record in resumed.records] == [0, 1, 2, 3]
    resumed.log(4, {"loss": -4.0})
    assert [record["loss"] for record in read(resumed)] == [0, 1, 2, 3, -4]
    assert not list(resumed.run_dir.glob("*.tmp"))


def test_a_full_disk_keeps_lines_waiting(make_monitor):
    """The disk is full in the middle of a line; later there is room again."""
    terminal = io.StringIO()
    monitor = make_monitor(console=Console(file=terminal, width=200))
    monitor.log(1, {"loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (monitor.run_dir / "metrics.jsonl").stat().st_size + 5
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        monitor.log(2, {"loss": 2.0})
        monitor.log(3, {"loss": 3.0})
        monitor.write_report()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert terminal.getvalue().count("report.html: no space left; some of it is lost") == 1
    assert terminal.getvalue().count("metrics.jsonl: no space left; lines are kept") == 1
    monitor.log(4, {"loss": 4.0})
    assert [record["loss"] for record in read(monitor)] == [1, 2, 3, 4]


def test_only_the_torn_line_is_lost_when_nothing_is_taken_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step"')
    assert truncate_records(path, first_step=9) == [{"step": 0}, {"step": 1}]
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_other_ranks_time_their_spans_and_write_nothing(make_monitor, tmp_path):
    monitor = make_monitor(rank=1, log=LogSection())
    with monitor.span("rollout"):
        pass
    assert "time/rollout" in monitor.log(0, {"eval/accuracy": 0.5})
    monitor.write_report()
    monitor.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_finite_scalar(make_monitor):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = make_monitor(log=LogSection())
    for step in range(3):
        monitor.log(step, {"loss": 3.0 - step, "lr": float("nan")})
    monitor.close()
    events = EventAccumulator(str(monitor.run_dir / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert "lr" not in events.Tags()["scalars"]


def test_wandb_resumes_the_run_of_the_directory(make_monitor, monkeypatch):
    runs, logged = [], []
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.util = types.SimpleNamespace(generate_id=lambda: f"id{len(runs)}")
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    wandb.init = lambda **options: runs.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    log = LogSection(tensorboard=False, wandb_project="p")
    for first_step in (0, 1):
        monitor = make_monitor(log=log, config_yaml=CONFIG, first_step=first_step)
        monitor.log(first_step, {"loss": 1.0})
        monitor.close()
    assert [(r["project"], r["id"], r["name"]) for r in runs] == [("p", "id0", "run")] * 2
    assert runs[0]["config"]["selection"]["k"] == 16
    assert logged == [(0, {"step": 0, "loss": 1.0}), "end", (1, {"step": 1, "loss": 1.0}), "end"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "log, message",
    [
        (LogSection(), "log.tensorboard: true: tensorboard is not installed; pip install"),
        (
            LogSection(tensorboard=False, wandb_project="p"),
            "log.wandb_project: p: wandb is not installed; pip install wandb",
        ),
    ],
)
def test_a_missing_logger_is_refused_on_every_rank(
    make_monitor, monkeypatch, tmp_path, log, message, rank
):
    monkeypatch.setattr(values, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        make_monitor(rank=rank, log=log)
    assert not (tmp_path / "run").exists()


# --- progress -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [5, 160, 3000])
def test_without_a_terminal_progress_is_a_bounded_number_of_lines(make_monitor, steps):
    console = quiet()
    monitor = make_monitor(steps=steps, console=console)
    for step in range(1, steps + 1):
        monitor.log(step, {"loss": 1.0, "kept_rows": 10, "valid_rows": 1000})
    lines = console.file.getvalue().splitlines()
    assert min(steps, PLAIN_LINES) / 2 <= len(lines) <= PLAIN_LINES + 1
    assert lines[-1] == f"step {steps}/{steps}  loss 1  kept 10 of 1,000 rows"


def test_an_evaluation_always_gets_its_line(make_monitor):
    console = quiet()
    monitor = make_monitor(steps=1000, console=console)
    monitor.log(7, {"eval/accuracy": 0.296})
    assert console.file.getvalue() == "step 7/1000  accuracy 29.6 %\n"


def test_an_accuracy_is_shown_in_the_step_that_it_is_of(make_monitor):
    console = quiet()
    monitor = make_monitor(steps=4, console=console)
    for step, accuracy in ((1, {"eval/accuracy": 0.25}), (2, {}), (3, {})):
        monitor.log(step, {"loss": 1.0, **accuracy})
    lines = console.file.getvalue().splitlines()
    assert lines == ["step 1/4  loss 1  accuracy 25 %", "step 2/4  loss 1", "step 3/4  loss 1"]
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monitor = make_monitor(steps=4, console=console)
    monitor.log(1, {"loss": 1.0, "eval/accuracy": 0.25})
    monitor.log(2, {"loss": 2.0})
    monitor.close()
    assert re.search(r"2/4.*loss 2  accuracy 25 % at step 1", console.file.getvalue())


def test_in_a_terminal_one_line_redraws_itself(make_monitor):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monitor = make_monitor(steps=40, console=console)
    for step in range(1, 41):
        monitor.log(step, {"loss": 0.5, "time/step": 0.25})
    monitor.close()
    assert re.search(r"40/40.*loss 0\.5  250 ms/step", console.file.getvalue())


# --- report -------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags nest, and collects what a page is made of."""

    VOID = ("meta", "br", "path", "input")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.titles, self.text = [], [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        indentation = data.isspace() and "\n" in data
        if self.open and self.open[-1] not in ("style", "script") and not indentation:
            self.text += data
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


def test_the_report_needs_nothing_but_itself():
    html = render_report(fake_records(), "tiny", CONFIG)
    assert "http:" not in html and "https:" not in html and "url(" not in html
    assert not any({"src", "href"} & attributes.keys() for _, attributes in Page(html).tags)


def test_the_report_says_of_a_served_teacher_what_its_scores_are():
    served = CONFIG.replace(
        "path: pairs/large, parallel: {tp: 1, pp: 2}",
        "path: pairs/large, engine: sglang, form: topk, topk: 64",
    )
    text = Page(render_report(fake_records(), "tiny run", served)).text
    assert "large SGLang, top 64 (scores are bounds) → small TP2 PP1" in text
    text = Page(render_report(fake_records(), "tiny run", served.replace("topk,", "exact,"))).text
    assert "large SGLang → small TP2 PP1" in text


def test_the_report_states_the_figures_of_the_run():
    text = Page(render_report(fake_records(), "tiny run", CONFIG)).text
    for figure in (
        "tiny run",
        "large TP1 PP2 → small TP2 PP1",
        "selector teachability at 10 % of rows",
        "25 % → 55 %",
        "+30.0 points",
        "300 of 3,000 response rows",
        "2,400 of 4,800 rolled out",
        "500 ms",
        "ratio: 0.10",
        "<not a tag>",
    ):
        assert figure in text, figure


def test_a_chart_is_drawn_for_what_was_logged_and_only_that():
    titles = Page(render_report(fake_records(), "tiny")).titles
    assert len(titles) == 14  # 13 charts and the table of times
    titles = Page(render_report([{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}], "t")).titles
    assert titles == ["Loss"]
    assert Page(render_report([], "empty")).titles == []


def test_a_run_without_loss_or_change_can_be_drawn():
    """A model distilled from itself: zeros, and numbers near the end of what floats resolve."""
    for value in (0.0, 1e-15, 5e-324):
        records = [{"step": s} | {k: value for k in fake_metrics(1)} for s in (1, 2)]
        assert "Disagreement D" in Page(render_report(records, "self")).titles


@pytest.mark.parametrize("steps", [1, 30, 2000])
def test_every_curve_stays_inside_its_frame(steps):
    page = Page(render_report(fake_records(steps), "tiny"))
    drawn = ("line", "area", "band", "raw")
    paths = [a["d"] for tag, a in page.tags if tag == "path" and a["class"] in drawn]
    assert len(paths) >= 14
    for path in paths:
        points = [tuple(map(float, p.split())) for p in re.split("[MLZ]", path) if p]
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
        assert len(points) <= 2 * MOST_POINTS


def test_hovering_a_chart_has_its_values_to_show():
    html = render_report(fake_records(), "tiny")
    chart = html[html.index("Disagreement D") :]
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', chart)[1])
    assert data["labels"] == ["D"]
    step, x, values = data["at"][0]
    assert (step, values) == (1, {"0": "0.3 (0 – 0.9)"})
    assert x == 0 and data["at"][-1][1] == 100  # percent from the left


def test_pointing_at_a_chart_shows_its_values(browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(render_report(fake_records(), "tiny", CONFIG), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(1e3 * patience(60))
    failures, requests = [], []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    figure = page.locator("figure", has_text="What is trained on")
    tip, cursor = figure.locator(".tip"), figure.locator(".cursor")
    assert tip.is_hidden()
    figure.locator("svg").hover()
    assert tip.inner_text().split("\n")[1:] == [
        "kept rows / response rows 10 %",
        "tokens trained / rolled out 50 %",
    ]
    assert tip.inner_text().startswith("step 1")  # 15 or 16, in the middle
    assert re.fullmatch(r"M[\d.]+ 0V200", cursor.get_attribute("d"))
    page.mouse.move(0, 0)
    assert tip.is_hidden() and cursor.get_attribute("d") == ""
    page.set_viewport_size({"width": 420, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    assert (failures, requests) == ([], [path.as_uri()])
    page.close()


def test_the_readmes_picture_is_an_abridged_report(browser, tmp_path):
    tool = [sys.executable, "tools/report_picture.py", str(tmp_path)]
    options = ["--out", str(tmp_path / "docs" / "report.png")]
    refused = subprocess.run([*tool, *options], capture_output=True, text=True)
    assert refused.returncode == 2
    assert (
        refused.stderr
        == f"error: {tmp_path}/report.html: no such file; a run writes it at its end\n"
    )
    (tmp_path / "report.html").write_text(render_report(fake_records(), "tiny", CONFIG))
    heights = []
    for charts in ("2", "4"):
        subprocess.run([*tool, *options, "--charts", charts], check=True)
        picture = (tmp_path / "docs" / "report.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", picture[16:24])
        assert width == 1200
        heights.append(height)
    assert heights[0] < heights[1] < 2400  # of twelve charts it would be more


HELD_OUT = [
    Example("2 + 2?", "so <b> = 4", "4", "4", True),
    Example("3 + 3?", "word " * 1000, "", "6", False),
]


def test_answers_to_held_out_prompts_are_marked_right_and_wrong_in_words(make_monitor):
    monitor = make_monitor(config_yaml=CONFIG + "eval: {temperature: 0.0}\n")
    monitor.keep_answers(0, HELD_OUT)
    monitor.log(0, {"eval/accuracy": 0.5})
    page = Page(monitor.report_path.read_text())
    assert "Held-out prompts, as the student answers them" in page.titles
    assert "2 + 2?before trainingso <b> = 4right · it says 4; the reference is 4" in page.text
    assert "wrong · it states no answer; the reference is 6" in page.text
    assert page.text.count("word ") < 600  # the middle of a long one is left out
    assert "The first ones of the last evaluation, greedy; of each" in page.text
    assert "tokens kept" not in page.text and "Rollouts" not in "".join(page.titles)


def test_the_same_prompt_is_shown_before_and_after_training(make_monitor):
    monitor = make_monitor(config_yaml=CONFIG)
    monitor.keep_answers(0, [Example("3 + 3?", "9", "9", "6", False)])
    monitor.keep_answers(10, [Example("3 + 3?", "8", "8", "6", False)])
    monitor.keep_answers(20, [*HELD_OUT[:1], Example("3 + 3?", "6", "6", "6", True)])
    monitor.write_report()
    page = Page(monitor.report_path.read_text())
    assert "Held-out prompts, before and after training" in page.titles
    assert (
        "3 + 3?before training9wrong · it says 9; the reference is 6"
        "after step 206right · it says 6; the reference is 6"
    ) in page.text
    assert "2 + 2?before trainingnot asked" in page.text
    again = Samples.read(monitor.run_dir / "samples.json", before=20)
    assert [each.step for each in again.evaluations] == [0]
    assert isinstance(again.evaluations[0], Answers)


@pytest.mark.parametrize(
    "section, words",
    [
        ("eval: {temperature: 0.0, samples: 1}\nrollout: {top_p: 0.9, top_k: 5}", "greedy"),
        ("eval: {temperature: 0, samples: 1}", "greedy"),
        (
            "eval: {temperature: 0.7, samples: 1}\nrollout: {top_p: 1.0, top_k: 0}",
            "temperature 0.7",
        ),
        (
            "eval: {temperature: 1.0, samples: 4}\nrollout: {top_p: 0.9, top_k: 20}",
            "temperature 1, top-p 0.9, top-k 20, mean of 4 responses",
        ),
        ("loss: {kind: reverse_kl}", ""),
    ],
)
def test_the_report_says_how_responses_were_drawn(section, words):
    text = Page(render_report(fake_records(), "tiny", section)).text
    assert f"+30.0 points{', ' * bool(words)}{words}" in text
    assert f"{words}{', ' * bool(words)}checkable answers" in text
    assert ("greedy" in text.replace(section, "")) == (words == "greedy")


def test_the_table_shows_no_change_where_there_was_one_evaluation():
    console = quiet()
    console.print(summary_table([{"step": 0, "eval/accuracy": 0.25}, {"step": 1, "loss": 1.0}]))
    text = re.sub(r"[ │]+", " ", console.file.getvalue())
    assert "held-out accuracy 25 % one evaluation" in text and "points" not in text


def test_the_report_is_there_after_each_evaluation_and_at_the_end(make_monitor):
    monitor = make_monitor(config_yaml=CONFIG)
    monitor.log(1, fake_metrics(1))
    assert not monitor.report_path.exists()
    monitor.log(10, fake_metrics(10))
    assert "Held-out accuracy" in monitor.report_path.read_text()
    monitor.log(11, fake_metrics(11))
    monitor.keep_answers(11, [Example("why?", "because", "", "so", False)])
    monitor.close()
    assert "because" in monitor.report_path.read_text()
    assert "Megatron TA-OPD" in monitor.report_path.read_text()
    assert sorted(path.name for path in monitor.run_dir.iterdir()) == [
        "metrics.jsonl",
        "report.html",
        "samples.json",
        "sessions.json",
    ]


# --- figures ------------------------------------------------------------------------------------


def test_summary_of_a_run():
    summary = summarize(fake_records(30))
    assert (summary["accuracy_first"], summary["accuracy_last"]) == (0.25, 0.55)
    assert summary["loss_first"] == pytest.approx((2 + 1 + 2 / 3) / 3)
    assert (summary["kept_rows"], summary["valid_rows"]) == (300, 3000)
    assert summary["step_time"] == 0.5
    assert list(summary["phases"]) == [*reversed(PHASES[:6]), "eval"]
    assert summary["phases"]["rollout"] == pytest.approx(30 * 0.05)


def test_summary_of_what_was_not_logged_is_none():
    summary = summarize([{"step": 1, "loss": None}])
    assert {key for key, value in summary.items() if value is not None} == {"steps", "phases"}


def test_the_summary_table_tells_the_end_of_the_run():
    console = quiet()
    console.print(summary_table(fake_records(), "runs/tiny/report.html"))
    text = re.sub(r"[ │]+", " ", console.file.getvalue())
    for line in (
        "held-out accuracy 25 % → 55 % +30.0 points",
        "rows kept 300 of 3,000 10 %",
        "tokens trained 2,400 of 4,800 50 %",
        "rollout 1.5 s",
        "report: runs/tiny/report.html",
    ):
        assert line in text


def test_a_column_leaves_out_what_is_missing_or_not_finite():
    records = [
        {"step": 0},
        {"step": 1, "a": None},
        {"step": 2, "a": 3},
        {"step": 3, "a": torch.nan},
    ]
    assert column(records, "a") == [(2, 3.0)]


@settings(derandomize=True, max_examples=500, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
@example(0.0, 1e-15)  # the loss of a model distilled from itself
@example(0.0, 0.0)
@example(0.0, 5e-324)
def test_ticks_are_few_and_enclose_the_range(low, span):
    high = low + span
    values = ticks(low, high)
    assert 2 <= len(values) <= 7
    slack = max(1e-6 * max(abs(low), abs(high)), 1e-300)
    assert values[0] <= low + slack and values[-1] >= high - slack
    assert values == sorted(set(values))


@pytest.mark.parametrize(
    "text, expected",
    [
        (number(0), "0"),
        (number(0.48571), "0.486"),
        (number(2.1e-7), "2.1e−7"),
        (number(1480), "1,480"),
        (number(23_791), "23.8k"),
        (number(-1.5e6), "-1.5M"),
        (percent(0.494), "49.4 %"),
        (percent(0.1), "10 %"),
        (percent(0.0002), "0.02 %"),
        (percent(0), "0 %"),
        (seconds(0.0042), "4.2 ms"),
        (seconds(12.34), "12.3 s"),
        (seconds(91), "1.52 min"),
        (seconds(7200), "2 h"),
    ],
)
def test_figures_read_well(text, expected):
    assert text == expected
