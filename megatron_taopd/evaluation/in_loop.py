"""Accuracy on problems with checkable answers, through whatever engine does the rollouts."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import comb, sqrt
from pathlib import Path
from statistics import NormalDist, mean
from subprocess import PIPE, Popen
from tempfile import TemporaryFile

from megatron_taopd.data.prompts import Prompts
from megatron_taopd.evaluation.answers import (
    extract_answer,
    is_correct,
    normalize_answer,
    reference_answer,
)
from megatron_taopd.parallel import progress, watchdog
from megatron_taopd.parallel.objects import on_rank_0
from megatron_taopd.rollout.engine import RolloutEngine, Sampling

logger = logging.getLogger(__name__)

DECODED = 64  # responses at a time
PLAIN_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")  # as `normalize_answer` writes one


@dataclass(frozen=True)
class Example:
    """One problem as it went."""

    prompt: str
    response: str
    answer: str
    gold: str
    correct: bool


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation.

    Attributes:
        accuracy: correct / total, of all responses.
        interval: of the accuracy, 95 % (`wilson`).
        pass_at: of each k that was asked for, the chance that one of k responses to a problem is
            right, estimated without bias from all of them.
        truncated: responses that hit the length limit (counted in total; right where they already
            state the answer).
        mean_length: tokens per response, the stop token included.
        examples: the first few problems, with the first response to each.
        per_prompt: right responses to each problem, of `samples` each.
        by_teacher: the accuracy on the problems of each of several teachers, by its number.
    """

    accuracy: float
    interval: tuple[float, float]
    pass_at: dict[int, float]
    correct: int
    total: int
    truncated: int
    mean_length: float
    examples: list[Example]
    per_prompt: list[int] = field(default_factory=list)
    samples: int = 1
    by_teacher: dict[int, float] = field(default_factory=dict)


Grader = Callable[[Sequence[str], Sequence[str]], list[bool]]  # responses and their references


def grade_exactly(responses: Sequence[str], golds: Sequence[str]) -> list[bool]:
    """`is_correct`, of each."""
    verdicts = []
    pairs = zip(responses, golds, strict=True)
    for response, gold in progress.track(pairs, len(golds), "grading"):
        verdicts.append(is_correct(response, gold))
    return verdicts


def grade_as_mathematics(responses: Sequence[str], golds: Sequence[str]) -> list[bool]:
    r"""What `is_correct` takes, and answers that Math-Verify finds equal: "0.5" and \frac{1}{2}.

    Two plain numbers are left to `is_correct`. An answer that takes Math-Verify more than
    `math_worker.CPU_S` is wrong.
    """
    right = grade_exactly(responses, golds)
    open_pairs = {}
    for place, (response, gold) in enumerate(zip(responses, golds, strict=True)):
        pair = (extract_answer(response), reference_answer(gold))
        if not right[place] and pair[0] is not None and not all(map(_is_plain_number, pair)):
            open_pairs.setdefault(pair, []).append(place)
    for places, verdict in zip(open_pairs.values(), _equal(list(open_pairs)), strict=True):
        for place in places:
            right[place] = verdict
    return right


def grader_name(name: str) -> str:
    """What `eval.grader` comes to: `auto` is math where Math-Verify is there, else exact."""
    if name != "auto":
        return name
    return "exact" if find_spec("math_verify") is None else "math"


def grader(name: str) -> Grader:
    """The grader of this name: exact, math or auto."""
    return {"exact": grade_exactly, "math": grade_as_mathematics}[grader_name(name)]


def open_grader(name: str) -> Grader:
    """Return the `grader` of this name, and log what `auto` has come to."""
    grade = grader(name)
    if name == "auto" and grade is grade_exactly:
        logger.info("eval.grader: exact, as Math-Verify is not installed")
    return grade


def _is_plain_number(answer: str) -> bool:
    return PLAIN_NUMBER.fullmatch(normalize_answer(answer)) is not None


