from fractions import Fraction
from importlib.util import find_spec
from itertools import combinations

import pytest
import torch

from megatron_taopd.evaluation import (
    evaluate,
    extract_answer,
    grade_as_mathematics,
    grade_exactly,
    grader,
    is_correct,
    normalize_answer,
    pass_at,
    reference_answer,
)
from megatron_taopd.prompts import Prompts
from megatron_taopd.rollout.engine import Sampling, make_rollout_batch


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{4}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{7} and then \boxed{ it never closes", "7"),
        (r"# 3 but \boxed{4}", "4"),
        ("51 + 63 = 114 ; # 68", "68"),
        ("work 12\n#### 1,234", "1,234"),
        ("#### $-5.50", "-5.50"),
        ("# 1 # 2", "2"),
        ("# Step 1\nthe answer is 5", "5"),
        ("Answer: 3\nAnswer: $12$", "$12$"),
        ("**Answer:** 12 m", "12 m"),
        ("Answer: \\boxed{34}", "34"),
        ("answer: blue.", "blue."),
        ("7-3 = 4", "4"),
        ("it fell to -5", "-5"),
        ("about 1,000,000.5 units", "1,000,000.5"),
        ("the point (1,2)", "2"),
        ("three quarters, 3/4", "3/4"),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_stated_answer_is_found(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "spellings",
    [
        ("1234", "1,234", "$1,234.00", " 1 234 ", r"\$1234.", "+1234", "01234"),
        ("0.5", ".5", "0.50", "50e-2".replace("50e-2", ".500")),
        ("-7", "−7", "-7.0"),
        ("0", "-0", "0.0"),
        ("1/2", r"\frac{1}{2}", r"\dfrac{1}{2}"),
        (r"(3,\frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
        ("Evelyn", r"\text{Evelyn}", "Evelyn."),
        ("25", r"25\%", "25%"),
    ],
)
def test_spellings_of_one_answer_agree(spellings):
    assert len({normalize_answer(spelling) for spelling in spellings}) == 1


def test_different_answers_stay_different():
    answers = ["12", "1.2", "-12", "1/2", "120", "(1,2)", "x", "X"]
    assert len({normalize_answer(answer) for answer in answers}) == len(answers)


def test_the_reference_is_read_out_of_a_solution_but_kept_whole_otherwise():
    assert reference_answer("She sold <<48/2=24>>24 clips.\n#### 72") == "72"
    assert reference_answer(r"hence \boxed{x+1}") == "x+1"
    assert reference_answer(r"(3, 4)") == "(3, 4)"


@pytest.mark.parametrize(
    "response, gold, correct",
    [
        ("the total is $72.00.", "24 then 48 #### 72", True),
        ("# 68", "68", True),
        ("# 68", "6", False),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})", True),
        ("no idea", "68", False),
        ("", "", False),
    ],
)
def test_a_response_is_judged_by_its_answer(response, gold, correct):
    assert is_correct(response, gold) is correct


needs_math_verify = pytest.mark.skipif(
    find_spec("math_verify") is None, reason="Math-Verify is not installed"
)


@needs_math_verify
def test_math_equivalence_goes_beyond_spelling_and_no_further():
    pairs = {
        (r"so \boxed{0.5}", r"\frac{1}{2}"): True,
        (r"\boxed{\frac{\sqrt{8}}{2}}", r"\sqrt{2}"): True,
        (r"\boxed{x^2 + 2x + 1}", r"(x+1)^2"): True,
        (r"\boxed{[0, 1)}", r"[0,1)"): True,
        (r"\boxed{\{2, 1\}}", r"\{1,2\}"): True,
        ("# 3/4", "0.75"): True,
        (r"\boxed{\text{Evelyn}}", "Evelyn"): True,  # as is_correct has it
        (r"\boxed{x^2 + 1}", r"(x+1)^2"): False,
        (r"\boxed{0.51}", r"\frac{1}{2}"): False,
        (r"\boxed{(0, 1)}", r"[0,1)"): False,
        (r"\boxed{\frac{}{}^_}", r"\frac{1}{2}"): False,
        ("# 12", "13"): False,
        ("no idea", r"\frac{1}{2}"): False,
    }
    responses, golds = zip(*pairs, strict=True)
    assert grade_as_mathematics(responses, golds) == list(pairs.values())
    assert sum(grade_exactly(responses, golds)) < sum(pairs.values())


