"""Bars and lines of long phases, on a clock that the tests make fast."""

from __future__ import annotations

import io
import threading
import time

import pytest
from rich.console import Console
from support.patience import wait_for

from megatron_taopd.parallel import progress, watchdog
from megatron_taopd.parallel.progress import Display, Phase, clock, phase, track


@pytest.fixture
def log(monkeypatch):
    """A display on something that is no terminal, whose first line comes after 50 ms."""
    shown = Display(Console(file=io.StringIO(), width=120))
    monkeypatch.setattr(progress, "QUIET_S", 0.05)
    monkeypatch.setattr(progress, "_display", shown)
    return shown


def lines(display: Display) -> list[str]:
    return display.console.file.getvalue().splitlines()


def said(display: Display, count: int) -> None:
    wait_for(lambda: len(lines(display)) >= count)


def test_a_short_phase_says_nothing(log, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_S", 60.0)
    assert list(track([1, 2, 3], None, "tokenising")) == [1, 2, 3]
    assert lines(log) == []


def test_a_long_phase_says_how_far_it_is_and_what_is_left(log):
    began = time.monotonic()
    with phase("converting", 4000, unit="MB") as shown:
        shown.began -= 30  # as if it had begun half a minute ago
        shown.advance(1000)
        said(log, 1)
        late = round(time.monotonic() - began)
    assert lines(log)[0] == "converting: 1,000/4,000 MB, 0:00:30, 0:01:30 left" or late
    assert lines(log)[-1].startswith("converting: done in 0:00:3")


def test_lines_get_rarer(log):
    """In 64 periods there are lines after 1, 2, 4, 8, 16 and 32 of them, not 64."""
    with phase("waiting"):
        time.sleep(64 * progress.QUIET_S)
    assert 2 <= len(lines(log)) <= 8


def test_a_phase_of_known_length_counts_down():
    shown = Phase("waiting for servers", seconds=900)
    shown.began -= 100
    assert str(shown) == "waiting for servers: 0:01:40, 0:13:20 left"
    shown.began -= 1000  # longer than it was to take
    assert shown.completed == 900 and shown.left == 0


def test_what_was_done_before_says_nothing_of_the_pace():
    """A run of 100 steps that is resumed after 60 and has taken 10 in 50 s."""
    run = Phase("steps", 100, before=60)
    assert run.left is None
    run.began -= 50
    run.done = 70
    assert str(run) == "steps: 70/100, 0:00:50, 0:02:30 left"


def test_what_nobody_knows_is_not_said():
    shown = Phase("loading")
    assert shown.left is None and str(shown) == "loading: 0:00:00"
    shown.advance(5, total=20)
    assert shown.count == "5/20" and shown.total == 20


def test_items_are_counted_and_are_signs_of_life(log, monkeypatch):
    beats = []
    monkeypatch.setattr(watchdog, "heartbeat", lambda: beats.append(1))
    seen = []
    for item in track(iter("abc"), 3, "tokenising"):
        seen.append(log._phases[-1].done)
        assert item in "abc"
    assert seen == [0, 1, 2] and len(beats) == 3 and log._phases == []
    for _ in track([1, 2, 3], None, "left early"):
        break
    assert log._phases == []


def test_of_nested_phases_the_innermost_speaks(log):
    """Before it begins and when it is over, the outer one may have said something, too."""
    with phase("rollout"), phase("responses", 8):
        said(log, 3)
    going_on = [line for line in lines(log) if ": done in" not in line]
    inner = [i for i, line in enumerate(going_on) if line.startswith("responses: 0/8")]
    assert len(inner) >= 2 and inner == [*range(inner[0], inner[-1] + 1)]


def test_what_is_hushed_stays_out_of_a_log(log):
    with log.hushed(), phase("rollout"):
        time.sleep(4 * progress.QUIET_S)
    assert lines(log) == []


def test_other_ranks_show_nothing(log, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with phase("loading"):
        time.sleep(4 * progress.QUIET_S)
        assert log._phases == []
    assert lines(log) == []


def test_in_a_terminal_there_are_bars_that_go(monkeypatch):
    terminal = Display(Console(file=io.StringIO(), force_terminal=True, width=120))
    monkeypatch.setattr(progress, "SHOWN_S", 0.01)
    monkeypatch.setattr(progress, "_display", terminal)

    def drawn(text: str) -> bool:
        return text in terminal.console.file.getvalue()

    with phase("loading [weights]", 8) as shown:
        shown.advance(2)
        wait_for(lambda: drawn("2/8") and drawn("loading [weights]"))
        with phase("waiting for servers", seconds=900):
            wait_for(lambda: drawn("waiting for servers"))
        assert terminal._bars is not None
    assert terminal._bars is None, "the terminal is given back"


def test_a_narrow_terminal_cuts_texts_but_neither_a_count_nor_a_countdown():
    """The line of the steps is long, and a wait for servers is shown below it."""
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    steps, waiting = Phase("steps", 10), Phase("waiting for rollout.servers", seconds=900)
    steps.began, steps.done, waiting.began = steps.began - 60, 4, waiting.began - 100
    bars = progress._Bars(terminal)
    bars.add_phase(steps, "loss 0.5  kept 122 of 1,213 rows  300 ms/step  1,234 tokens/s/GPU")
    bars.add_phase(waiting, waiting.what)
    terminal.print(*bars.get_renderables())
    first, second = terminal.file.getvalue().splitlines()
    assert "━" in first and " 4/10 0:01:00, 0:01:30 left loss 0.5  kept" in first
    assert first.rstrip().endswith("…") and len(first) == 80
    assert "━" in second and " 0:01:40, 0:13:20 left waiting for rollout.servers" in second


def test_phases_of_several_threads(log):
    with phase("building"):
        inside = threading.Event()

        def work():
            with phase("servers"):
                inside.set()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert inside.is_set() and log._phases == []


def test_durations_read_as_in_bars():
    assert [clock(s) for s in (0.4, 83, 3600)] == ["0:00:00", "0:01:23", "1:00:00"]
