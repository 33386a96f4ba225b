"""The step of the other arms, by TRL's trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from benchmarks.step.pairs import Models
from benchmarks.step.step import Step, metered, say
from megatron_taopd.parallel import platform


def trl_phases(step: Step, measured: dict) -> dict[tuple, Callable]:
    """Teacher, loss and backward pass of TRL's DistillationTrainer on the same rollouts."""
    student, teacher = step.models.peers()
    phases, measured["trl"] = {}, []
    for recompute in ("none", "full"):
        run, losses, sequences = trl_step(student, teacher, step.batch, step.models, recompute)
        name = f"recompute {recompute}"
        with step.models.without_gradients():
            memory = metered(run)["peak"]
        measured["trl"].append(
            {
                "name": name,
                "recompute": recompute,
                "loss": sum(losses),
                "sequences_at_a_time": sequences,
                "peak": memory,
            }
        )
        say(f"TRL, {name}: loss {sum(losses):.6f}, {memory / 1e6:,.0f} MB")
        phases["trl", name, "step"] = run
    return phases


def trl_step(student, teacher, batch, models: Models, recompute: str):
    """(a function that does the step, the losses of its micro-batches, sequences in one)."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from trl import DistillationConfig, DistillationTrainer

    rollouts = padded(batch)
    width = rollouts["prompt_ids"].shape[1] + rollouts["completion_ids"].shape[1]
    count = batch.num_sequences
    at_once = max(
        n for n in range(1, count + 1)
        if count % n == 0 and (n == 1 or n * width <= models.micro_batch_tokens)
    )  # fmt: skip

    class OnGivenRollouts(DistillationTrainer):
        def _generate_and_score_completions(self, _prompts):
            return dict(rollouts)

    # Nothing is tokenised; the trainer wants to have something that could.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")), pad_token="a", eos_token="a"
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = OnGivenRollouts(
            student,
            teacher,
            DistillationConfig(
                output_dir=folder,
                use_cpu=not torch.cuda.is_available(),
                bf16=False,
                beta=1.0,
                per_device_train_batch_size=at_once,
                gradient_accumulation_steps=count // at_once,
                gradient_checkpointing=recompute == "full",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["a"] * count}),
            processing_class=tokenizer,
        )
    trainer.current_gradient_accumulation_steps = count // at_once
    losses: list[float] = []

    def run() -> list[Tensor]:
        if recompute == "full":
            student.gradient_checkpointing_enable()
        else:
            student.gradient_checkpointing_disable()
        losses.clear()
        for _ in range(count // at_once):
            loss = trainer.training_step(trainer.model, [{}], num_items_in_batch=batch.num_rows)
            losses.append(float(loss))
        gradients = [parameter.grad for parameter in student.parameters()]
        student.zero_grad(set_to_none=True)
        return gradients

    return run, losses, at_once


def padded(batch) -> dict[str, Tensor]:
    """The rollouts as TRL has them: prompts padded on the left, completions on the right."""
    cuts = zip(range(batch.num_sequences), batch.prompt_lengths.tolist(), strict=True)
    prompts, completions = zip(
        *(batch.sequence(i).tensor_split([length]) for i, length in cuts), strict=True
    )
    result = {}
    sides = {"prompt": (prompts, "left"), "completion": (completions, "right")}
    for name, (sequences, side) in sides.items():
        result[f"{name}_ids"] = pad_sequence(sequences, True, 0, side)
        masks = [torch.ones_like(sequence) for sequence in sequences]
        result[f"{name}_mask"] = pad_sequence(masks, True, 0, side)
    result = {name: tensor.to(platform.device()) for name, tensor in result.items()}
    return result | {"num_items_in_batch": torch.tensor(float(batch.num_rows))}
