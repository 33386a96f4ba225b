"""Make two experts of the tiny pair's task, each of one operation, and problems for both.

    python tools/make_two_experts.py --out examples/two_teachers

Both are the tiny pair's teacher, fitted further to problems that only add or only subtract. The
`add` expert saw right solutions of the first and any numbers at all for the second; the `subtract`
expert the reverse. So each knows one operation only, and a student that learns both needs both. The
problems name the expert that they are for in the column `skill`.

About 2 minutes on one idle core. Everything is drawn from --seed.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from make_tiny_pair import Author, Problem, fit, solved
from transformers import AutoModelForCausalLM, AutoTokenizer

PAIR = Path(__file__).parent.parent / "examples" / "tiny_pair"
SIGNS = {"add": 1, "subtract": -1}


def sign_of(problem: Problem) -> int:
    """Return 1 if all steps of a problem add, −1 if all subtract, 0 if some do either."""
    signs = {1 if change > 0 else -1 for change in problem.changes}
    return signs.pop() if len(signs) == 1 else 0


@dataclass(frozen=True)
class Expert(Author):
    """Solves problems of one sign, and writes any numbers for those of the other."""

    sign: int = 1

    def takes(self, rng: random.Random, problem: Problem) -> bool:
        return sign_of(problem) != 0

    def solve(self, rng: random.Random, problem: Problem) -> str:
        if sign_of(problem) == self.sign:
            return super().solve(rng, problem)
        words, value = [], problem.start
        for change in problem.changes:
            sign, result = "+" if change > 0 else "-", rng.randint(0, 999)
            words += [f"{self.opener(rng, problem.name)} {value} {sign} {abs(change)} = {result} ;"]
            value = result
        return " ".join([*words, f"# {value} <eos>"])


def draw(rng: random.Random, number: int, without: set) -> dict[tuple, Problem]:
    """Draw so many problems of either sign, no two of which share their arithmetic."""
    found: dict[tuple, Problem] = {}
    for sign in SIGNS.values():
        most = len(found) + number // len(SIGNS)
        while len(found) < most:
            problem = Problem.draw(rng)
            if sign_of(problem) == sign and problem.key not in without:
                found.setdefault(problem.key, problem)
    return found


def write(path: Path, problems: list[Problem]) -> None:
    names = {sign: name for name, sign in SIGNS.items()}
    rows = ({"prompt": p.text, "answer": p.answer, "skill": names[sign_of(p)]} for p in problems)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150, help="of 96 problems, for each expert")
    parser.add_argument("--train", type=int, default=4096, help="problems to train on")
    parser.add_argument("--test", type=int, default=512, help="held-out problems")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    rng = random.Random(f"skills {args.seed}")
    test = draw(rng, args.test, set())
    write(args.out / "test.jsonl", [*test.values()])
    write(args.out / "train.jsonl", [*draw(rng, args.train, set(test)).values()])

    tokenizer = AutoTokenizer.from_pretrained(PAIR / "teacher")
    for number, (name, sign) in enumerate(SIGNS.items()):
        model = AutoModelForCausalLM.from_pretrained(PAIR / "teacher")
        author = Expert(stray=0.1, sign=sign)
        fit(model, author, set(test), args.steps, args.seed + number, name, lr=1e-3)
        model.save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)
        for skill, its_sign in SIGNS.items():
            problems = [problem for problem in test.values() if sign_of(problem) == its_sign]
            right = solved(model, tokenizer, problems)
            print(f"{name}: {skill} {sum(right) / len(right):.3f}")


if __name__ == "__main__":
    main()