@needs_math_verify
def test_an_answer_that_takes_for_ever_is_wrong_and_holds_up_no_other():
    responses = [r"\boxed{9^{9^{9^9}}}", r"\boxed{\sqrt{4}}", r"\boxed{9^{9^{9^9}}}"]
    assert grade_as_mathematics(responses, [r"\pi", r"2", r"\pi"]) == [False, True, False]


def test_graders_by_name():
    assert grader("exact") is grade_exactly
    assert grader("math") is grade_as_mathematics
    there = find_spec("math_verify") is not None
    assert grader("auto") is (grade_as_mathematics if there else grade_exactly)


@pytest.mark.parametrize(("samples", "correct"), [(1, 0), (1, 1), (4, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples, correct):
    right = [i < correct for i in range(samples)]
    for k in range(1, samples + 1):
        subsets = [any(subset) for subset in combinations(right, k)]
        assert pass_at(k, samples, correct) == pytest.approx(
            float(Fraction(sum(subsets), len(subsets)))
        )


class Digits:
    """A tokenizer whose ids are digits; 10 is the stop token, which decoding leaves out."""

    def batch_decode(self, sequences, skip_special_tokens):
        assert skip_special_tokens
        return ["# " + "".join(str(int(t)) for t in ids if t < 10) for ids in sequences]


class Echo:
    """An engine that answers each prompt with the prompt, stopping unless it begins with a 9; its
    second, fourth, … answer to a prompt has a 1 before it."""

    def generate(self, prompts, prompt_indices, step, sampling):
        assert (sampling.max_new_tokens, sampling.stop_token_ids, step) == (5, (10,), 40)
        n = sampling.samples
        prompts = [prompt for prompt in prompts for _ in range(n)]
        prompt_indices = [index for index in prompt_indices for _ in range(n)]
        answers = [[1, *p] if i % n % 2 else p for i, p in enumerate(prompts)]
        responses = [torch.tensor(a if a[0] == 9 else [*a, 10]) for a in answers]
        log_probs = [torch.zeros(len(r)) for r in responses]
        truncated = [a[0] == 9 for a in answers]
        versions = [torch.zeros(len(r)) for r in responses]
        return make_rollout_batch(
            prompts, prompt_indices, responses, log_probs, truncated, versions
        )


PROMPTS = Prompts(
    token_ids=[[1, 2], [3], [9, 9, 9], [4]],
    texts=["twelve", "three", "many", "four"],
    answers=["12", "so #### 3", "998", "5"],
    dropped=0,
)


def test_evaluation_counts():
    greedy = Sampling(max_new_tokens=5, temperature=0.0, stop_token_ids=(10,))
    result = evaluate(Echo(), PROMPTS, Digits(), greedy, step=40, num_examples=2)
    assert (result.correct, result.total, result.accuracy) == (2, 4, 0.5)
    assert result.truncated == 1 and not result.pass_at
    assert result.mean_length == (3 + 2 + 3 + 2) / 4
    assert [e.prompt for e in result.examples] == ["twelve", "three"]
    assert result.examples[1].gold == "3" and result.examples[1].correct


def test_several_samples_give_their_mean_and_pass_at_k():
    sampling = Sampling(max_new_tokens=5, samples=4, temperature=1.0, stop_token_ids=(10,))
    result = evaluate(Echo(), PROMPTS, Digits(), sampling, step=40, ks=(1, 2, 4))
    # Of two problems, two samples of four each are right.
    assert (result.correct, result.total, result.accuracy) == (4, 16, 0.25)
    assert result.pass_at == pytest.approx({1: 0.25, 2: 0.5 * 5 / 6, 4: 0.5})
    assert [e.response for e in result.examples] == ["# 12", "# 3", "# 999", "# 4"]
