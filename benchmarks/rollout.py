"""Tokens a CPU second of the in-process engine and of transformers' own loops, on the same prompts.

    python -m benchmarks.rollout
    python -m benchmarks.rollout --temperature 1.5 --max-new-tokens 96
    TAOPD_DATA=DIR python -m benchmarks.rollout --pair smollm2 --prompts 32 --batch-size 16

    engine          rows leave when they are finished, and prompts take their places
    fixed batches   transformers' `generate` with the engine's draws, each batch to its longest
                    response; the samples have to be the engine's
    generate        transformers' `generate` with its own sampling, in the same batches

Ways take turns in every round, with the round's seed. CPU seconds are those of this process; the
last column is the median over rounds of the engine's tokens a second to this way's. The SmolLM2
student is made by tools/prepare_smollm2.py. docs/results.md has what was seen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from megatron_taopd import config as configuration
from megatron_taopd.data.prompts import load_prompts
from megatron_taopd.data.vocab_map import Vocabulary
from megatron_taopd.formats.hf import load_model
from megatron_taopd.rollout.draws import DrawTokens, noise_key
from megatron_taopd.rollout.engine import Sampling
from megatron_taopd.rollout.local import LocalEngine

ROOT = Path(__file__).parents[1]
CONFIGS = {"tiny": "tiny_pair.yaml", "smollm2": "smollm2.yaml"}


def main(arguments: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", choices=CONFIGS, default="tiny", help="whose student and prompts")
    parser.add_argument("--student", help="its directory, if it is not where the example has it")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--samples", type=int, default=1, help="of a prompt")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, help="default: the example's")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    figures = measure(options)
    lengths = "{mean:.1f} tokens on average, {longest} at most".format(**figures["lengths"])
    title = f"{options.pair}, {options.prompts} prompts, batches of {options.batch_size}: {lengths}"
    table = Table("", "tokens", "CPU s", "tokens a CPU s", "engine to it", title=title, box=SIMPLE)
    for way, row in figures["ways"].items():
        speed = row["tokens"] / row["cpu_seconds"]
        figured = f"{row['tokens']:,}", f"{row['cpu_seconds']:.2f}", f"{speed:,.0f}"
        table.add_row(way, *figured, f"{row['ratio']:.2f} ×")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure(options: argparse.Namespace) -> dict:
    """Measure each way in every round: tokens and CPU seconds in all, and the ratio of speeds."""
    given = [f"student.path={options.student}"] if options.student else []
    config = configuration.load(ROOT / "examples" / CONFIGS[options.pair], given)
    path = config.student.path
    vocabulary = Vocabulary.from_pretrained(path)
    prompts = load_prompts(config.data.prompts, vocabulary.tokenizer, config.data)
    token_ids = prompts.token_ids[: options.prompts]
    longest = options.max_new_tokens or config.rollout.max_new_tokens
    sampling = Sampling(longest, options.samples, options.temperature)
    engine = LocalEngine.from_hf(
        path, torch.float32, "cpu", batch_size=options.batch_size,
        eos_token_ids=vocabulary.eos_token_ids,
    )  # fmt: skip
    fixed = FixedBatches(load_model(path, torch.float32), engine)
    ways: dict[str, Callable[[int], list[list[int]]]] = {
        "engine": lambda step: of_engine(engine, token_ids, step, sampling),
        "fixed batches": lambda step: fixed(token_ids, step, sampling, draws=True),
        "generate": lambda step: fixed(token_ids, step, sampling, draws=False),
    }
    spent = {way: [] for way in ways}
    for step in range(options.rounds):
        responses = {}
        for way, generate in ways.items():
            started = time.process_time()
            responses[way] = generate(step)
            seconds = time.process_time() - started
            spent[way].append((sum(map(len, responses[way])), seconds))
        assert responses["engine"] == responses["fixed batches"], "other samples"
    speeds = {way: [tokens / s for tokens, s in rounds] for way, rounds in spent.items()}
    lengths = [*map(len, responses["engine"])]
    return {
        "lengths": {"mean": statistics.mean(lengths), "longest": max(lengths)},
        "ways": {
            way: {
                "tokens": sum(tokens for tokens, _ in rounds),
                "cpu_seconds": sum(seconds for _, seconds in rounds),
                "ratio": statistics.median(
                    a / b for a, b in zip(speeds["engine"], speeds[way], strict=True)
                ),
            }
            for way, rounds in spent.items()
        },
    }


def of_engine(engine: LocalEngine, prompts, step: int, sampling: Sampling) -> list[list[int]]:
    batch = engine.generate(prompts, range(len(prompts)), step, sampling)
    split = batch.response_tokens().split(batch.response_lengths.tolist())
    return [tokens.tolist() for tokens in split]


class FixedBatches:
    """transformers' `generate`, a batch at a time, with prompts of about one length in each."""

    def __init__(self, model, engine: LocalEngine):
        self.model, self.engine = model.eval().requires_grad_(False), engine
        self.model.generation_config = GenerationConfig()

    def __call__(self, prompts, step: int, sampling: Sampling, draws: bool) -> list[list[int]]:
        """Return the responses, stop tokens included.

        Args:
            draws: draw as the engine does, instead of transformers' own way.
        """
        torch.manual_seed(step)
        each = [(i, s) for i in range(len(prompts)) for s in range(sampling.samples)]
        order = sorted(range(len(each)), key=lambda place: len(prompts[each[place][0]]))
        size, found = self.engine.batch_size, {}
        for start in range(0, len(order), size):
            places = order[start : start + size]
            keys = [noise_key(self.engine.seed, step, *each[place]) for place in places]
            rows = [prompts[each[place][0]] for place in places]
            tokens = self._batch(rows, Draws(keys, sampling) if draws else None, sampling)
            found |= zip(places, tokens, strict=True)
        return [found[place] for place in range(len(each))]

    def _batch(self, prompts, draws: Draws | None, sampling: Sampling) -> list[list[int]]:
        width = max(map(len, prompts))
        padded = [[0] * (width - len(p)) + list(p) for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        own = dict(do_sample=True, temperature=sampling.temperature, top_k=0)
        tokens = self.model.generate(
            torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=[*self.engine.eos_token_ids],
                pad_token_id=0,
                **({"do_sample": False} if draws else own),
            ),
            logits_processor=LogitsProcessorList([draws] if draws else []),
        )[:, width:]
        return [self._ended(row) for row in tokens.tolist()]

    def _ended(self, row: list[int]) -> list[int]:
        ends = self.engine.eos_token_ids
        return row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]


class Draws(LogitsProcessor):
    """Makes the argmax of `generate` the engine's draw, which also takes its log-probabilities."""

    def __init__(self, keys: list[tuple[int, int]], sampling: Sampling):
        self.keys, self.draw, self.position = torch.tensor(keys), DrawTokens(sampling), 0

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        positions = torch.full((len(self.keys),), self.position)
        tokens, _ = self.draw(logits, self.keys, positions)
        self.position += 1
        return torch.zeros_like(logits).scatter_(1, tokens[:, None], 1.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
