"""What only a GPU can tell: kernels that the CPU path does not take, and NCCL."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import dense

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TINY = Path(__file__).parents[2] / "examples" / "tiny_pair.yaml"


def test_varlen_attention_agrees_with_segment_by_segment():
    from megatron_taopd.models.attention import PackedAttention

    lengths = [5, 64, 1, 130]
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(sum(lengths), heads, 64, device="cuda", generator=generator).bfloat16()
        for heads in (8, 2, 2)
    )
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    quarter = torch.ones(
        sum(lengths), 1, 64, device="cuda"
    ).bfloat16()  # turns, which round nothing
    packing = SimpleNamespace(
        cu_seqlens_q=cu_seqlens, max_seqlen_q=max(lengths), lengths=lengths,
        rotation=(0 * quarter, quarter),
    )  # fmt: skip
    attention = PackedAttention(SimpleNamespace(kv_channels=64))
    flash = attention(query, key, value, packed_seq_params=packing)
    wide = attention(query.float(), key.float(), value.float(), packed_seq_params=packing)
    torch.testing.assert_close(flash.float(), wide, rtol=2e-2, atol=2e-2)


def test_bf16_heads_score_and_lose_like_float64_fed_the_same_hidden_states():
    from megatron_taopd.parallel.vocab import VocabShard, linear_divergence, score_sampled

    size, rows, generator = 4096, 64, torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    hidden_s, weight_s = draw(rows, 256), draw(size, 256) / 8
    hidden_t, weight_t = draw(rows, 512), draw(size, 512) / 8
    z_s, z_t = hidden_s.double() @ weight_s.double().T, hidden_t.double() @ weight_t.double().T
    shard = VocabShard(0, size, None, size)
    tensors = [t.cuda() for t in (hidden_s, weight_s, hidden_t, weight_t)]
    tokens = torch.randint(size, (rows,), generator=generator)
    scores = score_sampled(*tensors, tokens.cuda(), 16, shard, chunk_rows=24)
    sampled = dense.log_probs(z_t).gather(1, tokens[:, None])[:, 0]
    for ours, expected in (
        (scores.disagreement, dense.disagreement(z_s, z_t, 16)),
        (scores.compatibility, dense.compatibility(z_s, z_t, 16)),
        (scores.student_entropy, dense.entropy(z_s)),
        (scores.teacher_log_prob, sampled),
    ):
        torch.testing.assert_close(ours.double().cpu(), expected, rtol=1e-3, atol=1e-4)
    loss = linear_divergence(*tensors, shard, "reverse_kl", chunk_rows=24)
    expected = dense.divergence(z_s, z_t, "reverse_kl")
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 11])
@pytest.mark.parametrize("size", [389, 384, 100])
def test_matmuls_add_to_fp32_in_place(size, rows):
    """`addmm` of bf16 with an fp32 `out` that is its own input, which only CUDA has."""
    from megatron_taopd.parallel.vocab.projection import HeadGradients
    from megatron_taopd.parallel.vocab.shard import VocabShard

    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    hidden, weight, shard = draw(rows, 24), draw(448, 24), VocabShard(0, 448, None, size)
    weight[size:] = torch.nan
    main_grad = torch.ones(448, 24, device="cuda")
    grads = HeadGradients(hidden, weight, shard, (True, True), main_grad)
    logits_grad = draw(rows, shard.padded_width)
    logits_grad[:, size:] = 0
    grads.add(logits_grad, slice(0, rows))
    wide, columns = logits_grad[:, :size].double(), slice(size)
    expected = wide @ weight[columns].double()
    torch.testing.assert_close(grads.hidden.double(), expected, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(
        main_grad[columns].double(), 1 + wide.t() @ hidden.double(), rtol=1e-5, atol=1e-5
    )
    assert (main_grad[size:] == 1).all()


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "skewed_reverse_kl"])
def test_scores_and_losses_are_those_of_the_cpu(kind):
    """The same call on both devices, ids without probability and absent ids included."""
    from megatron_taopd import VocabShard, divergence, score_rows, topk_divergence

    size, rows = 9000, 20
    logits = torch.randn(2, rows, size + 24, generator=torch.Generator().manual_seed(0)) * 3
    logits[1] += logits[0] + 5
    logits[:, 3, 100:4000] = -torch.inf
    report = logits[1, :, :size].log_softmax(1).topk(16, dim=1)
    results = []
    for device in ("cpu", "cuda"):
        shard = VocabShard(0, size + 24, None, size, torch.tensor([1, 5000], device=device))
        student, teacher = logits.to(device)
        student.requires_grad_()
        ids, log_probs = report.indices.to(device), report.values.to(device)
        losses = (
            divergence(student, teacher, shard, kind),
            topk_divergence(student, ids, log_probs, shard, kind),
        )
        sum(loss.sum() for loss in losses).backward()
        scores = score_rows(student.detach(), teacher, 16, shard, return_ids=True)
        assert scores.teacher_log_prob is None
        known = [value for value in vars(scores).values() if value is not None]
        tensors = [*losses, student.grad, *known]
        results.append([t.detach().cpu() for t in tensors])
    for on_cpu, on_cuda in zip(*results, strict=True):
        torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_short_run_with_nccl(tmp_path, precision):
    from megatron_taopd.train import main

    one_rank = [f"{model}.parallel={{tp: 1, pp: 1}}" for model in ("student", "teacher")]
    status = main(
        [
            str(TINY),
            *one_rank,
            f"run.dir={tmp_path}/run",
            f"train.precision={precision}",
            "train.steps=3",
            "eval.limit=16",
        ]
    )
    assert status == 0
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
