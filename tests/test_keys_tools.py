"""Keys of what builds its own pieces of a run: the doctor, and commands that read one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.fake_sglang import serving
from support.observed import SMALL, STUDENT, TINY, observed
from support.ranks import run_ranks
from test_keys_rollout import chat_models

from megatron_taopd.cli.compare import students, teachers
from megatron_taopd.config import load
from megatron_taopd.data.vocab_map import Vocabulary
from megatron_taopd.rollout.engine import Sampling
from megatron_taopd.rollout.local import LocalEngine


def doctored(overrides):
    """What the doctor finds on the models, and what is seen of it."""
    return observed(overrides, work=compare)


def compare(overrides):
    from megatron_taopd.parallel import platform
    from megatron_taopd.preflight import agreement

    platform.initialize()
    return [f"{f.level}: {f.what}" for f in agreement.check_models(load(TINY, overrides))]


def doctor(directory, *overrides):
    [seen] = run_ranks(1, doctored, [*SMALL, f"run.dir={directory}", *overrides])
    return seen


def test_the_doctor_asks_with_the_runs_first_prompt_and_bounds(tmp_path):
    """The first that fits, whatever `data.limit`; the teacher comes and goes as it would, and the
    logits of its 77 rows do not fit the head memory at a time."""
    asks = ["Eve has 9 nuts . " * 20, "Tom has 5 nuts . " * 14]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": ask}) + "\n" for ask in asks))
    options = [f"data={{prompts: {prompts}, limit: 1, max_prompt_tokens: 80}}"]
    options += ["teacher.offload=true", "train.head_memory_mib=1"]
    seen = doctor(tmp_path / "run", *options)
    assert [finding.partition(":")[0] for finding in seen.status] == ["ok", "ok"], seen.status
    ids = Vocabulary.from_pretrained(STUDENT).tokenizer(asks[1])["input_ids"]
    assert [call.prompts for call in seen.generated] == [[ids]]
    assert [p.place == p.home for p in seen.passes].count(False) == 1
    assert 0 < seen.logits < 77


@pytest.mark.parametrize("evaluated", [32, 12])
def test_the_doctor_asks_servers_for_the_longest_sequence_of_the_run(tmp_path, evaluated):
    """Which may be one of the evaluations."""
    with serving(STUDENT, longest=64 + 12) as backend:
        options = ["rollout.engine=sglang", f"rollout.servers.urls=[{backend.url}]"]
        seen = doctor(tmp_path / "run", *options, f"eval.max_new_tokens={evaluated}")
    if evaluated > 12:
        assert f"takes sequences of 76 tokens, the run has some of {64 + evaluated}" in seen.status
    else:
        assert seen.status[0].startswith("ok: engine sglang and trainer"), seen.status


def test_answers_are_compared_that_the_run_would_give(tmp_path):
    """`taopd compare teachers` draws as the rollouts do, one response to a prompt."""
    sampling = {"max_new_tokens": 9, "temperature": 1.6, "top_p": 0.8, "top_k": 6}
    keys = ", ".join(f"{name}: {value}" for name, value in sampling.items())
    overrides = [f"rollout={{{keys}, samples: 3, batch_size: 2, stop_token_ids: [7]}}"]
    config = load(TINY, [*overrides, "run={dir: unused, seed: 7}", "data.limit=5"])
    vocabularies = [Vocabulary.from_pretrained(m.path) for m in (config.student, config.teacher)]
    batch, _ = teachers.contexts(config, 64, vocabularies, 1152)
    lines = (Path(STUDENT).parent / "train.jsonl").read_text().splitlines()[:5]
    prompts = [vocabularies[0].tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    engine = LocalEngine.from_hf(STUDENT, torch.float32, "cpu", seed=7, vocab_size=1152)
    expected = engine.generate(prompts, range(5), 0, Sampling(**sampling, stop_token_ids=(7,)))
    assert torch.equal(batch.tokens, expected.tokens)


ASKS = ["Tom has 5 nuts .", "Eve has 9 nuts ."]


@pytest.fixture
def models(tmp_path):
    """Options of the pair, whose templates write `ends`, and of a file of prompts."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": ask}) + "\n" for ask in ASKS))
    student, teacher = (each.partition("=")[2] for each in chat_models(tmp_path, teacher="then"))
    return student, teacher, ["--prompts", str(prompts), "--template-kwargs", "{ends: gets}"]


def last_words(path: str, prompts) -> list[str]:
    tokenizer = Vocabulary.from_pretrained(path).tokenizer
    return [tokenizer.convert_ids_to_tokens(ids[-1]) for ids in prompts]


def write_bank(arguments):
    from megatron_taopd.cli import diagnose
    from megatron_taopd.diagnostics.bank import Bank

    diagnose.run_bank(diagnose.parse(arguments))
    return Bank(arguments[arguments.index("--out") + 1]).first(2)


def test_variables_reach_the_template_of_a_bank_and_of_its_teacher(models, tmp_path):
    """The bank keeps them, for whoever reads its prompts later."""
    student, teacher, options = models
    given = ["bank", "--student", student, "--out", str(tmp_path / "bank"), *options]
    [contexts] = run_ranks(1, write_bank, [*given, "--max-new-tokens", "3"])
    assert last_words(student, contexts.prompts.values()) == ["gets"] * 2
    assert contexts.template_kwargs == {"ends": "gets"}
    read = contexts.prompts_for(Vocabulary.from_pretrained(teacher).tokenizer)
    assert last_words(teacher, read.values()) == ["gets"] * 2


def test_variables_reach_the_templates_of_compared_students_and_their_teacher(models):
    student, teacher, options = models
    given = ["--students", student, "--teacher", teacher, *options, "--max-new-tokens", "3"]
    vocabularies = [Vocabulary.from_pretrained(path) for path in (student, teacher)]
    batch, read = students.contexts(students.parse(given), vocabularies, 1152)
    ends = zip(range(2), batch.prompt_lengths.tolist(), strict=True)
    assert last_words(student, [batch.sequence(i)[:n].tolist() for i, n in ends]) == ["gets"] * 2
    assert last_words(teacher, read) == ["gets"] * 2
