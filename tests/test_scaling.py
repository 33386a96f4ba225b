"""The formulas of `plan/collectives.py` against what ranks of 64 call: a real step, tiny models, a
fake process group, in one process. Nothing here is timed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support.commands import run_python
from support.published import MODELS

from benchmarks.scaling import saturate
from benchmarks.scaling.saturate import sizes
from benchmarks.scaling.share import share_of_rank_0, traffic
from megatron_taopd import config as configuration
from megatron_taopd.parallel import exchange
from megatron_taopd.plan import collectives, links
from megatron_taopd.plan.cluster import CLUSTERS
from megatron_taopd.plan.setup import Setup

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
WORLD_SIZE, HEADS_K, VOCABULARY, ROWS = 64, 5, 512, 640  # 64 responses of 10 tokens
SERVED_WIDTH = 128 * 4  # bytes of a teacher's row

CASES = {
    "dp": dict(student=dict(tp=1, pp=1), ranks=[21]),
    "tp2-sp": dict(
        student=dict(tp=2, pp=1, sequence=True), ranks=[21], recompute="full", export_bytes=150_000
    ),
    "tp2-sp, more columns": dict(
        student=dict(tp=2, pp=1, sequence=True), ranks=[21], recompute="full", vocab_size=2048
    ),
    "tp8": dict(student=dict(tp=8, pp=1), teacher=dict(tp=2, pp=2), ranks=[0], k=16),
    "tp8, weights": dict(student=dict(tp=8, pp=1), ranks=[0], weights="discrepancy"),
    "tp4-pp4": dict(
        student=dict(tp=4, pp=4), teacher=dict(tp=8, pp=1), ranks=[0, 21, 63], export_bytes=150_000
    ),
    "tp2-pp2-sp": dict(
        student=dict(tp=2, pp=2, sequence=True), teacher=dict(tp=4, pp=2, sequence=True),
        ranks=[0, 63], tied=False, precision="bf16", sequences=128,
    ),
    # Micro-batches of 32 tokens: 8 for each rank of the teacher, 16 of the student; 15 are run.
    "whole": dict(
        student=dict(tp=1, pp=1, cp=2), teacher=dict(tp=1, pp=1, cp=4), ranks=[0, 21, 63],
    ),
    "cp4": dict(
        student=dict(tp=1, pp=1, cp=4), teacher=dict(tp=2, pp=2, cp=2), ranks=[0, 21, 63],
        trained=1.0, recompute="full",
    ),
    "tp2-cp4-pp2-sp": dict(
        student=dict(tp=2, pp=2, cp=4, sequence=True), teacher=dict(tp=1, pp=1, cp=4),
        ranks=[0, 21, 43, 63], trained=1.0,
    ),
    "tp2-pp2, average": dict(
        student=dict(tp=2, pp=2), teacher=dict(tp=1, pp=2), ranks=[0, 63], average=True,
        export_bytes=150_000,
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


def test_an_export_moves_buckets(measured):
    """By hand: the embedding (131,072 bytes) and a norm, then two buckets for each of four layers:
    QKV (98,304) and the projection (32,768); both of the MLP's (98,304 and 49,152) and small ones.
    """
    assert called(measured["tp2-sp"][0], "sync", "all_gather", 2)[0] == 1 + 2 * 4
    for result in measured["tp4-pp4"]:
        assert called(result, "sync", "all_gather", 4)[0] == 1 + 2 * 4
        assert called(result, "sync", "broadcast", 4)[0] == 1 + 2 * 4
    assert called(measured["tp8"][0], "sync", "all_gather", 8)[0] == 1  # 64 MiB hold all of it


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


def test_the_host_is_timed(tmp_path):
    """128 responses of 64 tokens over DP32: a rank has four. The figures of before are recorded."""
    out = tmp_path / "host.json"
    sizes = ("--sequences", "128", "--response", "64", "--json", out)
    done = run_python("benchmarks.scaling", "host", *sizes, seconds=120)
    assert done.returncode == 0, done.stderr
    [found] = json.loads(out.read_text())
    assert (found["rows"], found["sequences"], found["held"]) == (8192, 128, 256)
    parts = ["batch", "plans", "routes", "selection, a rank's share", "selection by one rank"]
    assert [*found["seconds"]] == [*found["bytes"]] == [*parts, "metrics of the batch"]
    assert all(seconds > 0 for seconds in found["seconds"].values())
    [shown] = [line.split("│")[1:-1] for line in done.stdout.splitlines() if "8,192" in line]
    of_a_rank = sum(found["seconds"].values()) - found["seconds"]["selection by one rank"]
    assert float(shown[-1]) == pytest.approx(of_a_rank / 8192 * 1e6, abs=1e-3)
    [before] = [line.split("│")[1:-1] for line in done.stdout.splitlines() if "16,777,216" in line]
    assert [float(cell) for cell in before[1:]] == [1.78, 1.9, 6.92, 24.85, 104, 2.11]


# ---------------------------------------------------------------------------------- arithmetic


@pytest.fixture
def configured(tmp_path):
    """`configured(gpus, keys…)`: Qwen3-14B → Qwen3-4B, 8 sequences, an eighth of a server a GPU."""
    for name in ("Qwen3-4B", "Qwen3-14B"):
        MODELS[name].save_pretrained(tmp_path / name)

    def make(gpus, *keys) -> configuration.Config:
        urls = ", ".join(f"'http://servers:{i}'" for i in range(gpus // 8))
        (tmp_path / "run.yaml").write_text(f"""
            run: {{dir: run}}
            student: {{path: {tmp_path}/Qwen3-4B, parallel: {{tp: 2, sequence: true}}}}
            teacher: {{path: {tmp_path}/Qwen3-14B, parallel: {{tp: 4, sequence: true}}}}
            data: {{prompts: prompts.jsonl, max_prompt_tokens: 1024}}
            rollout: {{prompts: {8 * gpus}, max_new_tokens: 4096, engine: sglang}}
            train: {{micro_batch_tokens: 8192, precision: bf16, recompute: full}}
        """)
        keys = [f"rollout.servers={{urls: [{urls}], concurrency: 64}}", *keys]
        return configuration.load(tmp_path / "run.yaml", keys)

    return make


@pytest.fixture
def served(configured):
    """The setup of it."""
    return lambda gpus, *keys: Setup.of(configured(gpus, *keys), gpus)


def test_weights_take_as_long_for_128_servers_as_for_8(configured, tmp_path):
    """By hand, h800: a link carries 30 GB/s, NVLink 120. Of 8.04 GB half is gathered over TP2, in
    15 buckets of which the first is not hidden: 8.04 / 30 + 4.02 / 120 / 15 = .270 s. Of 65.5 GB
    seven eighths over TP8, in 123: 65.52 / 30 + 57.33 / 120 / 123 = 2.188 s.
    """
    MODELS["Qwen3-32B"].save_pretrained(tmp_path / "Qwen3-32B")
    large = (f"student.path={tmp_path}/Qwen3-32B", "student.parallel.tp=8")
    for keys, expected, most in (((), 0.270, 0.5), (large, 2.188, 2.5)):
        gpus = [64, 192, 1024]  # 8, 24 and 128 servers
        found = sizes(configured(64, *keys), gpus, True, CLUSTERS["h800"], 8, 0.06)
        assert [size.servers for size in found] == [8, 24, 128]
        assert [size.most_sent_to for size in found] == [1, 1, 1]
        for size in found:
            assert size.seconds["sync"] == pytest.approx(expected, abs=0.001) and expected <= most
    # Two servers for each GPU that trains: each of them has two.
    [crowded] = sizes(configured(64), [8], True, CLUSTERS["h800"], 1, 0.06)
    assert crowded.most_sent_to == 1
    [crowded] = sizes(
        configured(128, "rollout.prompts=8"), [8], False, CLUSTERS["h800"], None, 0.06
    )
    assert (crowded.servers, crowded.most_sent_to) == (16, 2)
    assert crowded.seconds["sync"] == pytest.approx(2 * 8.04 / 30, abs=0.003)


def test_host_and_client_are_what_was_measured(configured, monkeypatch):
    """By hand: 2.097 and 33.55 million rows; .06 s each for a million of all rows, .15 for those of
    a rank of DP32 and DP512, .5 for those of a rank that asks: one of 128, or rank 0 alone.
    """
    for asking, client, efficient in (((0,), 16.78, False), (range(128), 0.131, True)):
        if asking == (0,):
            monkeypatch.setattr(saturate, "clients", lambda setup: [0])
        small, large = sizes(configured(64), [64, 1024], True, CLUSTERS["h800"], 8, 0.06)
        assert large.asking == len(asking)
        monkeypatch.undo()
        assert small.seconds["host"] == pytest.approx(2.097 * (0.06 + 0.15 / 32), abs=1e-3)
        assert large.seconds["host"] == pytest.approx(33.55 * (0.06 + 0.15 / 512), abs=2e-3)
        assert large.seconds["client"] == pytest.approx(client, abs=0.01)
        assert (large.efficiency >= 0.85) == efficient


@pytest.mark.parametrize("keys", [(), ("student.parallel.pp=2",), ("student.parallel.tp=8",)])
def test_rank_0_moves_hardly_more_than_the_mean_rank(served, keys):
    shares = share_of_rank_0(traffic(served(64, *keys)))
    assert max(shares.values()) <= 1.1, shares


def test_what_one_rank_did_for_all_is_seen_in_its_share(served, monkeypatch):
    """By hand, in GB: a rank sends 7.79 of gradients, 3.90 of weights and .03 of answers between
    nodes, each source 8.04 to its server. Of rows of the teacher, 15 of 16 move, to both TP ranks:
    .63 on average; rank 0 has two of 32 sequences, of which it sends one, and rank 7 sends none.
    """
    setup = served(64)
    between = [rank.sent_between / 1e9 for rank in traffic(setup)]
    assert between[0] == pytest.approx(11.72 + 0.67, abs=0.02)
    assert between[7] == pytest.approx(11.72 + 8.04, abs=0.02)
    monkeypatch.setattr(collectives, "deal", lambda urls, nodes: dict.fromkeys(urls, 0))
    share = share_of_rank_0(traffic(setup))["sent_between"]
    of_all = 11.72 + 0.63 + 8.04 / 8
    assert share == pytest.approx((11.72 + 0.67 + 8 * 8.04) / of_all, rel=0.003)


def test_a_served_teachers_rows_come_from_all_that_ask(served):
    """By hand: eight ranks ask, each 64 of 512 sequences, and send a row to both TP ranks."""
    urls = ", ".join(f"'http://teachers:{i}'" for i in range(8))
    setup = served(64, "teacher.engine=sglang", f"teacher.servers={{urls: [{urls}]}}")
    moved = collectives.rows_moved(setup)
    assert sorted(moved.sent) == [7, 15, 23, 31, 39, 47, 55, 63]
    for rank, sent in moved.sent.items():
        own = 64 // 32  # of its sequences it scores two itself
        assert sent == 4096 * (2 * 64 - own), rank
    shares = share_of_rank_0(traffic(setup))
    assert max(shares.values()) <= 1.1, shares


def test_what_is_sent_is_received_elsewhere(served):
    """Servers take what they are sent, and give their answers."""
    setup = served(64, "student.parallel.pp=2", "teacher.parallel.pp=4")
    by_rank = traffic(setup)
    sent, received = (sum(getattr(r, name) for r in by_rank) for name in ("sent", "received"))
    weights = 8 * 2 * setup.student.elements
    rows, prompts = 512 * 4096, 512 * 1024
    told = 512 * (12 + 12 * 4096)  # by 64 ranks, to 63 others each part
    assert sent - received == pytest.approx(weights + 7 * prompts - 46 * rows + told)


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
