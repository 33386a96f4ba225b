"""Keys of a run as a whole: layouts, checkpoints, logs, guard and watchdog."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
import types
from copy import copy
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.families import CONFIGS, save_random
from support.keys import (
    CHECKPOINTS,
    EXPERTS,
    GAP,
    LAYOUT,
    LOGS,
    SHARED,
    SPIKE,
    TRUST,
    WATCHDOG,
    given,
    value,
    written,
)
from support.observed import FROZEN, SMALL, STUDENT, TEACHER, TINY, observe, observed
from support.patience import wait_for
from support.ranks import run_ranks
from test_guard import faulty_train
from transformers import AutoTokenizer

MODELS = ("student", "teacher")

# ---------------------------------------------------------------------------------------- layouts


def shapes(run):
    """Of each model on this rank: its layers, columns of a query matrix, and experts."""
    found = {}
    for name, model in (("student", run.student), ("teacher", run.distiller.teachers[0])):
        layers = model.trunk.decoder.layers
        experts = getattr(layers[0].mlp, "experts", None)
        found[name] = (
            len(layers),
            layers[0].self_attention.linear_proj.weight.shape[1],
            experts and experts.num_local_experts,
        )
    return found


@pytest.mark.parametrize("tensor_parallel", ["student", "teacher"])
def test_models_lie_in_their_layouts(tmp_path, tensor_parallel):
    """One at TP2 with sequence parallelism, the other at PP2."""
    keys = given(LAYOUT)
    pipelined = {"student": "teacher", "teacher": "student"}[tensor_parallel]
    wanted = [f"{tensor_parallel}.parallel.{n}" for n in ("tp", "sequence")]
    chosen = {key: keys[key] for key in [*wanted, f"{pipelined}.parallel.pp"]}
    for seen in observe([f"run.dir={tmp_path}", *written(chosen)], shapes, world_size=2):
        assert seen.status == 0
        for name, path in (("student", STUDENT), ("teacher", TEACHER)):
            config = json.loads((Path(path) / "config.json").read_text())
            tp, pp = (2, 1) if name == tensor_parallel else (1, 2)
            layers = config["num_hidden_layers"] // pp
            columns = config["num_attention_heads"] * config["head_dim"] // tp
            assert seen.found[name] == (layers, columns, None), name
            passes = [p for p in seen.passes if p.whose == name]
            assert passes and all(p.width * tp == p.tokens for p in passes)


@pytest.mark.parametrize("sharing", ["student", "teacher"])
def test_ranks_share_long_sequences(tmp_path, sharing):
    """Sequences of 30 tokens or so; each of two ranks has 22 of a micro-batch's 44. The other model
    lies on two stages, and runs whole micro-batches."""
    keys, key = given(SHARED), f"{sharing}.parallel.cp"
    other = {"student": "teacher", "teacher": "student"}[sharing]
    options = ["train.micro_batch_tokens=44", f"{other}.parallel.pp=2", "data.max_prompt_tokens=32"]
    runs = [f"run.dir={tmp_path}", *options, *written({key: keys[key]})]
    alone = observe([f"run.dir={tmp_path}/alone", *options[::2]])
    for seen in observe(runs, world_size=2):
        assert seen.status == 0
        assert max(p.tokens for p in seen.passes if p.whose == sharing) <= 22
        assert max(p.tokens for p in seen.passes if p.whose == other) > 22
        for name in ("loss", "grad_norm", "kept_rows"):
            assert seen.steps[0][name] == pytest.approx(alone.steps[0][name], rel=1e-4)


def test_experts_lie_on_several_ranks(tmp_path):
    """Of both models. Routers that are frozen stay, and are saved, too; all else learns, through
    the engine's own experts; a resumed run goes on from there on another layout."""
    keys = given(EXPERTS)
    config = copy(CONFIGS["qwen3_moe"])
    config.vocab_size, config.eos_token_id = 1152, 1
    for name in ("student", "teacher"):
        save_random(config, tmp_path / name)
        AutoTokenizer.from_pretrained(TEACHER).save_pretrained(tmp_path / name)
    options = [f"run.dir={tmp_path}/run", *(f"{m}.path={tmp_path}/{m}" for m in MODELS)]
    options += ["checkpoint={every: 1, export_hf: true}", *written(keys)]
    for seen in observe(options, shapes, world_size=2):
        assert seen.status == 0
        for name in MODELS:
            experts = config.num_experts // value(keys[f"{name}.parallel.ep"])
            assert seen.found[name][2] == experts
    assert seen.records == [] or seen.records[-1]["moe/aux_loss"] > 0.9
    before = load_file(tmp_path / "student" / "model.safetensors")
    after = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    of_experts = {name for name in before if ".experts." in name}
    assert same - of_experts == {name for name in before if name.endswith("mlp.gate.weight")}
    learned = {int(name.split(".")[5]) for name in of_experts - same}  # not all had tokens
    assert learned & {0, 1, 2, 3} and learned & {4, 5, 6, 7}

    elsewhere = ["student.parallel={tp: 2, sequence: true, ep: 1}", "train.steps=2"]
    first, _ = observe([*options, *elsewhere], shapes, world_size=2)
    assert first.status == 0 and "resuming after step 1" in first.printed
    assert first.found["student"][2] == config.num_experts


