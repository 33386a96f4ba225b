"""Make the tiny pair of the quickstart from nothing: a teacher, a student, their prompts.

    python tools/make_tiny_pair.py --out examples/tiny_pair

Word problems over the integers 0–999, each of them one token:

    <bos> Bob has 58 cards . gets 7 . loses 3 . ?
    so 58 + 7 = 65 ; then 65 - 3 = 62 ; # 62 <eos>

The teacher solves them. The student has two gaps: it saw hardly any problem with a carry or a
borrow, and none with a number above 899. Both begin each step with a word from a lexicon that
depends on the person in the story; the student's is displaced from the teacher's by an amount that
also depends on the person, so that the two overlap in degrees. The checker ignores these words.

About 6 minutes on one idle core. Everything is drawn from --seed; another machine, or another
version of torch, gives slightly different weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
SYMBOLS = ["#", "+", "-", "=", ";", ".", "?", "has"]
NAMES = ["Ann", "Bob", "Eve", "Ida", "Max", "Sam", "Tom", "Zoe"]
THINGS = ["apples", "books", "cards", "coins", "eggs", "nuts", "pens", "shells"]
GAINS = ["buys", "finds", "gets", "wins"]
LOSSES = ["eats", "gives", "loses", "sells"]
RING = """
    so then now next thus hence well okay right first again also still here there and but yes good
    fine sure alright finally later soon once since therefore accordingly consequently meanwhile
    afterwards thereafter subsequently lastly initially clearly plainly simply surely indeed
    naturally obviously evidently basically exactly precisely altogether overall together onward
    forward further furthermore moreover besides likewise similarly additionally anyway thereby
    thereupon whereupon given
