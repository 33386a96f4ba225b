"""Reference responses among a step's sequences: who answers which prompt, and what is learned."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from support import dense
from support.observed import FROZEN, STUDENT, TEACHER, observe
from support.step import row_logits
from transformers import AutoTokenizer

from megatron_taopd.config.schema import RolloutSection
from megatron_taopd.rollout.engine import Sampling, make_rollout_batch
from megatron_taopd.rollout.mix import Mix

NUMBER = 40
PROMPTS = SimpleNamespace(
    token_ids=[[100 + i] * (1 + i % 3) for i in range(NUMBER)],
    references=[[200 + i] * (i % 5) + [1] for i in range(NUMBER)],
    valid=None,
)


class Engine:
    """Answers prompt i with samples 300 + i, one token longer each."""

    def submit(self, prompts, indices, step, sampling):
        assert prompts == [PROMPTS.token_ids[i] for i in indices]
        both = [(i, s) for i in indices for s in range(sampling.samples)]
        responses = [torch.full((1 + s,), 300 + i) for i, s in both]
        batch = make_rollout_batch(
            [PROMPTS.token_ids[i] for i, _ in both],
            [i for i, _ in both],
            responses,
            [torch.zeros(len(response)) for response in responses],
            [True] * len(both),
            [torch.full_like(response, step - 1) for response in responses],
        )
        halves = torch.arange(batch.num_sequences).tensor_split(2)
        return SimpleNamespace(
            result=lambda: batch,
            parts=lambda: iter([(half, batch.only(half)) for half in halves[::-1]]),
        )


def mix(texts=PROMPTS, seed=0, **keys) -> Mix:
    return Mix(RolloutSection(**keys), texts, seed)


def took(batch) -> list[tuple[int, list[int], bool]]:
    """(prompt, response, is a reference) of each sequence."""
    responses = batch.response_tokens().split(batch.response_lengths.tolist())
    return [
        (int(prompt), response.tolist(), bool(reference))
        for prompt, response, reference in zip(
            batch.prompts, responses, batch.is_reference, strict=True
        )
    ]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("places", "share"), [(8, 0.25), (5, 0.1), (7, 0.3), (4, 1.0), (3, 0.07)])
def test_the_share_is_exact_over_the_steps(places, share, samples):
    """As the decimal that it is; every step has all its sequences, every prompt comes once."""
    ours = mix(prompts=places, samples=samples, mix={"dataset": share})
    exact = Fraction(str(share)) * places
    references = 0
    for step in range(1, 101):
        now = ours.references_of(step)
        references += now
        assert references == samples * int(step * exact)
        assert ours.prompts_of(step) == places - now // samples + now
    assert references == samples * 100 * exact  # each of these shares has two decimals


@pytest.mark.parametrize("samples", [1, 2])
def test_each_prompt_is_answered_once_by_the_data_or_by_the_engine(samples):
    keys = {"prompts": 8, "samples": samples, "mix": {"dataset": 0.25}}
    indices = list(range(mix(**keys).prompts_of(1)))
    sampling = Sampling(max_new_tokens=9, samples=samples)
    pending = mix(**keys).submit(Engine(), indices, 1, sampling)
    batch = pending.result()
    assert batch.num_sequences == 8 * samples and batch is pending.result()
    found = took(batch)
    by_data = [prompt for prompt, _, reference in found if reference]
    assert len(by_data) == 2 * samples
    expected = []
    for i in indices:  # in their order
        if i in by_data:
            expected.append((i, PROMPTS.references[i], True))
        else:
            expected += [(i, [300 + i] * (1 + s), False) for s in range(samples)]
    assert found == expected
    rows = batch.is_reference[batch.row_sequences()]
    assert batch.log_probs[rows].isnan().all() and not batch.log_probs[~rows].any()
    assert (batch.weight_versions == torch.where(rows, -1, 0)).all()
    assert torch.equal(batch.truncated, ~batch.is_reference) and batch.valid is None
    # The same in parts, the references first; and drawn by step and seed alone.
    parts = [*mix(**keys).submit(Engine(), indices, 1, sampling).parts()]
    assert parts[0][1].is_reference.all() and not parts[1][1].is_reference.any()
    assert sorted(torch.cat([places for places, _ in parts]).tolist()) == [*range(8 * samples)]
    for places, part in parts:
        assert took(part) == [found[place] for place in places]

    def drawn(seed, step):
        made = mix(seed=seed, **keys).submit(Engine(), indices, step, sampling).result()
        return made.is_reference.tolist()

    assert drawn(0, 1) == batch.is_reference.tolist()
    assert len({tuple(drawn(*each)) for each in ((0, 1), (0, 2), (0, 3), (1, 1))}) > 2


def test_without_a_share_the_engine_answers_alone():
    batch = mix(prompts=2).submit(Engine(), [4, 7], 1, Sampling(9)).result()
    assert batch.references is None and took(batch) == [(4, [304], False), (7, [307], False)]


def test_warm_up_generates_nothing():
    ours = mix(prompts=4, samples=2, warmup_steps=2)
    assert [ours.references_of(step) for step in (1, 2, 3)] == [8, 8, 0]
    assert [ours.prompts_of(step) for step in (1, 2, 3)] == [8, 8, 4]
    batch = ours.submit(None, [*range(8)], 2, Sampling(9, samples=2)).result()
    assert took(batch) == [(i, PROMPTS.references[i], True) for i in range(8)]
    later = mix(prompts=4, warmup_steps=2, mix={"dataset": 0.5})
    assert [later.references_of(step) for step in (1, 2, 3, 4)] == [4, 4, 2, 2]


def test_references_are_cut_and_keep_what_is_valid():
    valid = [[i % 2 == 0] * (len(ids) - 1) + [True] for i, ids in enumerate(PROMPTS.references)]
    masked = SimpleNamespace(**{**vars(PROMPTS), "valid": valid})
    batch = mix(masked).references([3, 4, 8], longest=3)
    assert batch.response_lengths.tolist() == [3, 3, 3] and batch.truncated.tolist() == [True] * 3
    assert batch.cu_rows.tolist() == [0, 0, 3, 6]
    assert batch.row_tokens().tolist() == [204] * 3 + [208] * 3


# ------------------------------------------------------------------------------------- a whole run

PAIRS = [(11 + i, 1 + i % 7, 2 + i % 5) for i in range(40)]
ASKED = [f"Ann has {n} nuts . wins {a} . gets {b} . ?" for n, a, b in PAIRS]
SAID = [f"{n} + {a} = {n + a} . {n + a} + {b} = {n + a + b} ." for n, a, b in PAIRS]


def write(path) -> str:
    """The data; in two of three responses, what follows its first sum is excluded."""
    with open(path, "w") as file:
        for i, (ask, say) in enumerate(zip(ASKED, SAID, strict=True)):
            hidden = [[say.index("=") + 2, say.index(".") + 1]] if i % 3 else None
            file.write(json.dumps({"prompt": ask, "solution": say, "hidden": hidden}) + "\n")
    return str(path)


def references_by_hand(indices):
    """The references of these prompts, one piece of text tokenised after the other."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    prompts, responses, valid = [], [], []
    for i in indices:
        words = [*SAID[i].split(), None]
        prompts.append(tokenizer(ASKED[i])["input_ids"])
        ids, own = [], []
        for place, word in enumerate(words):
            pieces = [1] if word is None else tokenizer(f" {word}", add_special_tokens=False)
            pieces = pieces if word is None else pieces["input_ids"]
            ids += pieces
            # n + a = (sum .) n …: the words after the first "=", up to its full stop
            own += [not (i % 3 and 4 <= place <= 5)] * len(pieces)
        responses.append(torch.tensor(ids))
        valid.append(torch.tensor(own))
    batch = make_rollout_batch(
        prompts, indices, responses, [torch.full((len(r),), torch.nan) for r in responses],
        [False] * len(indices), [torch.full((len(r),), -1) for r in responses], valid,
    )  # fmt: skip
    return replace(batch, references=torch.ones(len(indices), dtype=torch.bool))


