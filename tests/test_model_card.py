"""The model card that a run writes next to its student, as the hub reads it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from support.observed import STUDENT, observe

from megatron_taopd.config.load import load
from megatron_taopd.formats import convert
from megatron_taopd.monitoring.model_card import hub_name, model_card

TINY = Path(__file__).parent.parent / "examples" / "tiny_pair.yaml"
BASE_CARD = """---
license: other
license_name: qwen-research
license_link: LICENSE
language: [en, zh]
base_model: somebody/Else
---
# The model that it was
"""
# None of these is a default, nor what the tiny pair's configuration has.
GIVEN = (
    "run.name=carded",
    "run.seed=11",
    "selection={selector: divergence, ratio: 0.3, k: 5}",
    "loss.kind=forward_kl",
    "rollout={prompts: 6, samples: 2, max_new_tokens: 9, temperature: 0.8}",
    "optimizer={lr: 3.0e-4, decay: linear, min_lr: 1.0e-5, warmup_steps: 1}",
    "eval={prompts: examples/tiny_pair/test.jsonl, limit: 12, every: 1, samples: 2}",
    "eval.temperature=0.6",
    "eval.pass_at=[2]",
    "eval.grader=exact",
    "data.limit=50",
    "checkpoint={every: 1, export_hf: true, keep_last: 9}",
)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The tiny student with a card, a licence, and code of its own as `auto_map` names it."""
    directory = tmp_path_factory.mktemp("models") / "models--me--Tiny" / "snapshots" / "abc"
    shutil.copytree(STUDENT, directory)
    (directory / "README.md").write_text(BASE_CARD)
    (directory / "LICENSE").write_text("Ask first.\n")
    (directory / "tokenization_tiny.py").write_text("from .helpers_tiny import spell\n")
    (directory / "helpers_tiny.py").write_text("def spell(text):\n    return text\n")
    path = directory / "tokenizer_config.json"
    code = {"AutoTokenizer": [None, "tokenization_tiny.TinyTokenizer"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": code}))
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory, student):
    """A run of two steps, and the same one after a third: (its directory, records, cards)."""
    out, cards = tmp_path_factory.mktemp("runs") / "run", {}
    for steps in (2, 3):
        seen = observe(
            [*GIVEN, f"student.path={student}", f"run.dir={out}", f"train.steps={steps}"]
        )
        assert seen.status == 0, seen.printed
        cards[steps] = ModelCard.load(out / "student" / "README.md")
    return out, {record["step"]: record for record in seen.records}, cards


def figures(card: ModelCard) -> dict[str, float]:
    return {result.metric_name: result.metric_value for result in card.data.eval_results}


def table(card: ModelCard) -> dict[str, list[str]]:
    """The cells of each row of all the card's tables, by the first."""
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {first: rest for first, *rest in cells}


@pytest.mark.parametrize("step", [2, 3])
def test_a_card_has_the_evaluation_of_its_step(run, step):
    _, records, cards = run
    record, card = records[step], cards[step]
    assert figures(card) == {
        "accuracy": record["eval/accuracy"],
        "pass@2": record["eval/pass_at_2"],
    }
    shown = table(card)
    assert shown["accuracy"] == [_percent(records[at]["eval/accuracy"]) for at in (0, step)]
    low = [_percent(records[at]["eval/accuracy_low"]) for at in (0, step)]
    assert shown["accuracy, lower end of 95 %"] == low
    length = [f"{records[at]['eval/response_length_mean']:.3g}" for at in (0, step)]
    assert shown["tokens per response"] == length
    assert f"after step {step} of {step}" in card.text
    assert "At temperature 0.6, 2 × the first 12 problems, grader `exact`" in card.text
    assert {result.dataset_name for result in card.data.eval_results} == {"test.jsonl"}


def _percent(value: float) -> str:
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def test_a_card_says_which_weights_of_its_own_the_student_learned_from():
    names = {"student": "its own weights before training", "student_ema": "a moving average of"}
    config = load(TINY, ["teacher.ema=0.9"])
    for source, name in names.items():
        teacher = replace(config.teacher, source=source)
        text = model_card(replace(config, teacher=teacher), [], 0, 1)
        assert f"distilled on policy from {name}" in text and f"| teacher | {name}" in text
        assert ("(0.9 stays" in text) == (source == "student_ema")


def test_a_card_says_what_the_student_learned_from(run):
    _, records, cards = run
    card, shown = cards[3], table(cards[3])
    kept = sum(records[step]["kept_rows"] for step in (1, 2, 3))
    valid = sum(records[step]["valid_rows"] for step in (1, 2, 3))
    assert card.data.base_model == "me/Tiny" and card.data.model_name == "carded"
    assert card.data.library_name == "transformers"
    assert {"student before", "teacher"} <= shown.keys()
    assert shown["student before"] == ["me/Tiny"] and shown["teacher"] == ["teacher"]
    assert shown["data"] == ["train.jsonl, 50 prompts"]
    assert shown["selector"] == ["divergence, k = 5"]
    assert shown["budget"] == [f"30 % of the positions: the loss fell on {kept:,} of {valid:,}"]
    assert shown["rollouts per step"] == ["6 prompts × 2, at most 9 tokens, temperature 0.8"]
    assert shown["loss"] == ["forward_kl"] and shown["seed"] == ["11"]
    assert shown["learning rate"] == ["0.0003, linear"]
    for package in ("megatron-core", "torch", "transformers"):
        assert shown[package] == [metadata.version(package)]
    assert "sglang" not in shown  # which took no part


def test_licence_and_languages_are_inherited_and_nothing_else_of_the_old_card(run):
    out, _, cards = run
    data = cards[3].data
    assert (data.license, data.license_name, data.license_link) == (
        "other",
        "qwen-research",
        "LICENSE",
    )
    assert data.language == ["en", "zh"]
    assert "The model that it was" not in cards[3].content and "somebody" not in cards[3].content
    assert (out / "student" / "LICENSE").read_text() == "Ask first.\n"


def test_a_card_names_no_path(run, student):
    out, _, cards = run
    for path in (out, student, TINY.parent):
        assert str(path) not in cards[3].content


def test_an_exported_checkpoint_has_the_card_of_its_step(run, tmp_path):
    out, records, _ = run
    convert.to_hf(out / "checkpoints" / "step_00000001", tmp_path / "student")
    card = ModelCard.load(tmp_path / "student" / "README.md")
    assert figures(card)["accuracy"] == records[1]["eval/accuracy"]
    assert "after step 1 of 2" in card.text
    assert f"of {records[1]['valid_rows']:,}" in table(card)["budget"][0]


@pytest.mark.parametrize("of", ["student", "checkpoint", "converted"])
def test_auto_maps_code_travels_with_the_weights(run, tmp_path, student, of):
    out, _, _ = run
    directory = out / "student"
    if of == "checkpoint":
        directory = out / "checkpoints" / "step_00000003" / "hf"
    if of == "converted":
        convert.to_megatron(student, tmp_path / "megatron")
        convert.to_hf(tmp_path / "megatron", tmp_path / "hf")
        directory = tmp_path / "hf"
    named = json.loads((directory / "tokenizer_config.json").read_text())["auto_map"]
    assert named == {"AutoTokenizer": [None, "tokenization_tiny.TinyTokenizer"]}
    for name in ("tokenization_tiny.py", "helpers_tiny.py"):
        assert (directory / name).read_text() == (student / name).read_text()


def test_a_step_without_evaluation_claims_no_figure():
    records = [{"step": 0, "eval/accuracy": 0.25}, {"step": 4, "loss": 1.0}]
    config = load(TINY, ["run.name=odd | name"])
    card = ModelCard(model_card(config, records, 4, 7))
    assert card.data.eval_results is None
    assert "Not evaluated after step 4." in card.text and "25 %" not in card.text
    config = load(TINY, ["eval.prompts=null"])
    assert "Not evaluated.\n" in ModelCard(model_card(config, records, 4, 7)).text


def test_data_sets_of_the_hub_are_named_and_files_are_not():
    prompts = "[{path: hf://datasets/me/Sums/train, weight: 3}, {path: b.jsonl, weight: 1}]"
    held_out = "[hf://datasets/me/Held, c.jsonl]"
    config = load(TINY, [f"data.prompts={prompts}", f"eval.prompts={held_out}"])
    card = ModelCard(model_card(config, [{"step": 1, "eval/accuracy": 0.5}], 1, 7))
    assert card.data.datasets == ["me/Sums"]
    assert table(card)["data"] == ["me/Sums, b.jsonl, 7 prompts"]
    assert [result.dataset_name for result in card.data.eval_results] == ["me/Held, c.jsonl"]


def test_the_command_of_a_card_suits_the_tokenizer(tmp_path):
    """One with a chat template is talked to, one without completes."""
    shutil.copytree(STUDENT, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    for directory, has in ((tmp_path / "chat", True), (Path(STUDENT), False)):
        config = load(TINY, [f"student.path={directory}", "rollout.max_new_tokens=21"])
        text = model_card(config, [{"step": 1}], 1, 7)
        assert ('"role": "user"' in text) == has and "max_new_tokens=21" in text


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/models/Qwen3-4B", "Qwen3-4B"),
        ("/cache/hub/models--Qwen--Qwen3-4B/snapshots/0123abcd", "Qwen/Qwen3-4B"),
        ("/cache/hub/datasets--me--Sums--2/snapshots/0123/data/a.parquet", "me/Sums--2"),
        ("Qwen/Qwen3-4B@0123abcd", "Qwen/Qwen3-4B"),
        ("hf://datasets/me/Sums@main/train", "me/Sums"),
        ("hf://datasets/me/Sums", "me/Sums"),
        ("/data/train.jsonl", "train.jsonl"),
    ],
)
def test_names_of_models_and_data(path, name):
    assert hub_name(path) == name
