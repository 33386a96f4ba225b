"""Keys of prompts, responses and evaluations, through a real run: the tokens themselves."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import chain
from math import comb
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from support import dense
from support.keys import (
    AUTO,
    CHAT,
    CONTEXT,
    GRADER,
    HORIZON,
    KWARGS,
    PROMPT,
    REPEATS,
    ROLLOUT,
    SEED,
    STREAM,
    given,
    section,
    value,
    written,
)
from support.observed import FROZEN, STUDENT, TEACHER, observe
from support.step import row_logits
from transformers import AutoTokenizer

from megatron_taopd.evaluation.in_loop import is_correct
from megatron_taopd.rollout.engine import Sampling
from megatron_taopd.rollout.local import LocalEngine

ASKS = [
    f"{name} has {n} nuts . wins {n % 7} . gets {n % 5} ."
    for n, name in enumerate(["Ann", "Bob", "Eve", "Ida", "Max", "Sam", "Tom", "Zoe"], 11)
]


def chat_models(directory: Path, student: str = "so", teacher: str = "so") -> list[str]:
    """Overrides for the tiny pair with chat templates, which put a word before each message."""
    overrides = []
    for name, path, word in (("student", STUDENT, student), ("teacher", TEACHER, teacher)):
        model = directory / name
        model.mkdir()
        for file in ("config.json", "generation_config.json", "model.safetensors"):
            (model / file).symlink_to(Path(path) / file)
        tokenizer = AutoTokenizer.from_pretrained(path)
        template = "{% for m in messages %}WORD {{ m['content'] }} {% endfor %}"
        template += "{{ ends if ends is defined else '?' }}"
        tokenizer.chat_template = template.replace("WORD", word)
        tokenizer.save_pretrained(model)
        overrides.append(f"{name}.path={model}")
    return overrides


def write(path: Path, asks, says) -> Path:
    records = [{"task": {"asks": a, "says": s}} for a, s in zip(asks, says, strict=True)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def engine(seed: int) -> LocalEngine:
    return LocalEngine.from_hf(STUDENT, torch.float32, "cpu", seed=seed, vocab_size=1152)


def made_by(engine: LocalEngine, call, sampling: Sampling) -> bool:
    """Whether this engine would have given the same answer."""
    batch = engine.generate(call.prompts, call.indices, call.step, sampling)
    return torch.equal(batch.tokens, call.batch.tokens)


SAMPLED = ("max_new_tokens", "samples", "temperature", "top_p", "top_k", "stop_token_ids")


def test_prompts_and_responses_are_those_asked_for(tmp_path):
    """Steps 1 to 3, and evaluations after the second and the last. Every batch is that of an engine
    made by hand, and would be another with any of its keys at its default."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    long = "Eve has 519 nuts . wins 2 . gets 3 . loses 6 . eats 2 . ?"
    says = [str(n % 7) for n in range(18, 10, -1)]  # the last number before a response ends at "="
    keys = given(
        ROLLOUT,
        {
            "data.prompts": write(tmp_path / "a.jsonl", [ASKS[0], long, *ASKS[1:]], range(9)),
            "eval.prompts": write(tmp_path / "b.jsonl", ASKS[::-1], says),
        },
    )
    options = [f"run.dir={tmp_path}/run", FROZEN, "eval.grader=exact", *chat_models(tmp_path)]
    seen = observe([*options, *written(keys)])
    data, rollout, evaluation = (section(keys, name) for name in ("data", "rollout", "eval"))
    assert seen.status == 0 and "1 prompts dropped" in seen.printed
    assert [record["step"] for record in seen.records] == [1, 2, 3]
    assert ["eval/accuracy" in record for record in seen.records] == [False, True, True]

    def ids(asks):
        return [tokenizer(f"{data['system']}\n\n{ask}")["input_ids"] for ask in asks]

    count, limit = rollout["prompts"], data["limit"]
    first, second, third = ([i % limit for i in range(s, s + count)] for s in (0, count, 2 * count))
    held_out = [*range(evaluation["limit"])]
    expected = [(1, first), (2, second), (2, held_out), (3, third), (3, held_out)]
    assert [(call.step, call.indices) for call in seen.generated] == expected
    for call in seen.generated:
        asks = ids(ASKS[::-1] if call.indices == held_out else ASKS)
        assert call.prompts == [asks[i] for i in call.indices]
    assert max(seen.together) == rollout["batch_size"]

    trains = Sampling(**{name: rollout[name] for name in SAMPLED})
    evaluates = replace(trains, **{n: evaluation[n] for n in SAMPLED if n in evaluation})
    ours, plain = engine(section(keys, "run")["seed"]), Sampling(max_new_tokens=12)
    for sampling, places in (trains, (0, 1, 3)), (evaluates, (2, 4)):
        calls = [seen.generated[place] for place in places]
        assert all(made_by(ours, call, sampling) for call in calls)
        for name in SAMPLED:
            other = replace(sampling, **{name: getattr(plain, name)})
            assert not all(made_by(ours, call, other) for call in calls), name

    n, [k] = evaluation["samples"], evaluation["pass_at"]
    for record, call in zip(seen.records[1:], (seen.generated[2], seen.generated[4]), strict=True):
        tokens = call.batch.response_tokens().split(call.batch.response_lengths.tolist())
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        right = [is_correct(text, says[i // n]) for i, text in enumerate(texts)]
        assert record["eval/accuracy"] == pytest.approx(mean(right)) and 0 < mean(right) < 1
        counts = [sum(right[i : i + n]) for i in range(0, len(right), n)]
        wanted = mean(1 - comb(n - c, k) / comb(n, k) for c in counts)
        assert record[f"eval/pass_at_{k}"] == pytest.approx(wanted)


def test_the_seed_orders_prompts_and_draws_another_mask_each_step(tmp_path):
    """Greedy steps over the same prompts, unlike in their random masks alone."""
    keys = given(SEED)
    options = ["train.steps=3", "rollout.prompts=4", FROZEN]
    same_prompts = ["data.shuffle=false", "data.limit=4", "rollout.top_k=1"]
    seen = observe([f"run.dir={tmp_path}/mask", *options, *same_prompts, *written(keys)])
    other = observe([f"run.dir={tmp_path}/other", *options, *same_prompts, *written(keys),
                     "run.seed=6"])  # fmt: skip
    rows = {record["valid_rows"] for record in [*seen.steps, *other.steps]}
    kept = [record["selection/relative_position"] for record in [*seen.steps, *other.steps]]
    assert len(rows) == 1 and len(set(kept)) == 6
    assert {record["kept_rows"] for record in seen.steps} == {-(-rows.pop() // 10)}

    shuffled = observe([f"run.dir={tmp_path}/order", *options, *written(keys)])
    indices = [i for call in shuffled.generated for i in call.indices]
    prompts = len((Path(STUDENT).parent / "train.jsonl").read_text().splitlines())
    order = np.random.default_rng([value(keys["run.seed"]), 0]).permutation(prompts)
    assert indices == order[: len(indices)].tolist()


# --------------------------------------------------------------------------------------- horizon


def test_a_horizon_of_tokens_is_for_training_alone(tmp_path):
    keys = given(
        HORIZON,
        {"rollout.horizon": "7"},
    )
    held_out = write(tmp_path / "held_out.jsonl", ASKS, range(len(ASKS)))
    options = [f"eval.prompts={held_out}", "data.prompt_column=prompt"]
    held_out.write_text("".join(json.dumps({"prompt": ask, "answer": 1}) + "\n" for ask in ASKS))
    seen = observe([f"run.dir={tmp_path}/run", *options, *written(keys)])
    before, training, after = (int(call.batch.response_lengths.max()) for call in seen.generated)
    assert (before, training, after) == (12, value(keys["rollout.horizon"]), 12)


def test_the_horizon_is_where_a_token_stops_to_pay(tmp_path):
    """argmax M(h) / (w·P + N(h)) from the floor on, of a first step in full; in float64."""
    longest = 24
    keys = given(
        AUTO,
        {"rollout.horizon": "auto"},
    )
    options = ["train.steps=2", f"rollout.max_new_tokens={longest}", FROZEN]
    seen = observe([f"run.dir={tmp_path}/run", *options, *written(keys)])
    batch = seen.generated[0].batch
    z_s, z_t, _ = row_logits(STUDENT, TEACHER, batch, 1152)
    d, c = dense.disagreement(z_s.detach(), z_t, 16), dense.compatibility(z_s.detach(), z_t, 16)
    worth = dense.robust_normalize(d) * dense.robust_normalize(c, degenerate=1.0)
    responses = worth.split(batch.response_lengths.tolist())

    def best(floor, weight):
        def pays(h):
            mass = mean(float(r[:h].sum()) for r in responses)
            tokens = mean(min(h, len(r)) for r in responses)
            return mass / (weight * batch.prompt_lengths.double().mean().item() + tokens)

        return max(range(min(floor, longest), longest + 1), key=pays)

    floor, weight = (value(keys[f"rollout.horizon_{n}"]) for n in ("floor", "prompt_weight"))
    wanted = best(floor, weight)
    assert [record["rollout/horizon"] for record in seen.steps] == [longest, wanted]
    assert wanted not in (best(32, weight), best(floor, 0.5), longest)


# ------------------------------------------------------------------------------------- templates


def test_chat_needs_a_template(tmp_path):
    """That is all it differs from `auto` in."""
    keys = given(CHAT)
    seen = observe([f"run.dir={tmp_path}/none", *written(keys)])
    assert seen.status == 2 and "error: data.template: chat, but" in seen.printed
    seen = observe([f"run.dir={tmp_path}/run", *chat_models(tmp_path), *written(keys)])
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    so, asks = (tokenizer.convert_tokens_to_ids(token) for token in ("so", "?"))
    assert all((ids[0], ids[-1]) == (so, asks) for ids in seen.generated[0].prompts)


def test_a_teacher_reads_the_students_prompt(tmp_path):
    """Though it has a chat template of its own."""
    keys = given(PROMPT)
    models = chat_models(tmp_path, teacher="then")
    seen = observe([f"run.dir={tmp_path}/run", *models, *written(keys)])
    assert seen.read == [seen.generated[0].batch.tokens.tolist()]


def test_a_context_is_read_by_the_teacher_alone(tmp_path):
    """Its sequences are its own prompts, each with the student's response; neither the engine nor
    the evaluation gets any of it. Of the last context there is as much as fits."""
    keys = given(CONTEXT)
    shows = [f"{n} = {n + 1} ." for n in range(21, 27)] + [None, "27 = 28 = 29 = 30 = 31 ."]
    pairs = [*zip(ASKS, shows, strict=True)]
    rows = [{"task": {"shows": show}, "prompt": ask, "answer": 1} for ask, show in pairs]
    options = ["data.shuffle=false", "eval.at_start=true"]
    for name in ("data", "eval"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options.append(f"{name}.prompts={file}")
    seen = observe([f"run.dir={tmp_path}/run", *options, *written(keys)])
    assert seen.status == 0, seen.printed
    assert "7 of 8 prompts have a 'task.shows' for the teacher; 1 of these are cut" in seen.printed

    tokenizer, own = AutoTokenizer.from_pretrained(STUDENT), section(keys, "teacher")
    assert len(seen.generated) == 3  # held-out prompts before and after
    ours = [tokenizer(ask)["input_ids"] for ask in ASKS]
    assert all(call.prompts == ours for call in seen.generated)

    def theirs(ask, show):
        text = ask if show is None else f"{ask} so {show}"
        return tokenizer(f"{own['system']}\n\n{text}")["input_ids"]

    beginnings = [theirs(ASKS[-1], shows[-1][:n]) for n in range(len(shows[-1]) + 1)]
    fitting = [ids for ids in beginnings if len(ids) <= own["max_prompt_tokens"]]
    assert 1 < len(fitting) < len(beginnings)
    prompts = [*(theirs(*pair) for pair in pairs[:-1]), fitting[-1]]
    batch = seen.generated[1].batch
    answers = batch.response_tokens().split(batch.response_lengths.tolist())
    expected = [prompt + answer.tolist() for prompt, answer in zip(prompts, answers, strict=True)]
    assert seen.read == [[*chain(*expected)]]


def test_variables_reach_the_template_of_each_model(tmp_path):
    """Also that of held-out prompts, which only the student reads. Without its own, the teacher's
    template gets those of the student's."""
    keys = given(KWARGS)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"prompt": ask, "answer": 1}) + "\n" for ask in ASKS))
    models = [*chat_models(tmp_path), f"eval.prompts={held_out}", "eval.at_start=true"]
    ids = AutoTokenizer.from_pretrained(STUDENT).convert_tokens_to_ids
    ours, theirs = (value(keys[f"{name}.template_kwargs"])["ends"] for name in ("data", "teacher"))
    seen = observe([f"run.dir={tmp_path}/run", *models, *written(keys)])
    prompts = [call.prompts for call in seen.generated]
    assert len(prompts) >= 2 and {each[-1] for each in chain(*prompts)} == {ids(ours)}
    (read,), batch = seen.read, seen.generated[-2].batch
    assert len(read) == len(batch.tokens) and read.count(ids(theirs)) > read.count(ids(ours))
    del keys["teacher.template_kwargs"]
    seen = observe([f"run.dir={tmp_path}/same", *models[:2], *written(keys)])
    assert seen.read == [seen.generated[0].batch.tokens.tolist()]


def test_rows_that_repeat_are_kept_if_that_is_asked_for(tmp_path):
    """Two of the rows are one prompt with the same answer, and one is it with another."""
    keys = given(REPEATS, {"data.cache_dir": tmp_path / "kept"})
    rows = zip([*ASKS[:2], *ASKS[:2]], (1, 2, 1, 3), strict=True)
    file = tmp_path / "repeats.jsonl"
    file.write_text("".join(json.dumps({"prompt": a, "answer": n}) + "\n" for a, n in rows))
    options = [f"data.prompts={file}", "data.shuffle=false", "rollout.prompts=8"]
    seen = observe([f"run.dir={tmp_path}/kept_run", *options, *written(keys)])
    assert seen.generated[0].indices == [0, 1, 2, 3] * 2
    assert "they repeat another" not in seen.printed
    (entry,) = (tmp_path / "kept").iterdir()

    seen = observe([f"run.dir={tmp_path}/run", *options])
    assert seen.generated[0].indices == [0, 1, 2, 0, 1, 2, 0, 1]
    assert "1 prompts dropped: they repeat another with its answer" in seen.printed
    assert [*entry.parent.iterdir()] == [entry]  # that run had another place for its own


# ------------------------------------------------------------------- evaluation, and the teacher


@pytest.mark.parametrize(("grader", "accuracy"), [("exact", 0.0), ("math", 1.0)])
def test_the_grader_that_was_asked_for(tmp_path, grader, accuracy):
    """Every reference is the student's own greedy answer, but written as a sum."""
    keys = given(GRADER, {"eval.grader": grader})
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    asks = [f"{ask} ?" for ask in ASKS]
    batch = engine(0).generate(
        tokenizer(asks)["input_ids"], range(len(asks)), 0, Sampling(32, temperature=0)
    )
    texts = tokenizer.batch_decode(
        batch.response_tokens().split(batch.response_lengths.tolist()), skip_special_tokens=True
    )
    numbers = [re.search(r"# (\d+)$", text.strip()) for text in texts]
    records = [
        {"prompt": ask, "answer": rf"\frac{{{2 * int(number[1])}}}{{2}} + 0"}
        for ask, number in zip(asks, numbers, strict=True)
        if number
    ]
    assert len(records) > 3
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = [f"eval.prompts={held_out}", "eval.max_new_tokens=32"]
    seen = observe([f"run.dir={tmp_path}/run", FROZEN, *options, *written(keys)])
    assert seen.records[0]["eval/accuracy"] == accuracy


def test_without_streaming_the_teacher_reads_once(tmp_path):
    keys = given(STREAM)
    together = observe([f"run.dir={tmp_path}/together", *written(keys)], in_two_parts)
    apart = observe([f"run.dir={tmp_path}/apart"], in_two_parts)
    tokens = together.generated[0].batch.tokens.tolist()
    assert together.read == [tokens]
    assert len(apart.read) == 2 and sorted(chain(*apart.read)) == sorted(tokens)


def in_two_parts(run):
    """Have the engine's batches finish in two parts."""
    submit = run.engine.submit

    class Parts:
        def __init__(self, pending):
            self.result = pending.result

        def parts(self):
            batch = self.result()
            for places in torch.arange(batch.num_sequences).split(batch.num_sequences // 2):
                yield places, part_of(batch, places)

    run.engine.submit = lambda *args: Parts(submit(*args))


def part_of(batch, places):
    """Some of its sequences, one after the other."""
    first, last = int(places[0]), int(places[-1]) + 1
    rows = slice(int(batch.cu_rows[first]), int(batch.cu_rows[last]))
    start, end = (int(batch.cu_seqlens[i]) for i in (first, last))
    return replace(
        batch,
        tokens=batch.tokens[start:end],
        cu_seqlens=batch.cu_seqlens[first : last + 1] - start,
        prompt_lengths=batch.prompt_lengths[places],
        log_probs=batch.log_probs[rows],
        truncated=batch.truncated[places],
        prompts=batch.prompts[places],
        weight_versions=batch.weight_versions[rows],
    )
