"""The formulas of `plan/collectives.py` against what ranks of 64 call: a real step, tiny models, a
fake process group, in one process. Nothing here is timed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support.commands import run_python

from megatron_taopd.parallel import exchange
from megatron_taopd.plan import links

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
WORLD_SIZE, HEADS_K, VOCABULARY, ROWS = 64, 5, 512, 640  # 64 responses of 10 tokens
SERVED_WIDTH = 128 * 4  # bytes of a teacher's row

CASES = {
    "dp": dict(student=dict(tp=1, pp=1), ranks=[21]),
    "tp2-sp": dict(student=dict(tp=2, pp=1, sequence=True), ranks=[21], recompute="full"),
    "tp2-sp, more columns": dict(
        student=dict(tp=2, pp=1, sequence=True), ranks=[21], recompute="full", vocab_size=2048
    ),
    "tp8": dict(student=dict(tp=8, pp=1), teacher=dict(tp=2, pp=2), ranks=[0], k=16),
    "tp8, weights": dict(student=dict(tp=8, pp=1), ranks=[0], weights="discrepancy"),
    "tp4-pp4": dict(student=dict(tp=4, pp=4), teacher=dict(tp=8, pp=1), ranks=[0, 21, 63]),
    "tp2-pp2-sp": dict(
        student=dict(tp=2, pp=2, sequence=True), teacher=dict(tp=4, pp=2, sequence=True),
        ranks=[0, 63], tied=False, precision="bf16", sequences=128,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> dict[str, list[dict]]:
    """What was called, by case, a result for each of its ranks."""
    done = run_python("benchmarks.scaling.fake", json.dumps([*CASES.values()]), seconds=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = iter(json.loads(done.stdout.splitlines()[-1]))
    return {name: [next(results) for _ in case["ranks"]] for name, case in CASES.items()}


def called(result: dict, phase: str, op: str, ranks: int) -> tuple[int, float]:
    """(calls, bytes sent) of one kind."""
    for row in result["collectives"]:
        if (row["phase"], row["op"], row["ranks"]) == (phase, op, ranks):
            return row["calls"], row["bytes"]
    return 0, 0.0


@pytest.mark.parametrize("case", CASES)
def test_every_collective_is_called_as_often_and_with_as_many_bytes_as_planned(measured, case):
    for result in measured[case]:
        for row in result["collectives"]:
            where = f"{case}, rank {result['rank']}: {row}"
            assert row["calls"] == row["planned_calls"], where
            assert row["bytes"] == pytest.approx(row["planned_bytes"], abs=0.5), where
        # What no formula has: counts, norms and the sum of the losses.
        assert result["control_calls"] <= 5 and result["control_bytes"] < 80


def test_the_selection_sends_histograms_and_a_few_numbers_a_sequence(measured):
    """By hand: no rank is told of rows but of those that its TP group has scored, a byte each."""
    quantiles = 4 * 4 * (2048 + 6 * 2048 + 6 * 1024)  # four scores; the first digit is one for all
    thresholds = 2 * 4 * (2048 + 2048 + 1024)
    for case in ("dp", "tp2-sp", "tp8", "tp4-pp4"):
        for result in measured[case]:
            told = 64 + quantiles + thresholds + (8 * 64 + 8) + 24 * 64 + 72
            expected = 14, pytest.approx(links.all_reduce_bytes(told, WORLD_SIZE))
            assert called(result, "selection", "all_reduce", WORLD_SIZE) == expected
            probed = links.all_reduce_bytes(4 * (1 + ROWS), WORLD_SIZE)
            assert called(result, "scoring", "all_reduce", WORLD_SIZE) == (1, probed)
            student = result["case"]["student"]
            last = result["stage"] == student["pp"] - 1 and student["tp"] > 1
            rows = ROWS * student["tp"] * student["pp"] // WORLD_SIZE
            mask = called(result, "selection", "broadcast", student["tp"])
            assert mask == ((1, rows) if last else (0, 0))


@pytest.mark.parametrize(("case", "tp", "k"), [("tp2-sp", 2, 5), ("tp8", 8, 16)])
def test_a_chunk_of_scores_is_one_all_gather_of_24_k_plus_28_bytes_a_row(measured, case, tp, k):
    rows = ROWS * tp // WORLD_SIZE  # of a data-parallel rank: two sequences of two, or eight
    calls, sent = called(measured[case][0], "scores", "all_gather", tp)
    assert sent == links.gather_bytes(rows * (24 * k + 28) * tp, tp)
    micro_batches = rows // 20  # two sequences each
    assert calls == micro_batches * 4  # 20 rows in chunks of 6
    assert called(measured[case][0], "loss", "all_gather", tp)[0] == micro_batches


def test_the_loss_calls_nothing_in_its_backward_pass(measured):
    for results in measured.values():
        for result in results:
            last = result["stage"] == result["case"]["student"]["pp"] - 1
            assert (result["loss_backwards"] > 0) == last
            assert not [r for r in result["collectives"] if r["phase"] == "loss backward"]


def test_hidden_states_cross_and_not_logits(measured):
    """Bytes of the exchange and of scores do not know the vocabulary's size."""
    small, large = measured["tp2-sp"][0], measured["tp2-sp, more columns"][0]
    for phase, op, ranks in (
        ("exchange", "all_to_all", WORLD_SIZE),
        ("scores", "all_gather", 2),
        ("loss", "all_gather", 2),
        ("scoring", "all_reduce", WORLD_SIZE),
    ):
        assert called(small, phase, op, ranks) == called(large, phase, op, ranks)
    calls, sent = called(small, "exchange", "all_to_all", WORLD_SIZE)
    most, _ = links.hidden_state_bytes(ROWS, 128, 4, 2, 32, 64, 1)
    assert calls == exchange.rounds(ROWS // 32) and 0 < sent <= most  # DP32: each takes its share
    assert sent % SERVED_WIDTH == 0
    # What does know it: gradients and weights of the head.
    assert called(small, "optimizer", "all_gather", 32) < called(
        large, "optimizer", "all_gather", 32
    )


def run_tool(tmp_path, *arguments) -> subprocess.CompletedProcess:
    from test_plan import MODELS

    for name in ("Qwen3-4B", "Qwen3-14B"):
        MODELS[name].save_pretrained(tmp_path / name)
    (tmp_path / "run.yaml").write_text(f"""
        run: {{dir: run}}
        student: {{path: {tmp_path}/Qwen3-4B, parallel: {{tp: 2}}}}
        teacher: {{path: {tmp_path}/Qwen3-14B, parallel: {{tp: 4}}}}
        data: {{prompts: prompts.jsonl, max_prompt_tokens: 1024}}
        rollout: {{prompts: 512, max_new_tokens: 7168}}
        train: {{micro_batch_tokens: 8192, precision: bf16, recompute: full}}
    """)
    name, *options = arguments
    return run_python("benchmarks.scaling", name, tmp_path / "run.yaml", *options, seconds=120)


def test_what_stops_scaling_is_told(tmp_path):
    out = tmp_path / "sizes.json"
    done = run_tool(tmp_path, "saturate", "--gpus", "64", "1024", "--json", str(out))
    assert done.returncode == 0, done.stderr
    small, large = json.loads(out.read_text())
    assert small["efficiency"] == 1 > large["efficiency"]
    assert sum(large["behind"].values()) == pytest.approx(1)
    assert large["step"] == pytest.approx(sum(large["seconds"].values()))
    assert "lost to" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["counts", "--gpus", "64", "--rank", "64"], "--rank: 64; it has to be within 0 … 63"),
        (["saturate", "--gpus", "2048"], "fewer than the 1024 data-parallel ranks"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message):
    done = run_tool(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
