"""What all commands do alike, whichever way they are called."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from support.patience import run
from support.ranks import run_ranks

from megatron_taopd import cli
from megatron_taopd.cli import common, compare

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "examples" / "tiny_pair.yaml")
TOOLS = {
    "convert": "convert", "diagnose": "diagnose", "doctor": "doctor", "evaluate": "evaluate",
    "plan": "plan", "serve": "serve", "compare_runs": "compare runs",
    "compare_selectors": "compare selectors", "compare_teachers": "compare teachers",
    "fixed_context_kl": "compare students",
}  # fmt: skip
# Of each command, arguments with one mistake, and what the line has to name.
WRONG = {
    "an unknown command": (["trian"], "no command 'trian'; there are train, launch"),
    "an unknown comparison": (["compare", "RUN"], "no command 'RUN'; there are runs, selectors"),
    "train": (["train", TINY, "optimizer.learning_rate=1"], "optimizer.learning_rate: unknown key"),
    "launch": (["launch", "x.py"], "TAOPD_LOG_LEVEL: loud; it has to be one of debug, info"),
    "train, no file": (["train", "nowhere.yaml"], "nowhere.yaml"),
    "doctor": (["doctor", TINY, "optimizer.learning_rate=1"], "unknown key"),
    "doctor, no number": (["doctor", TINY, "--ranks", "many"], "--ranks: invalid int value"),
    "plan": (["plan", TINY], "--gpus"),
    "plan, no place": (["plan", TINY, "--gpus", "1", "--json", "nowhere/plan.json"], "--json: "),
    "serve": (["serve", "MODEL", "--host", "0.0.0.0"], "--host: 0.0.0.0 without --api-key-env"),
    "convert": (
        ["convert", "to-megatron", "--hf", "nowhere", "--out", "out", "--quiet"], "no config.json"
    ),
    "convert, no option": (["convert", "to-hf", "--hf", "x", "--to", "y"], "--megatron"),
    "verify": (
        ["verify", "--no-logits", "--quiet", "--hf", "nowhere", "--megatron", "nowhere"],
        "nowhere: no ",
    ),
    "verify, no number": (
        ["verify", "--hf", "a", "--megatron", "b", "--tokens", "1"], "--tokens: 1; it has to be"
    ),
    "evaluate": (["evaluate", "--data", "data", "--out", "out"], "either checkpoints or --url"),
    "diagnose": (
        ["diagnose", "gain", "--before", "a.parquet", "--after", "b.parquet", "--out", "c"],
        "a.parquet",
    ),
    "diagnose, nothing": (["diagnose"], "command"),
    "compare runs": (["compare", "runs", "nowhere", "--out", "out"], "no such file"),
    "compare selectors": (["compare", "selectors", TINY], "--out"),
    "compare students": (
        ["compare", "students", "--teacher", "t", "--students", "s", "--limit", "x"],
        "--limit: invalid int value",
    ),
    "compare teachers": (
        ["compare", "teachers", TINY, "--set", "data.prompts=none.jsonl"], "none.jsonl: no such"
    ),
}  # fmt: skip


def call(*arguments: str) -> int | str | None:
    try:
        return cli.main([*arguments])
    except SystemExit as refusal:  # argparse's
        return refusal.code


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    arguments, named = WRONG[case]
    if case == "launch":  # whose other arguments are torchrun's
        monkeypatch.setenv("TAOPD_LOG_LEVEL", "loud")
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err, err
    assert out == "" and not list(tmp_path.iterdir())


def test_every_command_is_tried():
    tried = {
        " ".join(arguments[: 1 + (arguments[0] == "compare")]) for arguments, _ in WRONG.values()
    }
    commands = set(cli.COMMANDS) - {"compare"}
    assert commands | {f"compare {name}" for name in compare.COMMANDS} <= tried


def test_the_list_of_commands_does_not_wait_for_torch():
    heavy = "print([name for name in ('torch', 'transformers', 'rich') if name in sys.modules])"
    code = f"import sys; from megatron_taopd import cli; print(cli.main(['--help'])); {heavy}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *shown, status, loaded = done.stdout.splitlines()
    assert (status, loaded) == ("0", "[]")
    for command in cli.COMMANDS:
        assert any(line.split()[:1] == [command] for line in shown), command


def test_public_names_come_when_they_are_asked_for():
    import megatron_taopd

    for name in megatron_taopd.__all__:
        assert getattr(megatron_taopd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        megatron_taopd.nothing  # noqa: B018


def test_no_command_is_a_mistake_and_help_is_none(capsys):
    assert call() == 2 and call("compare") == 2
    assert call("-h") == 0 and call("compare", "--help") == 0
    assert "usage: taopd COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("command", [*cli.COMMANDS, *(f"compare {c}" for c in compare.COMMANDS)])
def test_every_command_has_help(capsys, command):
    assert call(*command.split(), "--help") == 0
    assert len(capsys.readouterr().out) > 100


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_is_its_command(tool):
    text = (ROOT / "tools" / f"{tool}.py").read_text()
    module = f"megatron_taopd.cli.{TOOLS[tool].replace(' ', '.')}"
    assert f"from {module} import main" in text and f"`taopd {TOOLS[tool]}`" in text


def test_a_tool_and_the_package_run_as_scripts(tmp_path):
    scripts = (["-m", "megatron_taopd", "compare", "runs"], [str(ROOT / "tools/compare_runs.py")])
    for script in scripts:
        done = run([sys.executable, *script, "nowhere", "--out", tmp_path], seconds=60)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ----------------------------------------------------------------------- the rules, one at a time


def arguments_of(path=None, out=None) -> argparse.Namespace:
    return argparse.Namespace(json=path, out=out)


def test_only_a_users_mistake_is_caught(capsys):
    def raises(error):
        def work(_):
            raise error

        return work

    assert common.run(lambda _: 1, arguments_of()) == 1
    assert common.run(raises(ValueError("key: 3;\n  give 4")), arguments_of()) == 2
    assert common.run(raises(FileNotFoundError(2, "No such file", "there")), arguments_of()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error: key: 3; give 4", "error: [Errno 2] No such file: 'there'"]
    for error in (RuntimeError("a bug"), AssertionError(), KeyError("k")):
        with pytest.raises(type(error)):
            common.run(raises(error), arguments_of())


def fail_on(rank: int, message: str) -> tuple[int, str]:
    """Fail on one rank (-1: on each) and leave the others alone in a collective."""
    import os
    from contextlib import redirect_stderr
    from io import StringIO

    import torch.distributed as dist

    from megatron_taopd.parallel.objects import anyone_was

    def work(_):
        if rank in (-1, int(os.environ["RANK"])):
            raise ValueError(message)
        while not anyone_was(common.FAILURE):
            pass
        raise RuntimeError("connection closed by peer")

    common.FAILURE = message  # a place of its own in the store of a pool that others use, too
    with redirect_stderr(StringIO()) as said:
        status = common.run(work, argparse.Namespace())
    dist.barrier()
    return status, said.getvalue()


@pytest.mark.parametrize("rank", [1, -1])
def test_one_rank_says_what_is_wrong(rank):
    found = run_ranks(2, fail_on, rank, f"file: damaged, seen by {rank}")
    assert [status for status, _ in found] == [2, 2]
    (line,) = [said for _, said in found if said]
    assert line.startswith("error on rank ") and line.count("\n") == 1 and "file: damaged" in line


def test_before_there_is_a_group_a_host_says_it_once(monkeypatch, capsys):
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setenv("RANK", f"{8 + int(local_rank)}")
        monkeypatch.setenv("WORLD_SIZE", "16")
        common.refuse("key: 3")
    assert capsys.readouterr().err == "error on rank 8: key: 3\n"


def test_figures_are_written_by_rank_0_into_a_directory_that_is_there(tmp_path, monkeypatch):
    common.check_json(arguments_of())
    common.check_json(arguments_of(tmp_path / "figures.json"))
    common.check_json(arguments_of(tmp_path / "out" / "figures.json", tmp_path / "out"))
    with pytest.raises(ValueError, match=f"--json: {tmp_path}/nowhere: no such directory"):
        common.check_json(arguments_of(tmp_path / "nowhere" / "figures.json"))
    common.write_json(None, {})
    common.write_json(tmp_path / "figures.json", {"a": [1, 2.5]})
    text = (tmp_path / "figures.json").read_text()
    assert json.loads(text) == {"a": [1, 2.5]} and text.endswith("}\n")
    monkeypatch.setenv("RANK", "1")
    common.write_json(tmp_path / "other.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_tables_are_as_wide_in_a_pipe_as_they_need_and_come_from_rank_0(monkeypatch, capsys):
    table = Table(*(f"column {n:02}" for n in range(12)))
    monkeypatch.delenv("COLUMNS", raising=False)
    common.show(table)
    assert "column 00 ┃ column 01" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "40")
    common.show(table)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40
    monkeypatch.setenv("RANK", "1")
    common.show(table)
    assert capsys.readouterr().out == ""


def test_figures_are_shown_in_words():
    table = common.as_table({"peak_memory_bytes": 2_500_000_000, "seconds": 1.23456, "same": True})
    names, values = (list(column.cells) for column in table.columns)
    assert names == ["peak memory", "seconds", "same"] and values == ["2.500 GB", "1.235", "True"]
