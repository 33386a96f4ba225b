"""The Triton kernels against the torch reference: interpreted on the CPU, compiled on CUDA."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

from megatron_taopd.parallel.vocab import reductions
from megatron_taopd.parallel.vocab.divergences import DIVERGENCES, Divergence
from megatron_taopd.parallel.vocab.reductions import Normalizers
from megatron_taopd.parallel.vocab.shard import VocabShard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRETED):  # Triton looks at each definition and each launch
    pytest.importorskip("triton", reason="Triton is not installed")
    from megatron_taopd.parallel.vocab import kernels


pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # −inf − −inf


@pytest.fixture(autouse=True)
def interpreted():
    with mock.patch.dict(os.environ, INTERPRETED):
        yield


WIDTHS = (1, 63, 64, 5000, 8192)  # less than a block, a block, more than a step, whole steps


def make_logits(width: int, kind: str = "plain", rows: int = 3) -> tuple[torch.Tensor, ...]:
    """Student's and teacher's [rows, width], not contiguous, with ids of no probability."""
    generator = torch.Generator(DEVICE).manual_seed(width)
    scale = {"plain": 3.0, "peaked": 30.0, "huge": 3e3}[kind]
    models = torch.randn(2, rows, width + 7, device=DEVICE, generator=generator) * scale
    models[1] += 0.5 * models[0] + 5
    student, teacher = models[..., :width]
    if width > 100:
        student[0, 3:90:2] = -torch.inf
        teacher[0, 3:90:2] = -torch.inf
        teacher[1, :4096] = student[1, :4096] = -torch.inf  # a lane's first step has nothing
    return student, teacher


def normalizers_of(student, teacher) -> Normalizers:
    _, saved = Divergence(VocabShard(0, student.shape[1], None, student.shape[1])).forward(
        student, teacher
    )
    return Normalizers(*saved[:, :4].split(1, dim=1))


@pytest.mark.parametrize("kind", ["plain", "peaked", "huge"])
@pytest.mark.parametrize("width", WIDTHS)
def test_entropy_sums_and_block_tops(width, kind):
    logits, _ = make_logits(width, kind)
    sums, tops = kernels.entropy_sums_and_block_tops(logits)
    assert torch.equal(tops, reductions._block_tops(logits))
    want = reductions._entropy_sums(logits.double())
    torch.testing.assert_close(sums.double(), want, rtol=1e-5, atol=1e-30)


def test_a_row_without_any_probability_has_a_finite_max_and_no_rest():
    logits = torch.full((1, 5000), -torch.inf, device=DEVICE)
    sums, _ = kernels.entropy_sums_and_block_tops(logits)
    assert sums.tolist() == [[torch.finfo(torch.float32).min, 0, 0]]
    assert torch.equal(kernels.log_normalizer(logits), reductions._log_normalizer(logits))


@pytest.mark.parametrize("kind", ["plain", "peaked", "huge"])
@pytest.mark.parametrize("width", WIDTHS)
def test_log_normalizer(width, kind):
    logits, _ = make_logits(width, kind)
    want = reductions._log_normalizer(logits)
    torch.testing.assert_close(kernels.log_normalizer(logits), want, rtol=0, atol=2e-7)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("width", WIDTHS)
def test_kl_within(width, kind):
    student, teacher = make_logits(width)
    normalizers = normalizers_of(student, teacher)
    want = reductions._kl_within(kind, student, teacher, *normalizers)
    got = kernels.kl_within(kind, student, teacher, normalizers)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["jsd", "skewed_reverse_kl"])
@pytest.mark.parametrize("width", WIDTHS)
def test_mixture_sums(width, kind):
    student, teacher = make_logits(width)
    normalizers = normalizers_of(student, teacher)
    want = reductions._mixture_sums(kind, 0.3, student, teacher, *normalizers)
    got = kernels.mixture_sums(kind, 0.3, student, teacher, normalizers)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("width", WIDTHS)
def test_logits_gradient(width, kind, dtype):
    student, teacher = make_logits(width)
    shard = VocabShard(0, width, None, width)
    divergence = Divergence(shard, kind, beta=0.3, alpha=0.2)
    _, saved = divergence.forward(student, teacher)
    grad = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
    want = divergence.gradient(student, teacher, saved, grad, torch.empty_like(student))
    *normalizers, mean = saved.split(1, dim=1)
    got = kernels.logits_gradient(
        kind, divergence.teacher_share, student, teacher, Normalizers(*normalizers), mean, grad,
        torch.empty_like(student, dtype=dtype),
    )  # fmt: skip
    rtol = 1e-5 if dtype == torch.float32 else 2**-7  # the interpreter cuts digits off
    torch.testing.assert_close(got.float(), want, rtol=rtol, atol=1e-6)
