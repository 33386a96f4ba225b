"""Keys of a step, through a real run: what it logs is what a dense float64 step comes to."""

from __future__ import annotations

import json
import math
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import dense
from support.keys import (
    ADAM,
    AVERAGE,
    BF16,
    BOUNDS,
    KEYS,
    MINI_BATCHES,
    OFFLOAD,
    RECOMPUTE,
    SELF,
    STEP,
    WEIGHTS,
    given,
    value,
    written,
)
from support.observed import FROZEN, STUDENT, TEACHER, observe
from support.step import row_logits
from test_optimizer import Reference

from megatron_taopd.data.batching import split_mini_batches
from megatron_taopd.types import WantedRows

SIZE = 1152  # of both vocabularies, which are the same
ROWS = ["rollout.prompts=24", "data.shuffle=false"]

SELECTORS = [name for name, test in KEYS["selection.selector"].items() if test == STEP]
CASES = [*zip(SELECTORS, cycle(KEYS["loss.kind"]))]


@pytest.mark.parametrize(("selector", "kind"), CASES)
def test_a_step_is_that_of_dense_float64(tmp_path, selector, kind):
    """Student and teacher have changed places, so that their paths matter, too."""
    paths = {"student.path": TEACHER, "teacher.path": STUDENT}
    keys = given(
        STEP,
        paths | {"selection.selector": selector, "loss.kind": kind},
    )
    seen = observe([f"run.dir={tmp_path}", *ROWS, *written(keys)])
    [record], [(grad_norm, _)] = seen.steps, seen.updates
    batch = seen.generated[0].batch

    z_s, z_t, student = row_logits(TEACHER, STUDENT, batch, SIZE)
    k, ratio = value(keys["selection.k"]), value(keys["selection.ratio"])
    columns = {
        "disagreement": dense.disagreement(z_s.detach(), z_t, k),
        "compatibility": dense.compatibility(z_s.detach(), z_t, k),
        "student_entropy": dense.entropy(z_s.detach()),
        "teacher_entropy": dense.entropy(z_t),
    }
    mask = torch.ones(batch.num_rows, dtype=torch.bool)
    if selector != "full":
        lengths = batch.response_lengths.tolist()
        scores = dense.selector_scores(selector, *list(columns.values())[:3], lengths)
        mask = dense.select(scores, ratio)
    beta, alpha = value(keys["loss.beta"]), value(keys["loss.alpha"])
    if kind == "sampled_token":
        tokens = batch.response_tokens()[mask, None]
        log_s, log_t = (z.log_softmax(1).gather(1, tokens)[:, 0] for z in (z_s[mask], z_t[mask]))
        ratios = (log_s - batch.log_probs[mask].double()).exp()
        # On policy each is 1, of which less counts.
        ratios = ratios * value(keys["loss.max_ratio"]) / ratios.detach()
        loss = (ratios * (log_s - log_t).detach()).mean()
        assert record["truncated_ratio"] == 1
    else:
        loss = dense.divergence(z_s[mask], z_t[mask], kind, None, beta, alpha).mean()

    assert (record["valid_rows"], record["kept_rows"]) == (batch.num_rows, int(mask.sum()))
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)
    expected = {}
    for name, column in columns.items():
        for q, suffix in ((0.05, "q05"), (0.5, "q50"), (0.95, "q95")):
            expected[f"scores/{name}_{suffix}"] = dense.quantile(column.tolist(), q)
        expected[f"selection/kept_{name}"] = column[mask].mean().item()
    overlap = dense.topk_overlap(z_s.detach(), z_t, k)
    assert 0 < overlap.mean() < 1
    expected["selection/topk_overlap"] = overlap.mean().item()
    for name, wanted in expected.items():
        assert record[name] == pytest.approx(wanted, rel=1e-3, abs=1e-5), name
    # Where both models are sure, all that there is of a gradient is rounding.
    wanted = pytest.approx(norm(loss, student), rel=1e-4, abs=1e-6)
    assert grad_norm == record["grad_norm"] == wanted


