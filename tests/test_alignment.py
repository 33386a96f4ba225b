"""Proposition 1: steps on token losses against plain SGD, and against losses known in full."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from support import dense
from support.step import row_logits
from transformers import AutoModelForCausalLM

from megatron_taopd.config.schema import DataSection
from megatron_taopd.data.vocab_map import Vocabulary
from megatron_taopd.diagnostics import bank as bank_module
from megatron_taopd.diagnostics.alignment import align, take_steps
from megatron_taopd.diagnostics.bank import Bank, add_rollouts
from megatron_taopd.diagnostics.engines import local_engine
from megatron_taopd.rollout.engine import Sampling

pytestmark = pytest.mark.slow

TINY = Path(__file__).parent.parent / "examples" / "tiny_pair"
STUDENT, TEACHER = TINY / "student", TINY / "teacher"


def test_quadratic_losses_have_the_remainder_of_their_curvature():
    """ℓ_t = (a_t·θ − b_t)²/2: R = −η²/2 g·Hg with H = mean a aᵀ, β the largest eigenvalue of H."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    b = torch.randn(20, generator=generator, dtype=torch.float64)
    theta = torch.zeros(6, dtype=torch.float64, requires_grad=True)

    def losses(_kind, parameters):
        return (a @ parameters[0] - b).square() / 2

    steps = take_steps(losses, [theta], [0, 7, 19], [0.1, 0.05])
    hessian = a.T @ a / 20
    gradients = (a * (a @ theta - b)[:, None]).detach()
    for i, t in enumerate((0, 7, 19)):
        g = gradients[t]
        torch.testing.assert_close(steps.inner[i], gradients.mean(0) @ g)
        for e, lr in enumerate((0.1, 0.05)):
            torch.testing.assert_close(steps.remainders[e, i], -(lr**2) / 2 * g @ hessian @ g)
    assert steps.smoothness.max() <= torch.linalg.eigvalsh(hessian)[-1]
    first, second = steps.summary()
    assert first["remainder_falls"] is None
    assert second["remainder_falls"] == pytest.approx(4)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    out = tmp_path_factory.mktemp("banks") / "bank"
    prompts, sampling = TINY / "test.jsonl", Sampling(max_new_tokens=12)
    engine = partial(local_engine, student=STUDENT, seed=0)
    with pytest.MonkeyPatch.context() as patch:  # its third sequence is in another shard
        patch.setattr(bank_module, "SEQUENCES_PER_SHARD", 2)
        add_rollouts(out, STUDENT, prompts, sampling, 0, engine, DataSection(limit=3))
    assert len(Bank(out).shards) == 2
    return Bank(out)


def test_a_step_is_plain_gradient_descent_on_one_tokens_loss(bank, tmp_path):
    """Each G and inner product beside a model whose weights are changed in place.

    (Its norms work in fp32, as transformers has them.)
    """
    lr = 1e-3
    align(bank.dir, STUDENT, TEACHER, tmp_path / "a.parquet", 3, 4, [lr])
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert len(table) == 4 and table[0]["position"] == 0 and table[-1]["sequence"] == 2
    batch, size = bank.first(3).batch, Vocabulary.from_pretrained(STUDENT).size

    z_s, z_t, model = row_logits(STUDENT, TEACHER, batch, size)
    fixed = dense.divergence(z_s, z_t, "forward_kl").mean()
    parameters = list(model.parameters())
    direction = torch.autograd.grad(fixed, parameters, retain_graph=True)
    losses = dense.divergence(z_s, z_t)
    for row in table:
        t = int(batch.cu_rows[row["sequence"]]) + row["position"]
        gradient = torch.autograd.grad(losses[t], parameters, retain_graph=True)
        inner = sum((d * g).sum() for d, g in zip(direction, gradient, strict=True))
        assert row["inner"] == pytest.approx(inner.item(), rel=1e-4)

        stepped = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float64)
        with torch.no_grad():
            for parameter, g in zip(stepped.parameters(), gradient, strict=True):
                parameter -= lr * g
            logits = [
                stepped(batch.sequence(i)[None]).logits[
                    0, batch.row_positions[batch.row_sequences() == i]
                ]
                for i in range(batch.num_sequences)
            ]
        after = dense.divergence(torch.cat(logits)[:, :size], z_t, "forward_kl").mean()
        assert row["gain"] == pytest.approx((fixed - after).item(), rel=1e-3, abs=4e-6)
        assert row["remainder"] == pytest.approx(row["gain"] - lr * row["inner"], abs=1e-15)


def test_the_remainder_falls_four_times_as_fast_as_the_step_is_halved(bank, tmp_path):
    lrs = [1e-4, 5e-5, 2.5e-5]
    rows = align(bank.dir, STUDENT, TEACHER, tmp_path / "a.parquet", 3, 8, lrs)
    assert [row["lr"] for row in rows] == lrs
    for row in rows[1:]:
        assert row["remainder_falls"] == pytest.approx(4, rel=0.01)
    explained = [row["explained"] for row in rows]
    assert explained == sorted(explained) and explained[-1] > 0.99


def test_nothing_to_step_on_is_refused(bank, tmp_path):
    with pytest.raises(ValueError, match="sequences, tokens and lr: have to be above 0"):
        align(bank.dir, STUDENT, TEACHER, tmp_path / "a.parquet", 2, 3, [0.0])
    with pytest.raises(ValueError, match="bank: has 3 sequences; 4 are asked for"):
        align(bank.dir, STUDENT, TEACHER, tmp_path / "a.parquet", 4, 3, [1e-4])
    assert not (tmp_path / "a.parquet").exists()
