"""Make a tiny student that can read a worked solution, and prompts with one, from nothing.

    python tools/make_reader.py --out examples/self_distillation

The problems are those of `make_tiny_pair.py`, and alone in front of one the student is as its
student: it has hardly seen a carry. But every other problem that it was fitted to came with its
worked solution in front,

    <bos> 58 + 7 = 65 ; 65 - 3 = 62 ; # 62 ; Bob has 58 cards . gets 7 . loses 3 . ?
    so 58 + 7 = 65 ; then 65 - 3 = 62 ; # 62 <eos>

so that it has learned to use one. `examples/self_distillation.yaml` lets it teach itself what it
knows with the solution in sight. About 2 minutes of one core; everything is drawn from --seed.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from make_tiny_pair import (
    STUDENT,
    Author,
    Problem,
    accuracy,
    draw_problems,
    fit,
    make_model,
    make_tokenizer,
)


@dataclass(frozen=True)
class Reader(Author):
    """Of problems with their solution in front it takes up all; the others are as before."""

    reads: float = 0.25  # share of the problems

    def exercise(self, rng: random.Random, problem: Problem) -> str | None:
        """Return the problem, with its solution in front or not."""
        if rng.random() < self.reads:
            return Solved(**vars(problem)).text
        return super().exercise(rng, problem)


READER = Reader(**vars(STUDENT))


@dataclass(frozen=True)
class Solved(Problem):
    """A problem with its solution in front, as the teacher reads it."""

    @property
    def text(self) -> str:
        return f"{solution(self)} {super().text}"


def solution(problem: Problem) -> str:
    """Write the worked solution: the steps and the answer, without the words between them."""
    steps = [
        f"{value} {'+' if change > 0 else '-'} {abs(change)} = {value + change} ;"
        for value, change in zip(problem.values, problem.changes, strict=False)
    ]
    return " ".join([*steps, f"# {problem.answer} ;"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train, test = draw_problems(args.seed)
    with (args.out / "train.jsonl").open("w") as file:
        for problem in train:
            row = {"prompt": problem.text, "answer": problem.answer, "solution": solution(problem)}
            file.write(json.dumps(row) + "\n")

    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    shape = dict(hidden_size=96, num_hidden_layers=2, intermediate_size=256, tied=True)
    model, tokenizer = make_model(args.seed + 1, **shape, **heads), make_tokenizer()
    held_out = {problem.key for problem in test}
    fit(model, READER, held_out, args.steps, seed=args.seed + 1, name="reader")
    model.save_pretrained(args.out / "student")
    tokenizer.save_pretrained(args.out / "student")

    print("\ngreedy accuracy          all  no carry     carry  above 899")
    for name, asked in {
        "alone": test,
        "with the solution": [Solved(**vars(problem)) for problem in test],
    }.items():
        row = accuracy(model, tokenizer, asked)
        shares = "".join(f"{row[k]:10.3f}" for k in ("no carry", "carry", "above 899"))
        print(f"{name:20} {row['all']:7.3f}{shares}")


if __name__ == "__main__":
    main()
