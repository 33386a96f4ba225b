import pytest
import torch

from megatron_taopd.evaluation import (
    evaluate,
    extract_answer,
    is_correct,
    normalize_answer,
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


class Digits:
    """A tokenizer whose ids are digits; 10 is the stop token, which decoding leaves out."""

    def batch_decode(self, sequences, skip_special_tokens):
        assert skip_special_tokens
        return ["# " + "".join(str(int(t)) for t in ids if t < 10) for ids in sequences]


class Echo:
    """An engine that answers each prompt with the prompt, stopping unless it begins with a 9."""

    def generate(self, prompts, prompt_indices, step, sampling):
        assert sampling.greedy and sampling.samples == 1
        assert (sampling.max_new_tokens, sampling.stop_token_ids, step) == (5, (10,), 40)
        responses = [torch.tensor([*p, 10] if p[0] != 9 else p) for p in prompts]
        log_probs = [torch.zeros(len(r)) for r in responses]
        truncated = [p[0] == 9 for p in prompts]
        versions = [torch.zeros(len(r)) for r in responses]
        return make_rollout_batch(
            prompts, prompt_indices, responses, log_probs, truncated, versions
        )


def test_evaluation_is_greedy_and_counts():
    prompts = Prompts(
        token_ids=[[1, 2], [3], [9, 9, 9], [4]],
        texts=["twelve", "three", "many", "four"],
        answers=["12", "so #### 3", "998", "5"],
        dropped=0,
    )
    sampling = Sampling(max_new_tokens=5, samples=4, temperature=1.0, stop_token_ids=(10,))
    result = evaluate(Echo(), prompts, Digits(), sampling, step=40, num_examples=2)
    assert (result.correct, result.total, result.accuracy) == (2, 4, 0.5)
    assert result.truncated == 1
    assert result.mean_length == (3 + 2 + 3 + 2) / 4
    assert [e.prompt for e in result.examples] == ["twelve", "three"]
    assert result.examples[1].gold == "3" and result.examples[1].correct
