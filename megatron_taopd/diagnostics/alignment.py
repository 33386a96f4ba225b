"""Proposition 1 (Eq. 2), token by token: does a step on one token's loss do what gradients say?

With g_t = ∇ℓ_t, the gradient of the reverse KL at one position (Eq. 6), and L_fix the mean over a
fixed set of positions of KL(p_T ‖ p_θ), what G (Eq. 1) is a reduction of, one step of plain
gradient descent θ − η·g_t reduces L_fix by

    G_t = η⟨∇L_fix, g_t⟩ + R_t        with |R_t| ≤ β η²/2 ‖g_t‖²

Both sides are computed, in float64, for several η. One process and a plain transformers model: each
token takes a backward pass, and a forward pass for every η.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_taopd.data.vocab_map import VocabMap, Vocabulary
from megatron_taopd.diagnostics.bank import Bank
from megatron_taopd.formats.files import file_written_aside
from megatron_taopd.formats.hf import load_config, load_model
from megatron_taopd.formats.hf_map import longest_sequence
from megatron_taopd.parallel.vocab import VocabShard, divergence
from megatron_taopd.types import Sequences


@dataclass(frozen=True)
class Steps:
    """What one step on each of T tokens' losses does to L_fix, for E learning rates; float64.

    Attributes:
        inner: [T] ⟨∇L_fix, g_t⟩.
        squared_norm: [T] ‖g_t‖².
        lrs: [E] η.
        gains: [E, T] G_t.
    """

    inner: Tensor
    squared_norm: Tensor
    lrs: Tensor
    gains: Tensor

    @property
    def predicted(self) -> Tensor:
        """[E, T] η⟨∇L_fix, g_t⟩."""
        return self.lrs[:, None] * self.inner

    @property
    def remainders(self) -> Tensor:
        """[E, T] R_t."""
        return self.gains - self.predicted

    @property
    def smoothness(self) -> Tensor:
        """[E, T] the least β with which the bound holds."""
        return 2 * self.remainders.abs() / (self.lrs[:, None] ** 2 * self.squared_norm)

    def summary(self) -> list[dict[str, float | None]]:
        """Say for each η, the largest first, how much of G the inner product explains.

        Also say how R shrinks with η. (R² of G against the prediction itself, no line fitted.)
        """
        rows = []
        for e, lr in enumerate(self.lrs.tolist()):
            gains, left = self.gains[e], self.remainders[e]
            falls = None
            if e:  # the median, as a token whose R is rounding alone has no order
                falls = (self.remainders[e - 1].abs() / left.abs()).median().item()
            rows.append(
                {
                    "lr": lr,
                    "tokens": len(gains),
                    "gain_mean": gains.mean().item(),
                    "predicted_mean": self.predicted[e].mean().item(),
                    "explained": 1
                    - (left.square().sum() / (gains - gains.mean()).square().sum()).item(),
                    "same_sign": (gains.sign() == self.inner.sign()).double().mean().item(),
                    "remainder_mean": left.abs().mean().item(),
                    "remainder_falls": falls,
                    "smoothness_max": self.smoothness[e].max().item(),
                }
            )
        return rows


Losses = Callable[[str, Sequence[Tensor]], Tensor]


def take_steps(
    losses: Losses, parameters: Sequence[Tensor], tokens: Sequence[int], lrs: Sequence[float]
) -> Steps:
    """Try a step on the loss of each token.

    Args:
        losses: [R] the divergence of a kind at every position, with these parameters; float64.
        parameters: from which every step is taken.
        tokens: the rows whose ℓ_t are stepped on.
        lrs: η, the largest first.
    """
    before = losses("forward_kl", parameters).mean()
    direction = torch.autograd.grad(before, parameters)
    token_losses = losses("reverse_kl", parameters)
    inner, squared_norm, gains = [], [], []
    for t in tokens:
        gradient = torch.autograd.grad(token_losses[t], parameters, retain_graph=True)
        inner.append(sum((d * g).sum() for d, g in zip(direction, gradient, strict=True)))
        squared_norm.append(sum(g.square().sum() for g in gradient))
        with torch.no_grad():
            pairs = list(zip(parameters, gradient, strict=True))
            after = [losses("forward_kl", [p - lr * g for p, g in pairs]).mean() for lr in lrs]
        gains.append(before.detach() - torch.stack(after))
    etas = torch.tensor(lrs, dtype=torch.float64)
    return Steps(torch.stack(inner), torch.stack(squared_norm), etas, torch.stack(gains, dim=1))


def align(
    bank_dir: Path,
    checkpoint: Path,
    teacher: Path,
    out: Path,
    sequences: int,
    tokens: int,
    lrs: Sequence[float],
    teacher_prompt: str = "own",
) -> list[dict[str, float | None]]:
    """Write `Steps.summary` of the first sequences of a bank; each step's figures go to `out`.

    L_fix is taken over all response positions of these sequences.

    Args:
        checkpoint, teacher: Hugging Face directories.
        tokens: how many of the positions are stepped on, evenly spread.
        teacher_prompt: own or student, whose rendering of the prompts the teacher reads.

    Raises:
        ValueError: there is no such bank or model; the bank is of another tokenizer, or has fewer
            sequences.
    """
    bank = Bank(bank_dir)
    for directory in (checkpoint, teacher):
        load_config(directory)
    vocabulary, teacher_vocabulary = (Vocabulary.from_pretrained(d) for d in (checkpoint, teacher))
    bank.check_tokenizer(vocabulary, checkpoint)
    if min(sequences, tokens) < 1 or min(lrs) <= 0:
        raise ValueError("sequences, tokens and lr: have to be above 0")
    vocab_map = VocabMap.between(vocabulary, teacher_vocabulary)
    contexts = bank.first(sequences)
    batch = contexts.batch
    own = teacher_prompt == "own"
    prompts = contexts.prompts_for(teacher_vocabulary.tokenizer) if own else None
    models = [load_float64(directory) for directory in (checkpoint, teacher)]
    teacher_inputs, _ = vocab_map.read(batch, prompts, longest_sequence(models[1].config))
    with torch.no_grad():
        teacher_logits = row_logits(models[1], teacher_inputs)
        teacher_logits = teacher_logits[:, vocab_map.teacher_ids[vocab_map.common]]
    size = len(vocab_map.common)
    shard = VocabShard(0, size, None, size)
    names, parameters = zip(*models[0].named_parameters(), strict=True)

    def losses(kind: str, values: Sequence[Tensor]) -> Tensor:
        logits = row_logits(models[0], batch, dict(zip(names, values, strict=True)))
        return divergence(logits[:, vocab_map.common], teacher_logits, shard, kind)

    spread = torch.linspace(0, batch.num_rows - 1, min(tokens, batch.num_rows)).long()
    steps = take_steps(losses, parameters, spread.tolist(), lrs)
    at = batch.row_sequences()[spread]
    repeated = {
        "prompt": batch.prompts[at],
        "sequence": at,
        "position": spread - batch.cu_rows[at],
        "inner": steps.inner,
        "squared_norm": steps.squared_norm,
    }
    table = {name: values.repeat(len(lrs)).numpy() for name, values in repeated.items()}
    table["lr"] = steps.lrs.repeat_interleave(len(spread)).numpy()
    for name in ("gains", "predicted", "remainders"):
        table[name.removesuffix("s")] = getattr(steps, name).flatten().numpy()
    with file_written_aside(out) as aside:
        about = {"bank": bank.fingerprint, "checkpoint": str(checkpoint), "teacher": str(teacher)}
        pq.write_table(pa.table(table).replace_schema_metadata(about), aside)
    return steps.summary()


def load_float64(hf_dir: Path):
    """Return a transformers model that computes in float64 throughout.

    Its norms are replaced: transformers' work in fp32 whatever they get, which puts 1e-7 on a loss,
    far above the remainder of a small step.
    """
    model = load_model(hf_dir, torch.float64).eval()
    model.config.use_cache = False
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(module.weight.shape, module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def row_logits(model, read: Sequences, parameters: dict[str, Tensor] | None = None) -> Tensor:
    """Return [R, V] at the response rows, with these parameters in place of the model's own."""
    tokens = [read.sequence(i) for i in range(read.num_sequences)]
    padded = pad_sequence(tokens, batch_first=True)  # which no row sees: attention is causal
    logits = torch.func.functional_call(model, parameters or {}, (padded,)).logits
    return logits[read.row_sequences(), read.row_positions]
