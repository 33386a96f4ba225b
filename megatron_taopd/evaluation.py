"""Accuracy on problems with checkable answers, through whatever engine does the rollouts."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal

from megatron_taopd.prompts import Prompts
from megatron_taopd.rollout.engine import RolloutEngine, Sampling

# A minus sign belongs to the number unless it stands between operands ("7-3"). One group of three
# after a comma makes it a thousands separator ("1,234", but "(1,2)" is two numbers).
NUMBER = r"(?:(?<![\w)])[-−+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?"


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
        accuracy: correct / total.
        truncated: responses that hit the length limit (counted in total; right where they already
            state the answer).
        mean_length: tokens per response, the stop token included.
        examples: the first few problems.
    """

    accuracy: float
    correct: int
    total: int
    truncated: int
    mean_length: float
    examples: list[Example]


def extract_answer(text: str) -> str | None:
    r"""The answer a response states: the first of these that it has, and the last one of its kind.

    \boxed{…} with balanced braces; a number after `#` or `####`; what follows "Answer:" on its
    line; any number. None if there is none.
    """
    if boxed := _last_boxed(text):
        return boxed
    if marked := re.findall(rf"#\s*\$?({NUMBER})", text):
        return marked[-1]
    if stated := re.findall(r"answer\s*:[\s*]*([^\n]*[^\s*])", text, re.IGNORECASE):
        return stated[-1]
    numbers = re.findall(NUMBER, text)
    return numbers[-1] if numbers else None


def _last_boxed(text: str) -> str | None:
    """Contents of the last \\boxed{…} whose braces close."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
    return None


def normalize_answer(answer: str) -> str:
    r"""One spelling for answers that mean the same: "$1,234.00" and "1234"; "\dfrac{1}{2}" and
    "1/2"; "068" and "68". Spaces, dollar and percent signs, final full stops, \text{…} go."""
    answer = re.sub(r"\\(?:left|right|[!,;: ])|\\?[$%]|\s", "", answer).replace("−", "-")
    answer = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", answer).rstrip(".")
    if re.fullmatch(NUMBER, answer) and "/" not in answer:
        value = Decimal(answer.replace(",", ""))
        return f"{value.normalize():f}" if value else "0"
    return answer


def reference_answer(gold: str) -> str:
    """The answer inside a reference solution (GSM8K's "… #### 18"); a bare answer is kept whole."""
    return extract_answer(gold) if "#### " in gold or "\\boxed" in gold else gold


def is_correct(response: str, gold: str) -> bool:
    """Whether the answer that a response states is the reference answer."""
    answer = extract_answer(response)
    return answer is not None and normalize_answer(answer) == normalize_answer(
        reference_answer(gold)
    )


def evaluate(
    engine: RolloutEngine,
    prompts: Prompts,
    tokenizer,
    sampling: Sampling,
    step: int,
    num_examples: int = 4,
) -> Evaluation:
    """Greedy accuracy of the engine's current weights; the same on every rank.

    Collective: as the engine's `generate`, once.

    Args:
        prompts: with an answer for each.
        sampling: of which the length limit and the stop tokens are used.
    """
    greedy = replace(sampling, temperature=0.0, samples=1)
    batch = engine.generate(prompts.token_ids, range(len(prompts)), step, greedy)
    tokens = batch.response_tokens().split(batch.response_lengths.tolist())
    responses = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    correct = [is_correct(r, gold) for r, gold in zip(responses, prompts.answers, strict=True)]
    examples = [
        Example(
            prompts.texts[i],
            responses[i],
            extract_answer(responses[i]) or "",
            reference_answer(prompts.answers[i]),
            correct[i],
        )
        for i in range(min(num_examples, len(prompts)))
    ]
    return Evaluation(
        accuracy=sum(correct) / len(correct),
        correct=sum(correct),
        total=len(correct),
        truncated=int(batch.truncated.sum()),
        mean_length=batch.response_lengths.double().mean().item(),
        examples=examples,
    )
