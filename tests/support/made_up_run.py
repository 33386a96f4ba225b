"""A run that never was, with everything that its report can show, as large as a run can make it."""

from __future__ import annotations

import math
import random

import torch

from megatron_taopd.evaluation.in_loop import Example
from megatron_taopd.monitoring.report import Kept
from megatron_taopd.monitoring.samples import Answers, Samples, Snapshot, take
from megatron_taopd.monitoring.summary import OUTSIDE, PHASES
from megatron_taopd.rollout.engine import make_rollout_batch
from megatron_taopd.step.batch_scores import BatchScores
from megatron_taopd.step.distiller import Selection
from megatron_taopd.step.selection import SELECTORS, Choice
from megatron_taopd.types import TokenScores, WantedRows

CONFIG = """\
run: {dir: runs/made_up, seed: 0}
student: {path: pairs/small, parallel: {tp: 2, pp: 1}}
teacher: {path: pairs/large, parallel: {tp: 1, pp: 2}}
rollout: {prompts: 64, top_p: 1.0, top_k: 0}
selection: {selector: teachability, ratio: 0.10, k: 16}
loss: {kind: reverse_kl}
train: {steps: 300}
optimizer: {lr: 1.0e-3, clip: 2.0}
eval: {temperature: 0.0, samples: 1, every: 20}
"""
WORDS = [
    *("the", "sum", "of", "both", "is", "so", "we", "carry", "1", ";", "<b>", "therefore"),
    *("\n", "1234", "=", "&", "it", "follows", "x²", "≤", "y"),
]


class Words:
    """A tokenizer of WORDS."""

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(f" {WORDS[token % len(WORDS)]}" for token in tokens.tolist())


def made_up_records(steps: int = 300) -> list[dict]:
    """Records whose spans leave a tenth of each step unnamed."""
    chance = random.Random(0)
    records = [evaluated({"step": 0, "time/eval": 2.0}, 0.28)]
    for step in range(1, steps + 1):
        noise = chance.uniform(0.8, 1.2)
        record = {
            "step": step,
            "loss": (0.4 + 4 * math.exp(-step / 60)) * noise,
            "grad_norm": 4 * math.exp(-step / 80) * noise,
            "lr": 1e-3 * min(1, step / 10),
            "kept_rows": 120,
            "valid_rows": 1200,
            "tokens_trained": 1500,
            "tokens_rolled_out": 2000,
            "flops/of_full_opd": 0.9 * noise,
            "time/step": 1.0 * noise,
            "rollout/logprob_gap_mean": 1e-6 * noise,
            "rollout/logprob_gap_max": 1e-5 * noise,
            "rollout/response_length_mean": 100 * noise,
            "rollout/horizon": 256,
            "rollout/truncated_share": 0.01 * noise,
        }
        named = [phase for phase in PHASES if phase not in OUTSIDE]
        record |= {f"time/{phase}": 0.9 * noise / len(named) for phase in named}
        for score in ("disagreement", "compatibility", "student_entropy", "teacher_entropy"):
            for i, quantile in enumerate(("q05", "q50", "q95")):
                record[f"scores/{score}_{quantile}"] = (0.01 + 0.4 * i) * noise
        if step % 20 == 0:
            record["time/eval"] = 2.0
            evaluated(record, 0.28 + 0.4 * step / steps)
        records.append(record)
    return records


def evaluated(record: dict, accuracy: float) -> dict:
    record["eval/accuracy"] = accuracy
    record["eval/accuracy_low"], record["eval/accuracy_high"] = accuracy - 0.03, accuracy + 0.03
    return record


def made_up_look(step: int, count: int = 4, length: int = 700) -> Snapshot:
    """A step's tokens: disagreement is rare and large, and compatibility falls with it."""
    torch.manual_seed(step)
    responses = [torch.randint(0, 1000, (length,)) for _ in range(16)]
    batch = make_rollout_batch(
        [list(range(60))] * 16,
        range(16),
        responses,
        [-torch.rand(length) for _ in responses],
        [False] * 16,
        [torch.zeros(length)] * 16,
    )
    rows = batch.num_rows
    d = torch.rand(rows) ** 4 * 3
    c = (1.1 - torch.rand(rows) ** 2 * (0.2 + d / 2)).clamp(0, 1)
    log_q = -2 * torch.rand(rows)
    found = TokenScores(d, c, torch.rand(rows), torch.rand(rows), teacher_log_prob=log_q)
    scores = BatchScores.whole(found, batch.cu_rows)
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[(d * c).topk(rows // 10).indices] = True
    choice = Choice(scores, "teachability", SELECTORS["teachability"](scores, 0), mask)
    kept = WantedRows.known(batch, mask.nonzero()[:, 0])
    seen = take(step, batch, Selection(choice, kept, {}), Words(), count)
    assert seen is not None  # on the first rank
    return seen


def made_up_answers(step: int) -> Answers:
    return Answers(
        step,
        [
            Example(
                f"What is {n} + {n}?",
                f"It is {n + n - (step < n)}. " * 60,
                str(n),
                str(2 * n),
                step >= n,
            )
            for n in (0, 7, 300, 500)
        ],
    )


def made_up_kept(count: int = 4) -> Kept:
    return Kept(
        Samples(
            [made_up_look(1, count), made_up_look(300, count)],
            [made_up_answers(0), made_up_answers(300)],
        ),
        [
            {
                "began": "2026-01-02T03:04:05+00:00",
                "ranks": ranks,
                "hosts": 1,
                "device": "An accelerator, 80 GiB",
                "versions": {"Python": "3.11.7", "torch": "2.13.0"},
                "first_step": first,
                "seconds": 200.0,
            }
            for first, ranks in ((0, 2), (101, 4))
        ],
        {"step": 280, "accuracy": 0.653, "path": "step_00000280"},
        "step_00000300",
        True,
    )
