"""Operations by formula against torch's counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from megatron_taopd.monitoring.accounting import ModelCost, Work, step_operations

SIZES = dict(
    vocab_size=192,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
EXPERTS = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24)


@pytest.mark.parametrize(
    "config", [Qwen3Config(**SIZES), Qwen3MoeConfig(**SIZES, **EXPERTS)], ids=["dense", "experts"]
)
def test_a_forward_and_backward_pass_cost_what_torch_counts(config):
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    cost, length = ModelCost.of(config), 40
    tokens = torch.zeros(1, length, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter:
        loss = model(tokens, attention_mask=None).logits.sum()
    # Here every token is multiplied with every other before the mask; and the angles of the rotary
    # embedding are a small product, too.
    everything = cost.per_token * length + cost.per_pair * length**2 + cost.per_row * length
    assert counter.get_total_flops() == everything + 2 * (config.head_dim // 2) * length
    counter = FlopCounterMode(display=False)
    with counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * everything  # two products for each one forward


def test_causal_attention_counts_the_pairs_that_see_each_other():
    cost = ModelCost(per_token=0, per_pair=1, per_row=0)
    assert cost.trunk(torch.tensor([3, 0, 1])) == (1 + 2 + 3) + 1


STUDENT = ModelCost(per_token=10, per_pair=0, per_row=5)
TEACHER = ModelCost(per_token=40, per_pair=0, per_row=20)


def operations(trained, kept_rows, replayed=False, recompute="none"):
    scored = torch.tensor([50, 50])
    trained = torch.tensor(trained)
    generated = torch.tensor([40, 20])
    work = Work(scored, scored + 10, trained, 60, kept_rows, replayed, recompute, generated)
    return step_operations(STUDENT, TEACHER, work)


def test_a_step_is_the_sum_of_its_passes():
    result = operations([20, 0], 6)
    assert result["flops/rollout"] == 100 * 10 + 60 * 5
    assert result["flops/teacher"] == 120 * 40
    assert result["flops/scoring"] == 100 * 10 + 60 * (5 + 20)
    assert result["flops/training"] == 20 * 30 + 6 * (3 * 5 + 20)
    assert result["flops/full_opd"] == 120 * 40 + 100 * 30 + 60 * (3 * 5 + 20)
    spent = sum(result[f"flops/{phase}"] for phase in ("teacher", "scoring", "training"))
    assert result["flops/of_full_opd"] == spent / result["flops/full_opd"]


def test_what_is_not_generated_is_no_rollout():
    lengths = torch.tensor([50, 30])
    work = Work(lengths, lengths, lengths, 60, 6, False, "none", torch.tensor([0, 20]))
    found = step_operations(STUDENT, TEACHER, work)
    assert found["flops/rollout"] == 30 * 10 + 20 * 5
    assert found["flops/scoring"] == 80 * 10 + 60 * (5 + 20)


def test_replay_saves_the_forward_pass_that_full_recomputation_repeats():
    two_pass = operations([20, 0], 6, recompute="full")["flops/training"]
    replay = operations([20, 0], 6, replayed=True, recompute="full")["flops/training"]
    assert two_pass - replay == 20 * 10
    assert replay == operations([20, 0], 6)["flops/training"]


def test_training_on_everything_costs_more_than_full_opd():
    assert operations([50, 50], 60)["flops/of_full_opd"] > 1