def test_rows_count_by_the_discrepancy_before_them(tmp_path):
    """Σ w·loss / Σ w of the kept rows, with the weights of all rows of their responses."""
    keys = given(WEIGHTS)
    seen = observe([f"run.dir={tmp_path}", *ROWS, "selection.ratio=0.4", *written(keys)])
    [record], [(grad_norm, _)] = seen.steps, seen.updates
    batch = seen.generated[0].batch
    z_s, z_t, student = row_logits(STUDENT, TEACHER, batch, SIZE)
    scores = [f(z_s.detach(), z_t, 16) for f in (dense.disagreement, dense.compatibility)]
    priority = dense.selector_scores("teachability", *scores, dense.entropy(z_s.detach()))
    mask = dense.select(priority, 0.4)
    tokens = batch.response_tokens()[:, None]
    log_s, log_t = (dense.log_probs(z.detach()).gather(1, tokens)[:, 0] for z in (z_s, z_t))
    lengths, gamma = batch.response_lengths.tolist(), value(keys["loss.gamma"])
    weights = dense.discrepancy_weights(log_s, log_t, lengths, gamma)[mask]
    loss = (weights * dense.divergence(z_s[mask], z_t[mask])).sum() / weights.sum()
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert record["loss"] != pytest.approx(dense.divergence(z_s, z_t)[mask].mean().item(), rel=1e-2)
    assert record["loss/weight_mean"] == pytest.approx(weights.mean().item(), rel=1e-4)
    assert grad_norm == pytest.approx(norm(loss, student), rel=1e-4)


def norm(loss, student) -> float:
    gradients = torch.autograd.grad(loss, [*student.parameters()], retain_graph=True)
    return math.sqrt(sum(float(g.pow(2).sum()) for g in gradients))


def test_mini_batches_are_steps_with_their_own_means(tmp_path):
    """The weights stay, so that every one of them can be compared with the same dense student."""
    keys = given(MINI_BATCHES)
    seen = observe([f"run.dir={tmp_path}", FROZEN, *ROWS, *written(keys)])
    assert len(seen.updates) == value(keys["train.mini_batches"])
    batch = seen.generated[0].batch
    z_s, z_t, student = row_logits(STUDENT, TEACHER, batch, SIZE)
    scores = [f(z_s.detach(), z_t, 16) for f in (dense.disagreement, dense.compatibility)]
    priority = dense.selector_scores("teachability", *scores, dense.entropy(z_s.detach()))
    mask = dense.select(priority, 0.1)
    losses = dense.divergence(z_s, z_t)
    kept = WantedRows.known(batch, mask.nonzero()[:, 0])
    parts = [part.ids for part in split_mini_batches(batch, kept, len(seen.updates))]
    assert all(len(part) for part in parts)
    wanted = [norm(losses[part].mean(), student) for part in parts]
    assert [grad_norm for grad_norm, _ in seen.updates] == pytest.approx(wanted, rel=1e-4)
    assert seen.steps[0]["loss"] == pytest.approx(losses[mask].mean().item(), rel=1e-4)


@pytest.mark.parametrize("decay", KEYS["optimizer.decay"])
def test_the_optimizer_is_adamw(tmp_path, decay):
    """torch's, in float64, with the run's own gradients: three steps of two mini-batches."""
    keys = given(ADAM, {"optimizer.decay": decay})
    settings = SimpleNamespace(**{k.removeprefix("optimizer."): value(t) for k, t in keys.items()})
    steps = ["train={steps: 3, mini_batches: 2}", "selection.ratio=0.5"]
    options = [*steps, "checkpoint.export_hf=true", *written(keys)]
    seen = observe([f"run.dir={tmp_path}", *options], gradients)
    assert seen.status == 0 and len(seen.updates) == 6
    reference = Reference(load_file(f"{STUDENT}/model.safetensors"), settings)
    wanted = [reference.step(taken, n, 6) for n, taken in enumerate(seen.found, 1)]
    assert [*sum(seen.updates, ())] == pytest.approx([*sum(wanted, ())], rel=1e-5)
    trained = load_file(tmp_path / "student" / "model.safetensors")
    for name, weights in reference.weights.items():
        assert (trained[name].double() - weights).abs().max() < 2e-6, name


def gradients(run):
    """Those of each update that is taken from now on, whole, by Hugging Face name."""
    from megatron_taopd.models.weights import export_weights

    taken, step = [], run.student.step

    def noted():
        exported = export_weights(run.student.trunk, read=lambda p: p.main_grad)
        taken.append({name: tensor.clone() for name, tensor in exported})
        return step()

    run.student.step = noted
    return taken


# ------------------------------------------------------------------------- precision and memory


def dtypes(run):
    models = {
        "engine": run.engine.model,
        "student": run.student.trunk,
        "teacher": run.distiller.teachers[0].trunk,
    }
    found = {name: next(model.parameters()).dtype for name, model in models.items()}
    return found | {"teacher's head": run.distiller.heads.teacher.dtype}


