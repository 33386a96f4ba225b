"""A student of experts: auxiliary loss, frozen routers, and what is logged of the load."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support import dense
from support.ranks import run_ranks
from support.rounding import MULTIPLE
from support.step import (
    gradients_by_name,
    make_batch,
    make_model,
    relative_error,
    row_logits,
    step_on_ranks,
)

SIZE, EXPERTS, CHOSEN, WEIGHT = 200, 4, 2, 0.7
BATCH = make_batch(SIZE)
EVERYTHING = torch.ones(BATCH.num_rows, dtype=torch.bool)
LAYOUTS = {  # world size, student (tp, pp, sequence, seed, ep), teacher
    "one rank": (1, (1, 1, False, 0, 1), (1, 1, False)),
    "TP2 SP": (2, (2, 1, True, 0, 1), (1, 2, False)),
    "PP2": (2, (1, 2, False, 0, 1), (1, 1, False)),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    return (
        make_model(path / "student", SIZE, 32, layers=4, seed=0, tied=False, experts=EXPERTS),
        make_model(path / "teacher", 216, 48, layers=4, seed=1, tied=False),
    )


def gate_logits(student):
    """By layer [T, E], of all tokens but each sequence's last, after which there is no row."""
    found = [[] for _ in student.model.layers]
    for index, layer in enumerate(student.model.layers):
        layer.mlp.gate.register_forward_hook(lambda *args, i=index: found[i].append(args[-1][0]))
    for i in range(BATCH.num_sequences):
        student(BATCH.sequence(i)[None, :-1])
    return [torch.cat(logits) for logits in found]


def balance(logits):
    """E Σ_e f_e P_e: e's share of the tokens' choices, times its mean probability."""
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(CHOSEN).indices.flatten().bincount(minlength=EXPERTS)
    return EXPERTS * (chosen / chosen.sum() * probabilities.mean(0)).sum(), chosen


def gradients_and_balance(pair, dtype):
    z_s, z_t, student = row_logits(*pair, BATCH, SIZE, dtype=dtype)
    layers = [balance(logits) for logits in gate_logits(student)]
    loss = dense.divergence(z_s, z_t, "reverse_kl").mean()
    (loss + WEIGHT * sum(value for value, _ in layers)).backward()
    return gradients_by_name(student), layers


@pytest.fixture(scope="module")
def oracle(pair):
    exact, layers = gradients_and_balance(pair, torch.float64)
    with dense.in_float32():
        plain, _ = gradients_and_balance(pair, torch.float32)
    return exact, relative_error(plain, exact), layers


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_auxiliary_loss_agrees_with_dense_float64(pair, oracle, name):
    """A micro-batch has all tokens, so that Megatron's balance is that of the batch."""
    exact, rounding, layers = oracle
    world_size, *layout = LAYOUTS[name]
    step = partial(
        step_on_ranks, mask=EVERYTHING, micro_batch_tokens=1000, moe={"aux_loss": WEIGHT}
    )
    for result in run_ranks(world_size, step, *pair, *layout, BATCH, SIZE):
        assert relative_error(result["gradients"], exact) <= MULTIPLE * rounding
        mean = sum(value for value, _ in layers).item() / len(layers)
        assert result["metrics"]["moe/aux_loss"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_load_is_logged(pair, oracle, name):
    loads = torch.stack([chosen for _, chosen in oracle[2]]).double()
    relative = loads / loads.mean(1, keepdim=True)
    world_size, *layout = LAYOUTS[name]
    step = partial(step_on_ranks, mask=EVERYTHING, micro_batch_tokens=1000)
    for result in run_ranks(world_size, step, *pair, *layout, BATCH, SIZE):
        metrics = result["metrics"]
        assert metrics["moe/load_max"] == pytest.approx(relative.max().item())
        assert metrics["moe/load_min"] == pytest.approx(relative.min().item())
        assert metrics["moe/dropped_tokens"] == 0 and "moe/aux_loss" not in metrics


@pytest.mark.parametrize("router", ["train", "frozen"])
def test_routers_learn_or_do_not(pair, router):
    """Of the weights, all others change."""
    from safetensors.torch import load_file

    before = load_file(f"{pair[0]}/model.safetensors")
    step = partial(step_on_ranks, moe={"router": router})
    layout = (1, 1, False, 0, 2), (1, 1, False)
    for result in run_ranks(2, step, *pair, *layout, BATCH, SIZE):
        assert result["weights"].keys() == before.keys()
        same = {n for n, tensor in result["weights"].items() if torch.equal(tensor, before[n])}
        routers = {name for name in before if name.endswith("mlp.gate.weight")}
        assert len(routers) == 4 and same == (routers if router == "frozen" else set())