# ------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Two prompts of the tiny pair."""
    path = tmp_path_factory.mktemp("data") / "held_out.jsonl"
    lines = (Path(STUDENT).parent / "test.jsonl").read_text().splitlines()[:2]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_checkpoints_come_and_go(tmp_path, held_out):
    """Without the best one there is one, and each is there when its step is logged."""
    keys = given(CHECKPOINTS)
    # Not those of `observe`, which has no checkpoints to speak of.
    plain = ["checkpoint={every: 50, export_hf: true}", "train.steps=5"]
    evaluations = ["eval={every: 1, limit: 2}", f"eval.prompts={held_out}"]
    seen = observe([f"run.dir={tmp_path}", *plain, *evaluations, *written(keys)])
    assert seen.status == 0
    written_in = [r["step"] for r in seen.records if "checkpoint/write_s" in r]
    every = value(keys["checkpoint.every"])
    assert written_in == [*range(every, 5, every), 5]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    newest = sorted(written_in)[-value(keys["checkpoint.keep_last"]) :]
    assert names == [f"step_{step:08d}" for step in newest]  # and no best.json
    assert not (tmp_path / "student").exists()


def test_a_checkpoint_without_checksums_has_to_be_trusted(tmp_path):
    keys = given(TRUST)
    options = [f"run.dir={tmp_path}/run"]
    assert observe(options).status == 0
    (tmp_path / "run" / "checkpoints" / "step_00000001" / "checksums.json").unlink()
    options.append("train.steps=2")
    shutil.copytree(tmp_path / "run", tmp_path / "refused")
    refused = observe([*options, f"run.dir={tmp_path}/refused"])
    assert refused.status == 2 and "checkpoint.trust=true" in refused.printed
    seen = observe([*options, *written(keys)])
    assert seen.status == 0 and "resuming after step 1" in seen.printed
    assert [record["step"] for record in seen.steps] == [1, 2]


# ------------------------------------------------------------------------------------------- logs


def logged(overrides):
    """A run that is scraped after each step, beside a stand-in for W&B: what it was told."""
    import httpx

    from megatron_taopd.monitoring.monitor import Monitor

    log, port = Monitor.log, next(o for o in overrides if "prometheus_port=" in o).split("=")[1]
    wandb, heard = types.ModuleType("wandb"), []
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.util = types.SimpleNamespace(generate_id=lambda: "abc")

    def init(**options):
        heard.append((options["project"], options["name"]))
        return types.SimpleNamespace(log=lambda values, step: None, finish=lambda: None)

    wandb.init = init

    def scraped(self, step, metrics):
        record = log(self, step, metrics)
        for host in ("127.0.0.1", "127.0.0.2"):
            try:
                heard.append((host, httpx.get(f"http://{host}:{port}/metrics").text))
            except httpx.ConnectError:
                heard.append((host, None))
        return record

    with mock.patch.dict(sys.modules, wandb=wandb), mock.patch.object(Monitor, "log", scraped):
        return observed(overrides), heard


