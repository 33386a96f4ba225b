"""What a step costs in floating-point operations, phase by phase, beside what full OPD would.

By formula, from the models' shapes and the lengths run: the same on every machine. An operation is
a multiplication or an addition of a matrix product; norms, softmax and the selection are left out.
The share of positions that is supervised is not the share of this that is spent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from transformers import PretrainedConfig

from megatron_taopd.formats.hf_map import head_dim, num_experts, padded_vocab_size


@dataclass(frozen=True)
class ModelCost:
    """Forward operations of a model.

    Attributes:
        per_token: of the trunk's matrices, for each token.
        per_pair: of attention, for each pair of a token and one that it sees (itself included).
        per_row: of the head, for each row.
    """

    per_token: int
    per_pair: int
    per_row: int

    @classmethod
    def of(cls, hf: PretrainedConfig) -> ModelCost:
        """Read a model's cost off its configuration.

        A family without a table of weights (a served teacher's) counts as Llama's or, with experts,
        as Qwen3-MoE's: roughly.
        """
        hf = hf.get_text_config()
        heads = getattr(hf, "num_attention_heads", 0)  # some have none
        queries = heads and heads * head_dim(hf)
        keys = heads and (getattr(hf, "num_key_value_heads", None) or heads) * head_dim(hf)
        attention = hf.hidden_size * (2 * queries + 2 * keys)  # q and output, k and v
        width = getattr(hf, "intermediate_size", None) or 4 * hf.hidden_size
        if visited := getattr(hf, "num_experts_per_tok", None):
            width = visited * (getattr(hf, "moe_intermediate_size", None) or width)
        mlp = 3 * hf.hidden_size * width + hf.hidden_size * num_experts(hf)  # and the router
        return cls(
            per_token=2 * hf.num_hidden_layers * (attention + mlp),
            per_pair=4 * hf.num_hidden_layers * queries,  # scores, and the sum of values
            per_row=2 * hf.hidden_size * padded_vocab_size(hf.vocab_size),
        )

    def trunk(self, lengths: Tensor) -> int:
        """One forward pass over sequences of these lengths [N], causal."""
        lengths = lengths.long()
        pairs = int((lengths * (lengths + 1)).sum()) // 2
        return self.per_token * int(lengths.sum()) + self.per_pair * pairs


@dataclass(frozen=True)
class Work:
    """What is run in one step, over all ranks.

    Attributes:
        scored, read, trained: [N] tokens of each sequence that the student runs for the scores, the
            teacher reads, and the student runs for training (0: not run).
        num_rows, kept_rows: response rows of the batch, and those trained on.
        replayed: the training pass found the layers' outputs (`models.replay`).
        recompute: none, selective (core attention) or full.
        generated: [N] response tokens of each sequence that the engine has generated, 0 of
            references.
    """

    scored: Tensor
    read: Tensor
    trained: Tensor
    num_rows: int
    kept_rows: int
    replayed: bool
    recompute: str
    generated: Tensor


def step_operations(student: ModelCost, teacher: ModelCost, work: Work) -> dict[str, float]:
    """Count the operations of one step, over all ranks.

    Returns:
        flops/{rollout,teacher,scoring,training}: rollout as one forward pass over all tokens of the
            sequences that were generated and a head for each such token; scoring with both heads on
            all rows.
        flops/recomputed: the part of training that `recompute` computes a second time.
        flops/full_opd: teacher and training on all rows and tokens, with the same recomputation and
            no scoring.
        flops/of_full_opd: teacher, scoring and training over that.
    """

    def again(lengths: Tensor) -> int:
        """What recomputation adds to a forward and a backward pass."""
        if work.recompute == "full":
            return student.trunk(lengths)
        pairs = student.trunk(lengths) - student.per_token * int(lengths.sum())
        return pairs if work.recompute == "selective" else 0

    heads = 3 * student.per_row + teacher.per_row  # the student's two gradients are a matmul each
    reading = teacher.trunk(work.read)
    scoring = student.trunk(work.scored) + work.num_rows * (student.per_row + teacher.per_row)
    training = 3 * student.trunk(work.trained) + work.kept_rows * heads
    # A replayed layer runs once forward and once backward; nothing is left to recompute but what it
    # does not keep itself.
    recomputed = 0
    if not work.replayed or work.recompute == "selective":
        recomputed = again(work.trained)
    training += recomputed
    rolled_out = student.trunk(work.scored * (work.generated > 0))
    rolled_out += int(work.generated.sum()) * student.per_row
    full = reading + 3 * student.trunk(work.scored) + again(work.scored) + work.num_rows * heads
    return {
        "flops/rollout": float(rolled_out),
        "flops/teacher": float(reading),
        "flops/scoring": float(scoring),
        "flops/training": float(training),
        "flops/recomputed": float(recomputed),
        "flops/full_opd": float(full),
        "flops/of_full_opd": (reading + scoring + training) / full,
    }


def added(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Add up the `step_operations` of sequences that different teachers read."""
    each = list(parts)
    total = {name: sum(part[name] for part in each) for name in each[0]}
    done = sum(total[f"flops/{phase}"] for phase in ("teacher", "scoring", "training"))
    return total | {"flops/of_full_opd": done / total["flops/full_opd"]}
