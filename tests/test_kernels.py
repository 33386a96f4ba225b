"""The Triton kernels against the torch reference: interpreted on the CPU, compiled on CUDA."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from support import dense, interpreter
from support.shards import tops_in_k_blocks

from megatron_taopd.parallel.vocab import reference
from megatron_taopd.parallel.vocab.divergences import DIVERGENCES, Divergence
from megatron_taopd.parallel.vocab.normalizers import Normalizers
from megatron_taopd.parallel.vocab.shard import VocabShard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRETED):  # Triton looks at each definition and each launch
    pytest.importorskip("triton", reason="Triton is not installed")
    from megatron_taopd.parallel.vocab import kernels

interpreter.reduce_by_halves()

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # −inf − −inf
    pytest.mark.slow,  # where it is interpreted
]


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
    assert torch.equal(tops, reference.block_tops(logits))
    want = reference.entropy_sums(logits.double())
    torch.testing.assert_close(sums.double(), want, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("k", [1, 2, 16])
def test_the_top_k_may_lie_in_k_blocks(k, tied):
    logits = tops_in_k_blocks(k, tied).to(DEVICE)
    _, tops = kernels.entropy_sums_and_block_tops(logits)
    columns = reference.top_columns(logits, tops, k)
    want = dense.topk_ids(logits, k)
    assert [sorted(row) for row in columns.tolist()] == [sorted(row) for row in want]


def test_a_row_without_any_probability_has_a_finite_max_and_no_rest():
    logits = torch.full((1, 5000), -torch.inf, device=DEVICE)
    sums, _ = kernels.entropy_sums_and_block_tops(logits)
    assert sums.tolist() == [[torch.finfo(torch.float32).min, 0, 0]]
    assert torch.equal(kernels.log_normalizer(logits), reference._log_normalizer(logits))


@pytest.mark.parametrize("kind", ["plain", "peaked", "huge"])
@pytest.mark.parametrize("width", WIDTHS)
def test_log_normalizer(width, kind):
    logits, _ = make_logits(width, kind)
    want = reference._log_normalizer(logits)
    torch.testing.assert_close(kernels.log_normalizer(logits), want, rtol=0, atol=2e-7)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("width", WIDTHS)
def test_kl_within(width, kind):
    student, teacher = make_logits(width)
    normalizers = normalizers_of(student, teacher)
    want = reference._kl_within(kind, student, teacher, *normalizers)
    got = kernels.kl_within(kind, student, teacher, normalizers)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["jsd", "skewed_reverse_kl"])
@pytest.mark.parametrize("width", WIDTHS)
def test_mixture_sums(width, kind):
    student, teacher = make_logits(width)
    normalizers = normalizers_of(student, teacher)
    want = reference._mixture_sums(kind, 0.3, student, teacher, *normalizers)
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
    *normalizers, mean = saved.split(1, dim=1)
    want = reference.logits_gradient(
        kind, divergence.teacher_share, student, teacher, Normalizers(*normalizers), mean, grad,
        torch.empty_like(student),
    )  # fmt: skip
    got = kernels.logits_gradient(
        kind, divergence.teacher_share, student, teacher, Normalizers(*normalizers), mean, grad,
        torch.empty_like(student, dtype=dtype),
    )  # fmt: skip
    rtol = 1e-5 if dtype == torch.float32 else 2**-7  # the interpreter cuts digits off
    torch.testing.assert_close(got.float(), want, rtol=rtol, atol=1e-6)


# ------------------------------------------------------------------------ what is not a number

NAN, INF = torch.nan, torch.inf
# Into the first block of a row, one in the middle, the last one; two of one lane, and of two.
SPOILT = [{column: value} for value in (NAN, INF, -INF) for column in (0, 2500, 4999)]
SPOILT += [{3: INF, 4099: INF}, {3: INF, 40: INF}, {3: NAN, 40: INF}, {3: INF, 4099: NAN}]
everywhere = pytest.mark.parametrize("spoilt", SPOILT, ids=str)


def spoil(logits: torch.Tensor, values: dict[int, float]) -> torch.Tensor:
    """A copy in which the first and the last row have these values."""
    logits = logits.clone()
    for column, value in values.items():
        logits[0, column] = logits[-1, column] = value
    return logits


def assert_same(got, want, rtol=1e-5, atol=1e-6):
    """Numbers that agree, and nan exactly where the reference has nan."""
    torch.testing.assert_close(got.float(), want.float(), rtol=rtol, atol=atol, equal_nan=True)


@everywhere
@pytest.mark.parametrize("others", ["plain", "-inf"])
def test_sums_and_normalizers_of_what_is_not_a_number(others, spoilt):
    clean, _ = make_logits(5000)
    logits = spoil(clean if others == "plain" else torch.full_like(clean, -INF), spoilt)
    sums, tops = kernels.entropy_sums_and_block_tops(logits)
    normalizer = kernels.log_normalizer(logits)
    assert_same(tops, reference.block_tops(logits), 0, 0)
    assert_same(sums, reference.entropy_sums(logits))
    assert_same(normalizer, reference._log_normalizer(logits))
    if NAN in spoilt.values():
        assert sums[::2].isnan().all() and normalizer[::2].isnan().all()


@everywhere
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_of_what_is_not_a_number(kind, whose, spoilt):
    """With the row's own normalisers, and with those that it had before it was spoilt."""
    clean = make_logits(5000)
    place = ("student", "teacher").index(whose)
    models = [spoil(z, spoilt) if i == place else z for i, z in enumerate(clean)]
    divergence = Divergence(VocabShard(0, 5000, None, 5000), kind, beta=0.3, alpha=0.2)
    grad = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
    for known in (models, clean):
        _, saved = divergence.forward(*known)
        *normalizers, mean = saved.split(1, dim=1)
        normalizers = Normalizers(*normalizers)
        if kind in ("reverse_kl", "forward_kl"):
            value = kernels.kl_within(kind, *models, normalizers)
            want = reference._kl_within(kind, *models, *normalizers)
        else:
            value = kernels.mixture_sums(kind, divergence.teacher_share, *models, normalizers)
            want = reference._mixture_sums(kind, divergence.teacher_share, *models, *normalizers)
        assert_same(value, want)
        given = kind, divergence.teacher_share, *models, normalizers, mean, grad
        want = reference.logits_gradient(*given, torch.empty_like(models[0]))
        for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
            got = kernels.logits_gradient(*given, torch.empty_like(models[0], dtype=dtype))
            assert_same(got, want, rtol)
        if NAN in spoilt.values() and known is models:
            assert value[::2].isnan().view(2, -1).any(1).all()
            assert got[::2].isnan().any(1).all()