def test_everything_is_in_the_precision_of_the_run(tmp_path):
    keys = given(BF16)
    seen = observe([f"run.dir={tmp_path}", *written(keys), "checkpoint.export_hf=true"], dtypes)
    assert set(seen.found.values()) == {torch.bfloat16}, seen.found
    assert {p.dtype for p in seen.passes} == {"torch.bfloat16"}
    with open(tmp_path / "student" / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"BF16"}


# Of a layer of the student that trains: forward passes through it, and through its attention.
TWICE = {"none": (1, 1), "selective": (1, 2), "full": (2, 2)}


@pytest.mark.parametrize("recompute", ["none", *KEYS["train.recompute"]])
def test_recomputation_runs_parts_of_the_layers_twice(tmp_path, recompute):
    keys = {} if recompute == "none" else given(RECOMPUTE, {"train.recompute": recompute})
    seen = observe([f"run.dir={tmp_path}", *written(keys)])
    layers = json.loads((Path(STUDENT) / "config.json").read_text())["num_hidden_layers"]
    [trained] = [p for p in seen.passes if p.trains]
    assert (trained.layers / layers, trained.attentions / layers) == TWICE[recompute]
    [scored] = [p for p in seen.passes if p.whose == "student" and not p.trains]
    assert (scored.layers, scored.attentions) == (layers, layers)


def test_micro_batches_and_logits_stay_within_their_bounds(tmp_path):
    """Of a batch that is larger than both."""
    keys = given(BOUNDS)
    limit, memory = (value(keys[f"train.{n}"]) for n in ("micro_batch_tokens", "head_memory_mib"))
    options = ["rollout.prompts=24", "selection.selector=full"]
    for name in keys:  # the one without the other: a micro-batch of 100 has few rows
        seen = observe([f"run.dir={tmp_path}/{name}", *options, *written({name: keys[name]})])
        batch = seen.generated[0].batch
        if name == "train.micro_batch_tokens":
            for role in ("teacher", "student"):
                for trains in {False, role == "student"}:
                    sizes = [p.tokens for p in seen.passes if (p.whose, p.trains) == (role, trains)]
                    assert max(sizes) <= limit < sum(sizes), (role, trains)
        else:
            # In fp32, of both models.
            assert seen.logits * SIZE * 4 * 2 <= memory << 20 < batch.num_rows * SIZE * 4 * 2
            assert seen.steps[0]["memory/head_scoring"] <= memory << 20


def test_an_offloaded_teacher_moves(tmp_path):
    """Its weights lie somewhere else than at home while it reads."""
    keys = given(OFFLOAD)
    seen = observe([f"run.dir={tmp_path}", *written(keys)])
    assert [p.place == p.home for p in seen.passes if p.whose == "teacher"] == [False]


def weights_of(run):
    """By name: copies of what there is at first, and the run's own memory, as it is at the end."""
    found = {"student": run.student.trunk, "teacher": run.distiller.teachers[0].trunk}
    live = {whose: dict(trunk.state_dict()) for whose, trunk in found.items()}
    live = {w: {n: t for n, t in named.items() if t is not None} for w, named in live.items()}
    first = {w: {name: t.clone() for name, t in named.items()} for w, named in live.items()}
    return first, live, run.student.average is not None


def learn_from_itself(run_dir, keys, steps):
    """The teacher reads each question twice, or there would be nothing to learn."""
    options = ["teacher.context_column=prompt", "optimizer.lr=1e-3", f"train.steps={steps}"]
    paths = [f"teacher.path={STUDENT}", f"run.dir={run_dir}"]
    seen = observe([*paths, *ROWS, *options, *written(keys)], weights_of)
    assert seen.status == 0, seen.printed
    assert all(record["loss"] > 0 for record in seen.steps)
    return seen.found


def test_the_student_teaches_itself_with_its_first_weights(tmp_path):
    first, last, averaged = learn_from_itself(tmp_path, given(SELF), steps=2)
    assert not averaged
    for name, kept in last["teacher"].items():
        assert torch.equal(kept, first["student"][name])
        assert not torch.equal(kept, last["student"][name]), name


def test_the_teacher_is_an_average_of_the_student(tmp_path):
    """The second step's, which is that after one update, at the key's decay."""
    keys = given(AVERAGE)
    decay = value(keys["teacher.ema"])
    first, once, averaged = learn_from_itself(tmp_path / "once", keys, steps=1)
    _, twice, _ = learn_from_itself(tmp_path / "twice", keys, steps=2)
    assert averaged
    for name, taught in twice["teacher"].items():
        before, after = first["student"][name].double(), once["student"][name].double()
        assert (after - before).abs().max() > 1e-4, name
        expected = decay * before + (1 - decay) * after
        torch.testing.assert_close(taught.double(), expected, rtol=0, atol=1e-6)