def test_a_step_of_both_sources_is_that_of_dense_float64(tmp_path):
    """The first step is of references alone, each after it has two of eight sequences."""
    options = [
        "rollout.mix={dataset: 0.25}", "rollout.warmup_steps=1", "data.response_column=solution",
        "data.excluded_column=hidden", "data.shuffle=false", "selection.ratio=0.4",
        "rollout.max_new_tokens=40", "train.steps=3", FROZEN,
    ]  # fmt: skip
    prompts = f"data.prompts={write(tmp_path / 'data.jsonl')}"
    seen = observe([f"run.dir={tmp_path}/run", prompts, *options])
    assert seen.status == 0, seen.printed
    assert "40 reference responses in 'solution'" in seen.printed
    generated = [None, *(call.batch for call in seen.generated)]
    assert len(generated) == len(seen.steps) == 3
    for step, (record, rolled_out) in enumerate(zip(seen.steps, generated, strict=True)):
        mine = {*range(8 * step, 8 * step + 8)}
        taken = [] if rolled_out is None else rolled_out.prompts.tolist()
        assert len(taken) == (0 if rolled_out is None else 6) and mine > {*taken}
        batch = references = references_by_hand(sorted(mine - {*taken}))
        if rolled_out is not None:
            batch = references.followed_by(rolled_out)
        z_s, z_t, _ = row_logits(STUDENT, TEACHER, batch, 1152)
        z_s = z_s.detach()
        scores = [f(z_s, z_t, 16) for f in (dense.disagreement, dense.compatibility)]
        mask = dense.select(dense.selector_scores("teachability", *scores, dense.entropy(z_s)), 0.4)
        losses = dense.divergence(z_s, z_t)
        of_data = torch.arange(batch.num_rows) < references.num_rows
        expected = {
            "valid_rows": batch.num_rows,
            "kept_rows": int(mask.sum()),
            "loss": losses[mask].mean().item(),
            "tokens_generated": batch.num_rows - references.num_rows,
            "rollout/dataset_share": references.num_sequences / 8,
            "loss/dataset": losses[mask & of_data].mean().item(),
            "selection/kept_share_dataset": mask[of_data].double().mean().item(),
        }
        if rolled_out is not None:
            expected |= {
                "loss/rollout": losses[mask & ~of_data].mean().item(),
                "selection/kept_share_rollout": mask[~of_data].double().mean().item(),
                "rollout/response_length_max": rolled_out.response_lengths.max().item(),
                "rollout/staleness_max": 0,
            }
        for name, wanted in expected.items():
            assert record[name] == pytest.approx(wanted, rel=1e-4), (step, name)
        assert references.num_rows < len(references.response_tokens())  # some are not valid
        assert record["tokens_read"] > batch.num_rows
        assert {name for name in record if name.endswith("/rollout")} <= {
            "loss/rollout", "time/rollout", "flops/rollout"
        }  # fmt: skip
        assert ("rollout/logprob_gap_mean" in record) == (rolled_out is not None)
        assert (record["flops/rollout"] > 0) == (rolled_out is not None)
    assert all(record.get("rollout/logprob_gap_max", 0) < 1e-3 for record in seen.steps)


