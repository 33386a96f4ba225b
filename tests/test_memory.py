"""The memory meter, on blocks whose need is known."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.pushing import engine_that_pushes
from support.ranks import run_ranks

from megatron_taopd.parallel.memory import PeakMemory, peak_memory

SIDE = 256
MATRIX = 4 * SIDE * SIDE  # bytes


def need(block, device: str = "cpu") -> PeakMemory:
    x = torch.ones(SIDE, SIDE, device=device)
    with peak_memory(device) as memory:
        result = block(x)
    del result
    return memory


def in_matrices(memory: PeakMemory) -> tuple[int, int]:
    """Rounded down: scalars and vectors do not count."""
    return memory.peak // MATRIX, memory.temporaries // MATRIX


def test_a_result_is_counted_but_is_no_temporary():
    assert need(lambda x: x @ x) == PeakMemory(peak=MATRIX, temporaries=0)


def test_a_view_costs_nothing():
    assert need(lambda x: x.t()[:10].unsqueeze(0)) == PeakMemory(0, 0)


def test_temporaries_of_an_expression():
    # The product is gone when exp is formed; with the sum, which neighbours either, that makes two.
    assert in_matrices(need(lambda x: (x @ x + 1).exp())) == (2, 2)


def test_temporaries_inside_an_operator():
    assert need(lambda x: x.logsumexp(1)).peak >= MATRIX  # Python only sees a vector


def test_what_is_freed_makes_room():
    def one_after_the_other(x):
        for _ in range(5):
            x = x + 1
        return x

    assert in_matrices(need(one_after_the_other)) == (2, 2)


def test_backward_pass():
    def gradient(x):
        weight = x.clone().requires_grad_()
        (weight.exp() * x).sum().backward()
        return weight.grad

    # weight, its exp, the gradient of that, and the gradient of weight, which is the result
    assert in_matrices(need(gradient)) == (4, 3)


def test_a_gradient_is_no_temporary_however_late_it_comes():
    weight = torch.ones(SIDE, SIDE, requires_grad=True)
    with peak_memory() as memory:
        (weight * 2.0).sum().backward()
    # The product is gone when the gradient comes: peak − gradient would give nothing for it.
    assert in_matrices(memory) == (1, 1)


def gather() -> PeakMemory:
    local, gathered = torch.ones(SIDE, SIDE), [torch.empty(SIDE, SIDE) for _ in range(2)]
    with peak_memory() as memory:
        dist.all_gather(gathered, local)
    return memory


def test_the_buffer_of_a_collective():
    assert run_ranks(2, gather) == [PeakMemory(2 * MATRIX, 2 * MATRIX)] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_the_allocators_own_peak():
    def block(x):
        weight = x.clone().requires_grad_()
        (weight @ x).log_softmax(1).exp().sum().backward()
        return weight.grad

    need(block, "cuda")  # cuBLAS allocates its workspace on the first use
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated() + MATRIX  # x
    assert need(block, "cuda").peak == torch.cuda.max_memory_allocated() - start


@pytest.mark.parametrize("releases", [True, False])
def test_the_cache_is_emptied_before_servers_take_their_memory_again(monkeypatch, releases):
    """And only if they had given it back: emptying waits for the device."""
    from megatron_taopd.parallel import platform

    calls = []
    monkeypatch.setattr(platform, "empty_cache", lambda: calls.append("empty cache"))
    engine = engine_that_pushes(lambda: calls.append("resume and push"), releases)
    engine.update_weights([], version=1)
    assert calls == [*(["empty cache"] if releases else []), "resume and push"]
