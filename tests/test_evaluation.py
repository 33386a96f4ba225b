from fractions import Fraction
from importlib.util import find_spec
from itertools import combinations

import pytest
import torch

from megatron_taopd.data.prompts import Prompts
from megatron_taopd.evaluation.in_loop import (
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


# What people and models write, the reference, and whether it is that: spelling does not count, and
# neither does what is said around an answer; another answer is never taken.
VERDICTS = [
    # GSM8K's mark
    ("6 + 12 = 18\n#### 18", "#### 18", True),
    ("####18", "18", True),
    ("#### $18.00", "18", True),
    ("#### **18**", "18", True),
    (r"#### \(18\)", "18", True),
    ("#### 18 dollars", "18", True),
    ("#### 18\n\nI hope this helps with your 3 questions!", "18", True),
    ("#### 18\n\nQuestion: Tom has 5 apples and eats 2.", "18", True),
    ("#### 1,234", "1234", True),
    ("#### 12 or 13", "13", False),
    ("#### 12 or 13", "12", False),
    ("#### 3/4", "3/4", True),
    ("#### -5", "5", False),
    ("#### blue", "blue", True),
    ("51 + 63 = 114 ; # 68", "68", True),
    ("51 + 63 = 114 ; # 68 Sam has 9", "68", True),
    # Headings and lists are no answers
    ("### 2. Result\nWe add both.\nThe total is 42.", "42", True),
    ("### 2. Result\nWe add both.\nThe total is 42.", "2", False),
    ("#### 2. Result\nThe total is 42.", "42", True),
    ("#### 2. Result\nThe total is 42.", "2", False),
    ("#### Step 3: add\nThe total is 42.", "42", True),
    ("## 1\nAdd.\n## 2\nThe total is 42.", "42", True),
    ("# 1\nAdd.\n# 2\nThe total is 42.", "42", True),
    ("He lives in house #5 and pays 42.", "42", True),
    ("He takes bus #5.\nThat makes 42 stops.", "42", True),
    ("1. She buys 3.\n2. She sells 2.\n3. So 42 remain.", "42", True),
    ("So 42 remain.\n\n3. Done", "42", True),
    ("So 42 remain.\n\n### Step 3: check\nIt fits.", "42", True),
    ("### Final Answer\n\n42", "42", True),
    ("**Final Answer**\n\n**42**\n\nI used 3 steps.", "42", True),
    ("## Answer\nThe total is 42.", "42", True),
    # Boxes
    (r"so \boxed{42}.", "42", True),
    (r"\boxed{\frac{1}{2}}", r"\frac12", True),
    (r"\boxed{\text{(B)}}", "B", True),
    (r"\boxed{2} no, \boxed{3}", "3", True),
    (r"\boxed{2} no, \boxed{3}", "2", False),
    (r"\boxed{x = 12}", "12", True),
    (r"\boxed{12 \text{ apples}}", "12", True),
    (r"\boxed{10\,\text{cm}^2}", "10", True),
    (r"\boxed{90^\circ}", "90", True),
    (r"\boxed{\$1{,}234}", "1234", True),
    (r"\boxed{1\,234}", "1234", True),
    (r"\boxed{12 \text{ or } 13}", "13", False),
    (r"\boxed{2\pi}", "2", False),
    (r"\boxed{\sqrt{2}}", "2", False),
    (r"\boxed{2x}", "2", False),
    (r"\boxed{x^2}", "2", False),
    (r"\boxed{5!}", "5", False),
    (r"\boxed{1\frac{1}{2}}", r"\frac{11}{2}", False),
    (r"\boxed{\frac{x+1}{2}}", r"x+\frac{1}{2}", False),
    (r"\boxed{(0,1)}", "1", False),
    (r"\boxed{}\nThe answer is 7.", "7", True),
    # Stated
    ("Answer: 42", "42", True),
    ("Answer: **12**", "12", True),
    ("**Answer**: 12", "12", True),
    ("**Answer:** 12 m", "12", True),
    ("**Final Answer:** $12$", "12", True),
    ("Final answer = 12", "12", True),
    ("The answer is $12.50.", "12.5", True),
    ("The answer is $12.50.", "12", False),
    ("The answer is: 12", "12", True),
    ("The final answer is 12. I took 3 steps.", "12", True),
    ("The answer to the question is 12 apples.", "12", True),
    ("The correct answer (in dollars) is 12.", "12", True),
    ("The answer is 12, because 3 times 4 is 12 and 5 is not used.", "12", True),
    ("Answer: The total is 42.", "42", True),
    ("Answer: 3 + 4 = 7", "7", True),
    ("The answer is the sum of both, so 3 + 4 = 7.", "7", True),
    ("The answer is 5 at first sight, but there are 2 more, so 7.", "7", True),
    ("Answer: 12 or 13", "13", False),
    ("The answer is 12 or 13.", "13", False),
    ("The answer is either 12 or 13.", "12", False),
    ("It is 12 or 13.", "13", False),
    ("Answer: x = 12 or x = 13", "13", False),
    ("Answer: 12, 13", "13", False),
    ("Answer: not 12", "12", False),
    ("Answer: more than 12", "12", False),
    ("Answer: 12 million", "12", False),
    ("Answer: minus 12", "12", False),
    ("Answer: 12 and a half", "12", False),
    ("Answer: x > 12", "12", False),
    ("Answer: x != 12", "12", False),
    # Mathematics around a number
    (r"\(12\)", "12", True),
    (r"\[12\]", "12", True),
    (r"so we get \(x = 12\).", "12", True),
    ("$x=12$", "12", True),
    ("Answer: $x=12$", "12", True),
    (r"Answer: \(12\)", "12", True),
    (r"The answer is $$\n12\n$$", "12", True),
    (r"Answer: 3.2 \times 10^5", "320000", True),
    ("Answer: 3.2 × 10^{5}", "320000", True),
    ("Answer: 1e-3", "0.001", True),
    ("The field has 25 m^2.", "25", True),
    ("The field has 25 m^2.", "2", False),
    ("x^2 = 49", "49", True),
    # Numbers
    ("Answer: 1,234,567", "1234567", True),
    ("Answer: 12, 130", "12130", False),
    ("Answer: 1 234", "1234", True),
    ("Answer: 12 13", "1213", False),
    ("Answer: 1 1/2", "11/2", False),
    ("Answer: 1 1/2", "1 1/2", True),
    ("It takes 1 1/2 cups.", "1/2", False),
    ("Answer: 0012.500", "12.5", True),
    ("Answer: 1.2", "12", False),
    ("Answer: 120", "12", False),
    ("Answer: 12", "120", False),
    ("Answer: -12", "12", False),
    ("Answer: 10000000000000000000000000000001", "10000000000000000000000000000002", False),
    # Units and currencies, on one side
    ("12 apples", "12", True),
    ("Answer: 12 apples", "12", True),
    ("Answer: 12", "12 apples", True),
    ("Answer: 12 oranges", "12 apples", False),
    ("Answer: 12 apples", "12 apples", True),
    ("Answer: 12kg", "12", True),
    ("Answer: 12 km/h", "12", True),
    ("Answer: 12%", "12", True),
    ("Answer: 12 percent", "12", True),
    ("Answer: €12", "12", True),
    ("Answer: US$12", "12", True),
    ("Answer: 12 USD", "12", True),
    ("Answer: 30°", "30", True),
    # Letters, words, dates
    ("The answer is (A).", "A", True),
    ("Answer: B) 12 apples", "B", True),
    ("The correct answer is **C**.", "C", True),
    ("The answer is option D.", "D", True),
    ("The answer is (A).", "B", False),
    ("Answer: A total of 12", "A", False),
    ("Answer: Evelyn", r"\text{Evelyn}", True),
    ("She runs 3 laps more, so the answer is Evelyn.", "Evelyn", True),
    ("Answer: March 5, 2024", "March 5, 2024", True),
    ("Answer: March 5, 2024", "2024", False),
    ("Answer: 12:30", "12", False),
    ("Answer: 12:30", "12:30", True),
    ("Answer: blue", "5", False),
    ("Answer: In total 42 apples.", "42", True),
    (r"\boxed{0}", "5x - 7y + 11z + 4 = 0", False),
    ("Answer: 5x - 7y = 0", "0", False),
    ("Answer: f(2) = 3", "3", True),
    (r"Answer: x_{1} = 3", "3", True),
    ("Answer: She pays 3 × 4 = 12 dollars", "12", True),
    # Reasoning is not what is stated
    (r"<think>so \boxed{5}? No.</think>\n\nThe total is 42.", "42", True),
    (r"<think>so \boxed{5}? No.</think>\n\nThe total is 42.", "5", False),
    (r"<think>so \boxed{5}</think>", "5", True),
    # And more of everything
    ("Therefore, the total cost is $\\boxed{\\$18}$.", "18", True),
    ("So the answer is $\\frac{3}{4}$.", r"\frac{3}{4}", True),
    ("So the answer is $\\frac{3}{4}$.", r"3", False),
    ("So the answer is $\\frac{3}{4}$.", r"4", False),
    ("The answer is 3/4.", "3/4", True),
    ("the answer is\n\n$$\\frac{3}{4}$$", r"\frac34", True),
    ("**Answer: 42**", "42", True),
    ("Answer:\n42", "42", True),
    ("Answer:\n\n**42 apples**", "42", True),
    ("**Final Answer: 42 apples**", "42", True),
    ("*Answer:* 42", "42", True),
    ("__Answer__: 42", "42", True),
    ("ANSWER: 42", "42", True),
    ("Answers: 42", "42", True),
    ("My answer is 42", "42", True),
    ("The answer would be 42.", "42", True),
    ("the answer must be 42.", "42", True),
    ("Thus the final result is 42.", "42", True),
    ("A: 42", "42", True),
    ("42", "42", True),
    ("42.", "42", True),
    ("-42", "-42", True),
    ("−42", "-42", True),
    ("The temperature is -5 degrees.", "-5", True),
    ("The temperature is -5 degrees.", "5", False),
    ("She has $1,234.50 left.", "1234.5", True),
    ("It costs 12 dollars and 50 cents.", "12.5", False),
    ("He needs 3 more apples, so the answer is 3.", "3", True),
    ("The answer is 3 hours.", "3", True),
    ("The answer is 3 hours and 20 minutes.", "3", False),
    ("The answer is 3 hours and 20 minutes.", "20", False),
    ("The answer is 50%.", "50", True),
    ("The answer is 50%.", "0.5", False),
    ("The answer is 0.5", "1/2", False),
    ("Answer: 2^{10}", "2", False),
    ("Answer: 2^{10}", "10", False),
    ("Answer: 10^5", "10", False),
    ("Answer: 5:30 pm", "5", False),
    ("Answer: 5:30 pm", "30", False),
    ("Answer: $(3, 4)$", "(3,4)", True),
    ("Answer: (3, 4)", "4", False),
    ("Answer: [1, 2]", "2", False),
    ("Answer: {1, 2}", "2", False),
    (r"Answer: \{1, 2\}", "\\{1,2\\}", True),
    ("Answer: 2x + 3", "3", False),
    ("Answer: x + 3", "3", False),
    ("Answer: x+3", "3", False),
    ("Answer: n = 3k", "3", False),
    ("Answer: sqrt(2)", "2", False),
    ("Answer: √2", "2", False),
    ("Answer: |5|", "5", False),
    ("Answer: ~5", "5", False),
    ("Answer: 5 ± 2", "5", False),
    ("Answer: 5-7", "7", False),
    ("Answer: 5–7", "5", False),
    ("Answer: from 5 to 7", "7", False),
    ("Answer: 5 to 7", "5", False),
    ("between 5 and 7", "7", False),
    ("x = 5 and y = 7", "7", False),
    ("Answer: x=5, y=7", "5", False),
    ("Answer: x=5, y=7", "x=5,y=7", True),
    ("Answer: a = b = 12", "12", True),
    ("Answer: 3 * 4 = 12", "12", True),
    ("Answer: 3*4=12 apples", "12", True),
    ("3 * 4 = 12 apples", "12", True),
    ("Answer: y = 12", "x = 12", False),
    ("Answer: 12", "x = 12", True),
    ("Answer: x = 12", "x=12", True),
    (r"Answer: x = \frac{1}{2}", r"\frac{1}{2}", True),
    ("Answer: True", "True", True),
    ("Answer: yes", "Yes", False),
    ("The answer is (C) 12", "C", True),
    ("The answer is C) 12", "C", True),
    ("The answer is C: 12", "C", True),
    ("Answer: C. 12 apples", "C", True),
    ("Answer: (C)", "(C)", True),
    ("Answer: C", "(C)", True),
    ("Answer: \\boxed{C}", "C", True),
    ("The answer is \\boxed{\\textbf{(C)}\\ 12}", "C", True),
    ("Answer: C, D", "C", False),
    ("Answer: C or D", "C", False),
    ("Answer: A and B", "A", False),
    ("#### 42\n#### 43", "43", True),
    ("#### 42\n#### 43", "42", False),
    ("#### 42 (rounded)", "42", True),
    ("#### 42.", "42", True),
    ("#### = 42", "42", True),
    ("#### Answer: 42", "42", True),
    ("### Answer: 42", "42", True),
    ("### 42", "42", True),
    ("## 42", "42", True),
    ("#42", "42", True),
    ("# 42", "42", True),
    ("Item #42 costs 5.", "42", False),
    ("Item # 42 costs 5.", "5", True),
    ("Step 1: 3+4=7\nStep 2: 7*6=42", "42", True),
    ("1) 3+4=7\n2) 7*6=42", "42", True),
    ("1. 42", "42", True),
    ("- 42", "42", True),
    ("* 42", "42", True),
    ("> 42", "42", True),
    ("| total | 42 |", "42", True),
    ("Answer: 42\n\nLet me double check: 6*7 = 42. There are 2 ways.", "42", True),
    ("The answer is 42.\nNote: see section 3.", "42", True),
    ("So the answer is 42 since 6 * 7 = 42.", "42", True),
    ("I think the answer is around 42.", "42", True),
    ("The answer is not 42.", "42", False),
    ("The answer is not 12 but 13.", "12", False),
    ("The answer is greater than 42.", "42", False),
    ("Answer: 4.2e1", "42", True),
    ("Answer: 4.2 x 10^1", "42", True),
    ("Answer: 1.5 million", "1.5", False),
    ("Answer: 1.5 million", "1500000", False),
    ("Answer: 1000", "1,000", True),
    ("Answer: 1.000", "1000", False),
    ("Answer: 1,000.00", "1000", True),
    ("Answer: 12 000", "12000", True),
    ("Answer: 12.", "12", True),
    ("Answer: .5", "0.5", True),
    ("Answer: 0.333...", "0.333", False),
    ("Answer: 12...", "12", True),
    ("Answer: twelve", "12", False),
    ("Answer: 12 (twelve)", "12", True),
    ("Answer: 7 (seven) days", "7", True),
    ("Answer: May 5", "5", False),
    ("Answer: 5 May 2024", "2024", False),
    ("Answer: 2024-05-12", "12", False),
    ("Answer: 05/12/2024", "5", False),
    ("Answer: 1/2/3", "3", False),
    ("Answer: 100 miles per hour", "100", True),
    ("Answer: 9.8 m/s^2", "9.8", True),
    (r"Answer: 9.8 \text{ m/s}^2", "9.8", True),
    (r"Answer: $9.8\ \mathrm{m/s^2}$", "9.8", True),
    ("Answer: 12 square meters", "12", True),
    ("Answer: 12m", "12", False),
    ("Answer: 2ab", "2", False),
    ("Answer: 2 ab", "2", False),
    ("Answer: 12 cm", "12", True),
    ("Answer: 12cm", "12 cm", True),
    ("Answer: $12", "12", True),
    ("Answer: 12$", "12", True),
    ("Answer: Rs. 12", "12", True),
    ("Answer: ₹12", "12", True),
    ("Answer: 12 €", "12", True),
    ("Answer: EUR 12", "12", True),
    ("\\boxed{12\\%}", "12", True),
    ("\\boxed{12 dollars}", "12", True),
    ("\\fbox{12}", "12", True),
    ("\\boxed{\\boxed{12}}", "12", True),
    ("\\boxed{ {12} }", "12", True),
    ("\\boxed{12, 13}", "13", False),
    ("\\boxed{12}, \\boxed{13}", "12,13", False),
    ("$\\boxed{12}$ or $\\boxed{13}$", "13", True),
    (r"\boxed{-\frac{1}{2}}", "-1/2", True),
    (r"\boxed{\frac{-1}{2}}", "-1/2", True),
    (r"\boxed{\sqrt{3}}", r"\sqrt3", False),
    (r"\boxed{3\sqrt{2}}", r"3\sqrt{2}", True),
    (r"\boxed{x=3}", "3", True),
    (r"\boxed{x \leq 3}", "3", False),
    (r"\boxed{x \neq 3}", "3", False),
    (r"\boxed{3 \text{ or } 4}", "4", False),
    (r"\boxed{\text{3 apples}}", "3", True),
    (r"\boxed{11_2}", "11", False),
    (r"\boxed{11_{2}}", "11_2", False),
    (r"\boxed{11}", "11_2", False),
]


@pytest.mark.parametrize(("response", "gold", "correct"), VERDICTS)
def test_what_is_stated_is_judged_and_nothing_else(response, gold, correct):
    assert is_correct(response, gold) is correct


@pytest.mark.slow
def test_degenerate_responses_take_no_time():
    """A model that repeats itself to its limit; anything quadratic in it would never end here."""
    for unit in (
        "\\boxed{",
        "answer",
        "answer is ",
        "answer: ",
        "#",
        "# ",
        "#### ",
        " ",
        "\n",
        "1",
        "1,",
        "1 ",
        "1/",
        "-",
        "=",
        "$",
        "*",
        "{",
        "\\frac{",
        "1e",
        "x=",
        "(",
        "\\text{",
    ):
        text = unit * (400_000 // len(unit))
        assert is_correct(text, "12") is False
        assert is_correct("Answer: " + text, "12") is False
        normalize_answer(text)


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
@pytest.mark.slow
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