def _equal(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether the expressions of each pair are equal, by math_worker.py; one that it dies over
    counts as different.
    """
    command = [sys.executable, "-I", str(Path(__file__).with_name("math_worker.py"))]
    with progress.phase("comparing expressions", len(pairs)) as shown:
        return _verdicts(command, pairs, shown)


def _verdicts(
    command: Sequence[str], pairs: Sequence[tuple[str, str]], shown: progress.Phase
) -> list[bool]:
    verdicts: list[bool] = []
    while rest := pairs[len(verdicts) :]:
        with TemporaryFile("w+") as lines, TemporaryFile("w+") as complaints:
            lines.writelines(json.dumps(pair) + "\n" for pair in rest)
            lines.seek(0)
            # A session of its own: a terminal's Ctrl-C is for this process, and would count as an
            # expression that the worker dies over.
            streams = {"stdin": lines, "stdout": PIPE, "stderr": complaints}
            with Popen(command, text=True, start_new_session=True, **streams) as worker:
                try:
                    for verdict in worker.stdout:
                        watchdog.heartbeat()
                        verdicts.append(json.loads(verdict))
                        shown.advance()
                except BaseException:
                    worker.kill()
                    raise
            if worker.returncode < 0:
                verdicts.append(False)
            elif worker.returncode:
                complaints.seek(0)
                raise RuntimeError(f"Math-Verify: {complaints.read().strip().splitlines()[-1]}")
    return verdicts


def pass_at(k: int, samples: int, correct: int) -> float:
    """The share of the k-subsets of so many samples that have a correct one: the unbiased estimate
    of pass@k (Chen et al., arXiv 2107.03374).
    """
    return 1 - comb(samples - correct, k) / comb(samples, k)


def wilson(per_prompt: Sequence[int], samples: int) -> tuple[float, float]:
    """Return the 95 % interval of the share of right responses, by Wilson's score.

    Several responses to one prompt are no independent ones: together they count as many as would
    have the variance that is seen between prompts (Korn and Graubard 1998), which is the number of
    prompts at least.

    Args:
        per_prompt: right responses to each prompt, of `samples`.
    """
    prompts, z = len(per_prompt), NormalDist().inv_cdf(0.975)
    share = sum(per_prompt) / (prompts * samples)
    number = float(prompts)
    if samples > 1 and 0 < share < 1:
        between = sum((c / samples - share) ** 2 for c in per_prompt) / max(1, prompts - 1)
        most = prompts * samples
        number = most if not between else share * (1 - share) * prompts / between
        number = min(max(number, prompts), most)
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    reach = z * sqrt(share * (1 - share) / number + z**2 / (4 * number**2)) / (1 + z**2 / number)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def evaluate(
    engine: RolloutEngine,
    prompts: Prompts,
    tokenizer,
    sampling: Sampling,
    step: int,
    grade: Grader = grade_exactly,
    ks: Sequence[int] = (),
    num_examples: int = 4,
) -> Evaluation:
    """Accuracy of the engine's current weights; the same on every rank.

    Collectives: as the engine's `generate`, once, and a broadcast of a byte for each response.

    Args:
        prompts: with an answer for each.
        sampling: of the responses; temperature 0 is greedy.
        grade: run on rank 0.
        ks: of pass@k, each at most `sampling.samples`.
    """
    batch = engine.generate(prompts.token_ids, range(len(prompts)), step, sampling)
    tokens = batch.response_tokens().split(batch.response_lengths.tolist())
    responses = []
    for start in range(0, len(tokens), DECODED):
        watchdog.heartbeat()
        part = tokens[start : start + DECODED]
        responses += tokenizer.batch_decode(part, skip_special_tokens=True)
    n = sampling.samples
    golds = [gold for gold in prompts.answers for _ in range(n)]
    # By one rank, so that all agree on what depends on the time it took.
    correct = on_rank_0(lambda: grade(responses, golds))
    per_prompt = [sum(correct[i : i + n]) for i in range(0, len(correct), n)]
    examples = [
        Example(
            prompts.texts[i],
            responses[i * n],
            extract_answer(responses[i * n]) or "",
            reference_answer(prompts.answers[i]),
            correct[i * n],
        )
        for i in range(min(num_examples, len(prompts)))
    ]
    return Evaluation(
        accuracy=sum(correct) / len(correct),
        interval=wilson(per_prompt, n),
        pass_at={k: mean(pass_at(k, n, c) for c in per_prompt) for k in ks},
        correct=sum(correct),
        total=len(correct),
        truncated=int(batch.truncated.sum()),
        mean_length=batch.response_lengths.double().mean().item(),
        examples=examples,
        per_prompt=per_prompt,
        samples=n,
        by_teacher=_by_teacher(prompts, per_prompt, n),
    )


def _by_teacher(prompts: Prompts, per_prompt: Sequence[int], samples: int) -> dict[int, float]:
    """Return the accuracy on the problems of each teacher, of those that have one."""
    right: dict[int, list[int]] = {}
    for teacher, count in zip(prompts.teachers or (), per_prompt, strict=False):
        right.setdefault(teacher, []).append(count)
    return {t: mean(counts) / samples for t, counts in sorted(right.items()) if t >= 0}
