"""The paper's benchmarks: rows as EvalScope reads them, tables that leave nothing out unsaid; and,
where EvalScope is installed, EvalScope itself on a real server.

EVALSCOPE_PYTHON names the interpreter of an environment that has it.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
from support.commands import run_python

from megatron_taopd.cli import evaluate as cli_evaluate
from megatron_taopd.evaluation import benchmarks, tables
from megatron_taopd.evaluation.benchmarks import PAPER, Missing, Scores

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "evaluate.py"
STUDENT = ROOT / "examples" / "tiny_pair" / "student"
EVALSCOPE = os.environ.get("EVALSCOPE_PYTHON")
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def one():\n",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
    "entry_point": "one",
}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_original_rows_become_what_evalscope_reads(tmp_path):
    data = tmp_path / "data"
    (data / "math500").mkdir(parents=True)
    problems = [{"problem": f"{n} + 1?", "answer": str(n + 1)} for n in range(5)]
    text = "".join(json.dumps(problem) + "\n" for problem in problems)
    (data / "math500" / "test.jsonl").write_text(text)
    assert benchmarks.prepare("math_500", data, tmp_path / "math", limit=3) == 3
    rows = lines(tmp_path / "math" / "test.jsonl")
    assert rows[2] == problems[2] | {"level": 1, "unique_id": "2", "solution": ""}

    (data / "humaneval").mkdir()
    with gzip.open(data / "humaneval" / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(HUMANEVAL) + "\n")
    assert benchmarks.prepare("humaneval", data, tmp_path / "code", limit=None) == 1
    assert lines(tmp_path / "code" / "test.jsonl") == [HUMANEVAL]

    (data / "gpqa_diamond").mkdir()
    gpqa = dict.fromkeys(PAPER["gpqa_diamond"].columns, "a, b") | {"Writer's Difficulty": "3"}
    with open(data / "gpqa_diamond" / "gpqa_diamond.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, gpqa)
        writer.writeheader()
        writer.writerow(gpqa)
    assert benchmarks.prepare("gpqa_diamond", data, tmp_path / "gpqa", limit=None) == 1
    (row,) = lines(tmp_path / "gpqa" / "train.jsonl")
    assert tuple(row) == PAPER["gpqa_diamond"].columns


def test_rows_that_cannot_be_read_are_missing_and_why(tmp_path):
    with pytest.raises(Missing, match="no file of rows in"):
        benchmarks.prepare("aime24", tmp_path, tmp_path / "out", None)
    (tmp_path / "aime25").mkdir()
    (tmp_path / "aime25" / "test.jsonl").write_text('{"question": "?", "answer": 1}\n')
    with pytest.raises(Missing, match=r"test.jsonl has no column 'problem'"):
        benchmarks.prepare("aime25", tmp_path, tmp_path / "out", None)
    rows = '{"problem": "?", "answer": 1}\n{"problem": "!", "answer": null}\n'
    (tmp_path / "aime25" / "test.jsonl").write_text(rows)
    with pytest.raises(Missing, match=r"test.jsonl row 2: column 'answer' is null"):
        benchmarks.prepare("aime25", tmp_path, tmp_path / "out", None)
    (tmp_path / "aime25" / "more.jsonl").write_text("{}\n")
    with pytest.raises(Missing, match="2 files of rows; one is expected"):
        benchmarks.prepare("aime25", tmp_path, tmp_path / "out", None)


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ([], {}),
        (["--stop-token-ids", "9", "1"], {"stop_token_ids": [9, 1]}),
        (
            ["--template-kwargs", "{enable_thinking: false}"],
            {"chat_template_kwargs": {"enable_thinking": False}},
        ),
    ],
)
def test_a_server_is_told_where_answers_end_and_how_prompts_are_rendered(tmp_path, options, extra):
    (tmp_path / "test.jsonl").write_text("{}\n")
    command = ["--url", "http://127.0.0.1:1", "--model", "m", "--data", "d", "--out", "o"]
    asked = cli_evaluate.parse([*command, "--max-tokens", "16", *options])
    with (
        cli_evaluate.serve(None, asked, tmp_path, tmp_path) as endpoint,
        pytest.raises(Missing, match="EvalScope failed"),
    ):
        benchmarks.score("aime24", tmp_path, 1, endpoint, 0, tmp_path / "out", "/bin/false")
    task = json.loads((tmp_path / "out" / "task.json").read_text())
    extra = {"extra_body": extra} if extra else {}
    asked = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 16, "seed": 0}
    assert task["generation_config"] == asked | extra


def test_a_row_without_a_score_is_no_score(tmp_path):
    identity = {"name": "acc"}
    report = {
        "primary_metric_identity": identity,
        "metrics": [{"identity": identity, "num": 4, "score": 0.5}],
    }
    assert benchmarks._primary(report, 4, tmp_path) == 0.5
    with pytest.raises(Missing, match="4 of 5 rows have a score"):
        benchmarks._primary(report, 5, tmp_path)


def test_an_average_says_of_how_many_benchmarks_it_is():
    whole = Scores("whole", {name: [0.1, 0.3] for name in PAPER}, dict.fromkeys(PAPER, 9))
    assert benchmarks.average(whole) == ("six-benchmark average", pytest.approx([0.1, 0.3]))
    partly = Scores(
        "partly",
        {"ifeval": [0.2, 0.4], "math_500": [0.4, 0.8]},
        {"ifeval": 9, "math_500": 9},
        dict.fromkeys(["aime24", "aime25", "gpqa_diamond", "humaneval"], "no rows"),
    )
    assert benchmarks.average(partly) == ("average of 2 of 6", pytest.approx([0.3, 0.6]))
    header, rows = benchmarks.table(partly, [0, 1])
    assert header == ["benchmark", "rows", "seed 0", "seed 1", "mean ± std"]
    assert rows[0] == ["ifeval", "9", "20.0", "40.0", "30.0 ± 14.1"]
    assert rows[2] == ["average of 2 of 6", "", "30.0", "60.0", "45.0 ± 21.2"]
    assert [row[0] for row in rows if row[-1] == "missing"] == list(partly.missing)
    none = Scores("none", missing=dict.fromkeys(PAPER, "no rows"))
    _, rows = benchmarks.comparison([whole, partly, none], list(PAPER))
    assert [row[-1] for row in rows] == [
        "20.0 ± 14.1 (six-benchmark average)",
        "45.0 ± 21.2 (average of 2 of 6)",
        "none",
    ]
    assert rows[1].count("missing") == 4


def test_tables(tmp_path):
    tables.write(tmp_path / "out" / "t", "title", ["a", "b"], [["x|y", "1,0"]])
    assert (tmp_path / "out" / "t.md").read_text() == (
        "title\n\n| a | b |\n| --- | ---: |\n| x\\|y | 1,0 |\n"
    )
    assert (tmp_path / "out" / "t.csv").read_text().splitlines() == ["a,b", 'x|y,"1,0"']
    assert tables.mean_and_std([0.25]) == "25.0"


def run_tool(*arguments):
    return run_python("tools/evaluate.py", *arguments, seconds=1200)


@pytest.mark.slow
def test_mistakes_are_told_before_a_server_starts(tmp_path):
    common = ["--data", tmp_path, "--out", tmp_path / "out"]
    for arguments, line in {
        (): "give either checkpoints or --url",
        (STUDENT, "--temperature", "0"): "--temperature: 0 with 5 seeds",
        (tmp_path,): f"{tmp_path}: neither a Hugging Face directory",
        (STUDENT, "--python", "/bin/false"): "--python: /bin/false cannot import EvalScope",
    }.items():
        done = run_tool(*arguments, *common)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {line}") and done.stderr.count("\n") == 1


@pytest.mark.skipif(EVALSCOPE is None, reason="EVALSCOPE_PYTHON is not set")
def test_evalscope_reads_the_rows_and_scores_a_server(tmp_path):
    """The student, which has no chat template of its own, is given one."""
    shutil.copytree(STUDENT, tmp_path / "student")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (tmp_path / "student" / "chat_template.jinja").write_text(template)
    data = tmp_path / "data"
    problem = {"problem": "1 + 1?", "answer": "2"}
    choices = {f"Incorrect Answer {n}": str(n) for n in (1, 2, 3)}
    rows = {
        "aime24": problem,
        "aime25": problem,
        "gpqa_diamond": {"Question": "0 + 0?", "Correct Answer": "0", **choices},
        "humaneval": HUMANEVAL,
        "ifeval": {
            "key": 1,
            "prompt": "Use no comma.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        },
        "math_500": problem,
    }
    for name, row in rows.items():
        (data / name).mkdir(parents=True)
        (data / name / "test.jsonl").write_text(json.dumps(row) + "\n")
    asked = (
        tmp_path / "student", "--data", data, "--out", tmp_path / "out", "--max-tokens", "8",
        "--dtype", "float32", "--mem-fraction", "0.1", "--python", EVALSCOPE,
        "--json", tmp_path / "scores.json",
    )  # fmt: skip

    def scores(*further):
        done = run_tool(*asked, *further)
        assert done.returncode == 0, done.stdout + done.stderr
        (of_student,) = json.loads((tmp_path / "scores.json").read_text())["scores"]
        return of_student

    first = scores("--seeds", "0", "--run-code")
    assert {name: len(values) for name, values in first["by_benchmark"].items()} == dict.fromkeys(
        PAPER, 1
    )
    assert first["average_of"] == "six-benchmark average"

    # Called again, it asks for what is not there; without leave to run code, not for that.
    math = tmp_path / "out" / "1-student" / "math_500"
    (answers,) = math.glob("seed_0/predictions/*/*")
    before = answers.stat().st_mtime_ns
    second = scores("--seeds", "0", "1", "2", "--benchmarks", "math_500", "humaneval")
    assert second["by_benchmark"]["math_500"][:1] == first["by_benchmark"]["math_500"]
    assert len(second["by_benchmark"]["math_500"]) == 3
    assert answers.stat().st_mtime_ns == before
    assert "--run-code" in second["missing"]["humaneval"]
    assert second["average_of"] == "average of 1 of 6"
    assert "missing" in (tmp_path / "out" / "1-student" / "scores.md").read_text()