def test_a_run_that_resumes_goes_on_bit_for_bit(tmp_path):
    """After steps that took 8 and 5 prompts; the next takes 5."""
    options = [
        "rollout.mix={dataset: 0.3}", "rollout.warmup_steps=1", "data.response_column=solution",
        "rollout.prompts=4", "rollout.samples=2", "checkpoint.every=1", "optimizer.lr=0.001",
    ]  # fmt: skip
    options.append(f"data.prompts={write(tmp_path / 'data.jsonl')}")
    whole = observe([f"run.dir={tmp_path}/whole", "train.steps=3", *options])
    first, rest = (
        observe([f"run.dir={tmp_path}/stopped", f"train.steps={steps}", *options])
        for steps in (2, 3)
    )
    assert (first.status, rest.status) == (0, 0), rest.printed
    seen, generated = rest.steps, [*first.generated, *rest.generated]
    shares = [1, 0.25, 0.25]  # then int(1.2) and int(2.4) − int(1.2) of four places
    assert [record["rollout/dataset_share"] for record in whole.steps] == shares
    for ours, theirs in zip(seen, whole.steps, strict=True):
        for name in ("loss", "grad_norm", "kept_rows", "valid_rows", "rollout/dataset_share"):
            assert ours[name] == theirs[name], name
    assert [call.indices for call in generated] == [call.indices for call in whole.generated]
    for ours, theirs in zip(generated, whole.generated, strict=True):
        assert torch.equal(ours.batch.tokens, theirs.batch.tokens)