def test_where_a_run_is_logged(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        port = probe.getsockname()[1]
    keys = given(LOGS, {"log.prometheus_port": port})
    options = ["student.parallel.tp=1", "teacher.parallel.pp=1", "rollout.prompts=4"]
    options += ["eval.prompts=null", "train.steps=1", "checkpoint.export_hf=false"]
    [(seen, heard)] = run_ranks(1, logged, [f"run.dir={tmp_path}", *options, *written(keys)])
    assert seen.status == 0, seen.printed
    assert not (tmp_path / "tensorboard").exists()
    name = keys["run.name"]
    assert heard[0] == (keys["log.wandb_project"], name)
    pages = dict(heard[1:])
    assert pages["127.0.0.1"] is None
    assert f'taopd_step{{run="{name}"}} 1.0' in pages[keys["log.prometheus_host"]]
    assert name in (tmp_path / "report.html").read_text()
    (looked_at,) = json.loads((tmp_path / "samples.json").read_text())["steps"]
    assert len(looked_at["responses"]) == int(keys["log.samples"]) < 4


def test_a_gap_above_its_bound_is_told(tmp_path):
    keys = given(GAP)
    seen = observe([f"run.dir={tmp_path}", *written(keys)])
    assert "rollout.gap_warning: step 1: engine and trainer differ by" in seen.printed


# ----------------------------------------------------------------------------- guard and watchdog


def test_a_loss_within_its_bound_is_no_spike(tmp_path):
    """Fifty times the loss of the steps before it, which are all the same, is one by default."""
    keys = given(SPIKE)
    options = [*SMALL, FROZEN, "train.steps=5"]
    options += ["data={limit: 8, shuffle: false}", "rollout.top_k=1"]
    skipped = {}
    for name, bound in (("as given", written(keys)), ("by default", [])):
        [(status, records, *_)] = run_ranks(
            1, faulty_train, [f"run.dir={tmp_path}/{name}", *options, *bound], {5: "spike"}
        )
        assert status == 0
        skipped[name] = records[-1]["guard/skipped"]
    assert skipped == {"as given": 0, "by default": 1}


def watched(overrides, watching, port):
    """The verdict of rank 0's watchdog, where so many ranks have one, and how long it took."""
    from datetime import timedelta

    from megatron_taopd import config as configuration
    from megatron_taopd import start
    from megatron_taopd.parallel.watchdog import Watchdog

    rank, verdicts = dist.get_rank(), []
    store = dist.TCPStore(
        "127.0.0.1", port, dist.get_world_size(), rank == 0, timedelta(seconds=600)
    )
    config = configuration.load(TINY, overrides)
    with (
        mock.patch.object(start, "default_store", lambda: store),
        mock.patch.object(Watchdog, "_end", lambda self, verdict: verdicts.append(verdict)),
    ):
        started = time.monotonic()
        watchdog = start.watch(config, joined=True) if rank < watching else None
        if rank == 0:
            wait_for(lambda: verdicts, seconds=10, what="no verdict")
        took = time.monotonic() - started
        dist.barrier()
        if watchdog:
            watchdog.stop(together=False)
        dist.barrier()
    return verdicts and verdicts[0]["line"], took


@pytest.mark.parametrize(
    ("key", "watching", "line"),
    [
        ("watchdog.stall_timeout_s", 2, "no rank has got any further for "),
        ("watchdog.heartbeat_timeout_s", 1, "rank 1 ("),
    ],
)
def test_silence_and_a_standstill_end_the_job_in_time(tmp_path, key, watching, line):
    """Where all ranks stand still, and where rank 1 has never said anything."""
    keys = given(WATCHDOG)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    overrides = [f"run.dir={tmp_path}", *written({key: keys[key]})]
    (verdict, took), _ = run_ranks(2, watched, overrides, watching, port)
    assert verdict.startswith(line), verdict
    assert took >= value(keys[key])