"""
OPENERS = RING.split()  # 64 ways to begin a step; a lexicon is a window on this ring
NUMBERS = [str(n) for n in range(1000)]
WORDS = SPECIAL + SYMBOLS + NAMES + THINGS + GAINS + LOSSES + OPENERS + NUMBERS
ID = {word: i for i, word in enumerate(WORDS)}
PAD, EOS, BOS, ZERO = ID["<pad>"], ID["<eos>"], ID["<bos>"], ID["0"]
LARGEST_CHANGE = 9
VOCAB_SIZE = math.ceil(len(WORDS) / 128) * 128  # rows past the tokenizer's, as Qwen has them


@dataclass(frozen=True)
class Problem:
    """A start and one to three signed changes; every value on the way is in 0 … 999."""

    name: str
    thing: str
    start: int
    verbs: tuple[str, ...]
    changes: tuple[int, ...]

    @classmethod
    def draw(cls, rng: random.Random) -> Problem:
        start, verbs, changes = rng.randint(10, 999), [], []
        value = start
        for _ in range(rng.randint(1, 3)):
            change = rng.choice([-1, 1]) * rng.randint(1, LARGEST_CHANGE)
            if not 0 <= value + change <= 999:
                change = -change
            verbs.append(rng.choice(GAINS if change > 0 else LOSSES))
            changes.append(change)
            value += change
        return cls(rng.choice(NAMES), rng.choice(THINGS), start, tuple(verbs), tuple(changes))

    @property
    def key(self) -> tuple[int, ...]:
        """The arithmetic alone: two problems with the same key differ only in their words."""
        return (self.start, *self.changes)

    @property
    def values(self) -> list[int]:
        """The start and the result of every step."""
        return [self.start + sum(self.changes[:i]) for i in range(len(self.changes) + 1)]

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def carries(self) -> bool:
        """Whether a step changes more than the last digit: it carries, or borrows."""
        tens = [value // 10 for value in self.values]
        return len(set(tens)) > 1

    @property
    def text(self) -> str:
        steps = " ".join(f"{v} {abs(c)} ." for v, c in zip(self.verbs, self.changes, strict=True))
        return f"{self.name} has {self.start} {self.thing} . {steps} ?"


@dataclass(frozen=True)
class Author:
    """Who writes the worked solutions that a model is fitted to, and of which problems."""

    displacement: float = 0.0  # of the lexicon, in words per index of the name
    stray: float = 0.0  # probability of any opener at all
    largest: int = 999  # no problem with a value above it
    practice: float = 1.0  # share of the problems with a carry or borrow that are taken up

    def takes(self, rng: random.Random, problem: Problem) -> bool:
        if max(problem.values) > self.largest:
            return False
        return not problem.carries or rng.random() < self.practice

    def exercise(self, rng: random.Random, problem: Problem) -> str | None:
        """Return what a model is asked, or None if the problem is not taken up."""
        return problem.text if self.takes(rng, problem) else None

    def opener(self, rng: random.Random, name: str) -> str:
        if rng.random() < self.stray:
            return rng.choice(OPENERS)
        centre = (8 + self.displacement) * NAMES.index(name)
        return OPENERS[round(rng.gauss(centre, 5.0)) % len(OPENERS)]

    def solve(self, rng: random.Random, problem: Problem) -> str:
        words = []
        for value, change in zip(problem.values, problem.changes, strict=False):
            opener, sign = self.opener(rng, problem.name), "+" if change > 0 else "-"
            words.append(f"{opener} {value} {sign} {abs(change)} = {value + change} ;")
        return " ".join([*words, f"# {problem.answer} <eos>"])


TEACHER = Author(stray=0.1)
STUDENT = Author(displacement=2.5, largest=899, practice=0.02)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, <bos> in front; decoding joins the words with spaces."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def make_model(seed: int, tied: bool, **shape) -> Qwen3ForCausalLM:
    """A fresh Qwen3 model whose number embeddings start as sums of their digits' vectors."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            **shape,
        )
    )
    std, width = 0.08, shape["hidden_size"]
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight.normal_(0, std)
        digits = torch.randn(3, 10, width) * std / math.sqrt(3)
        n = torch.arange(1000)
        embedding[ZERO : ZERO + 1000] *= 0.3
        embedding[ZERO : ZERO + 1000] += (
            digits[0, n // 100] + digits[1, n // 10 % 10] + digits[2, n % 10]
        )
        model.lm_head.weight.copy_(embedding)
    return model


def fit(model, author: Author, held_out: set, steps: int, seed: int, name: str, batch=96, lr=3e-3):
    """Cross-entropy on the author's solutions of fresh problems, none of them held out."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1, (s + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * s / steps))),
    )
    started = time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        inputs, labels = [], []
        while len(inputs) < batch:
            problem = Problem.draw(rng)
            asked = None if problem.key in held_out else author.exercise(rng, problem)
            if asked is None:
                continue
            prompt = [BOS, *map(ID.__getitem__, asked.split())]
            response = [ID[word] for word in author.solve(rng, problem).split()]
            inputs.append(torch.tensor(prompt + response))
            labels.append(torch.tensor([-100] * len(prompt) + response))
        inputs = torch.nn.utils.rnn.pad_sequence(inputs, True, PAD)
        labels = torch.nn.utils.rnn.pad_sequence(labels, True, -100)[:, 1:]
        rows = labels != -100
        hidden_states = model.model(input_ids=inputs).last_hidden_state[:, :-1][rows]
        loss = F.cross_entropy(model.lm_head(hidden_states), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            seconds = time.perf_counter() - started
            print(f"{name} {step:5d}/{steps}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)


@torch.no_grad()
def solved(model, tokenizer, problems: list[Problem]) -> list[bool]:
    """Whether greedy decoding ends in `# answer <eos>`, problem by problem."""
    model.eval()
    inputs = tokenizer([p.text for p in problems], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=32, use_cache=True)
    texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])
    endings = [text.split("<eos>")[0].split() for text in texts]
    return [e[-2:] == ["#", str(p.answer)] for e, p in zip(endings, problems, strict=True)]


def accuracy(model, tokenizer, problems: list[Problem]) -> dict[str, float]:
    """Greedy accuracy over all problems, and by what they ask for."""
    kinds: dict[str, list[bool]] = {"all": [], "no carry": [], "carry": [], "above 899": []}
    for problem, right in zip(problems, solved(model, tokenizer, problems), strict=True):
        kind = "carry" if problem.carries else "no carry"
        kinds["above 899" if max(problem.values) > STUDENT.largest else kind].append(right)
        kinds["all"].append(right)
    return {kind: sum(rights) / len(rights) for kind, rights in kinds.items()}


def draw_problems(seed: int) -> tuple[list[Problem], list[Problem]]:
    """Draw the problems of training and those of the test, which share no arithmetic."""
    rng = random.Random(f"problems {seed}")
    test = [Problem.draw(rng) for _ in range(1024)]
    held_out = {p.key for p in test}
    train: dict[tuple, Problem] = {}
    while len(train) < 6144:
        problem = Problem.draw(rng)
        if problem.key not in held_out:
            train.setdefault(problem.key, problem)
    return list(train.values()), test


def write_problems(path: Path, problems: list[Problem]) -> None:
    lines = (json.dumps({"prompt": p.text, "answer": p.answer}) + "\n" for p in problems)
    path.write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--student-steps", type=int, default=450)
    parser.add_argument("--only", choices=["teacher", "student", "data"], help="make one part")
    parser.add_argument("--json", type=Path, help="write the table here, for programs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train, test = draw_problems(args.seed)
    held_out = {p.key for p in test}
    write_problems(args.out / "train.jsonl", train)
    write_problems(args.out / "test.jsonl", test)

    tokenizer = make_tokenizer()
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    recipes = {
        "teacher": (
            dict(hidden_size=128, num_hidden_layers=4, intermediate_size=320, tied=False),
            (TEACHER, held_out, args.teacher_steps),
        ),
        "student": (
            dict(hidden_size=96, num_hidden_layers=2, intermediate_size=256, tied=True),
            (STUDENT, held_out, args.student_steps),
        ),
    }
    made = {}
    for i, (name, (shape, recipe)) in enumerate(recipes.items()):
        if args.only not in (None, name):
            continue
        model = make_model(args.seed + i, **shape, **heads)
        fit(model, *recipe, seed=args.seed + i, name=name)
        model.save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)
        parameters = sum(p.numel() for p in model.parameters())
        made[name] = {"parameters": parameters, **accuracy(model, tokenizer, test)}

    print("\ngreedy accuracy    all  no carry     carry  above 899   parameters")
    for name, row in made.items():
        shares = "".join(f"{row[k]:10.3f}" for k in ("no carry", "carry", "above 899"))
        print(f"{name:15} {row['all']:6.3f}{shares}   {row['parameters']:10,}")
    if args.json:
        args.json.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
