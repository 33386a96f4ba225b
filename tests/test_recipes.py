"""The recipes: each one reads, fits its GPUs, and divides its ranks."""

from __future__ import annotations

import os
import re
import shutil
from copy import deepcopy
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from support.published import MODELS

from megatron_taopd import config as configuration
from megatron_taopd.config.values import check_values
from megatron_taopd.formats.hf import HFWriter, load_config
from megatron_taopd.plan.cluster import CLUSTERS
from megatron_taopd.plan.results import Plan
from megatron_taopd.plan.setup import Setup
from megatron_taopd.preflight.check_config import check

RECIPES = sorted((Path(__file__).parent.parent / "examples" / "recipes").glob("*.yaml"))
# Their models that are the shape of another, or that other one quantised.
SHAPES = {
    "Qwen3-8B-GRPO": "Qwen3-8B",
    "Qwen3-235B-A22B-FP8": "Qwen3-235B-A22B",
    "Qwen3-4B-128k": "Qwen3-4B",
    "Qwen3-14B-128k": "Qwen3-14B",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LONG = ("_32k", "_128k")  # of a pair's recipes for long responses, on 64 GPUs
DAPO = "Solve the following math problem step by step."


def ranks_and_servers(name: str) -> tuple[int, list[str]]:
    """How many ranks train, and what the launcher adds on the command line."""
    served = "235b" in name
    long = any(length in name for length in LONG)
    if name.endswith("_8gpu"):
        return (3 if served else 6), []
    nodes = (5, 6) if served else (5, 6, 7, 8) if long else (6, 7, 8)
    urls = ",".join(f"http://node{n}:{30000 + gpu}" for n in nodes for gpu in range(8))
    options = [f"rollout.servers.urls=[{urls}]"]
    if served:
        options.append("teacher.servers.urls=[http://node7:30000,http://node8:30000]")
    return (32 if served or long else 40), options


@pytest.fixture
def places(tmp_path, monkeypatch):
    for variable in ("MODELS", "DATA", "RUNS"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("SGLANG_KEY", "secret")
    for name in (*MODELS, *SHAPES):
        config = deepcopy(MODELS[SHAPES.get(name, name)])
        if name.endswith("-128k"):
            config.rope_parameters = {**config.rope_parameters, **YARN}
            config.max_position_embeddings = 131072
        config.save_pretrained(tmp_path / "MODELS" / name)
    return tmp_path


def test_there_is_one_for_each_pair_and_size():
    names = {path.stem for path in RECIPES}
    long = {f"qwen3_14b_to_4b{length}_64gpu" for length in LONG}
    pairs = {name.rpartition("_")[0] for name in names - long}
    assert len(pairs) == 7 and long < names
    large = {"qwen3_32b_to_30b_a3b_8gpu"}  # whose student and teacher are more than 8 GPUs hold
    of_both = {f"{pair}_{n}gpu" for pair in pairs for n in (8, 64)}
    assert names - long == of_both - large


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_fits_its_gpus(path, places):
    ranks, options = ranks_and_servers(path.stem)
    setup = Setup.of(configuration.load(path, options), ranks)
    plan = Plan.of(setup, CLUSTERS["h800"])
    assert plan.problems() == []
    # The servers are ahead, and take longest: 10 ms for each of 128k tokens.
    assert 0 < plan.seconds < (1200 if "_128k" in path.stem else 600)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_measures_what_it_teaches(path, places):
    """On problems that it does not train on, where a checkpoint is there to be the best one."""
    config = configuration.load(path, ranks_and_servers(path.stem)[1])
    assert config.eval.prompts == str(places / "DATA" / "aime-2024.parquet")
    assert config.eval.prompts != config.data.prompts and config.eval.at_start
    assert config.train.steps % config.eval.every == 0
    assert config.eval.every == config.checkpoint.every and config.checkpoint.keep_best
    # Its share of the run: no more answers in an evaluation than in two steps.
    answers = 30 * config.eval.samples
    assert answers <= 2 * config.rollout.prompts * config.rollout.samples
    assert config.eval.temperature > 0 and max(config.eval.pass_at) == config.eval.samples


def test_the_page_fetches_what_the_recipes_name(places, monkeypatch):
    """docs/launch.md: every model but the one that is one's own, and each problem once."""
    page = (RECIPES[0].parents[2] / "docs" / "launch.md").read_text()
    for path in RECIPES:
        config = configuration.load(path, ranks_and_servers(path.stem)[1])
        for model in (config.student.path, config.teacher.path):
            name = Path(model).name
            fetched = rf"(Qwen|deepseek-ai)/{name}`|`{name}` is your own|for model in .*{name}"
            assert re.search(fetched, page), name
    (mend,) = re.findall(r"python - <<'END'\n(.*?)END\n", page, re.DOTALL)
    (places / "DATA" / "published" / "data").mkdir(parents=True)
    long = "Find x. " * 200  # two problems differ at their ends alone
    rows = [
        {"prompt": [{"role": "user", "content": long + end}], "reward_model": {"ground_truth": end}}
        for end in ("1", "2", "1", "2", "1")
    ]
    for name in ("dapo-math-17k", "aime-2024"):
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, places / "DATA" / "published" / "data" / f"{name}.parquet")
    exec(mend, {})
    for name in ("dapo-math-17k", "aime-2024"):
        left = parquet.read_table(places / "DATA" / f"{name}.parquet")
        assert left.select(["prompt", "reward_model"]).to_pylist() == rows[:2]


@pytest.mark.skipif("TAOPD_DATA" not in os.environ, reason="TAOPD_DATA is not set")
@pytest.mark.parametrize("path", [p for p in RECIPES if "r1_" not in p.stem], ids=lambda p: p.stem)
@pytest.mark.slow
def test_can_start(path, places):
    """All that `config.check` looks at, with the family's real tokenizer."""
    tokenizer = Path(os.environ["TAOPD_DATA"]) / "tokenizers" / "qwen"
    for directory in (places / "MODELS").iterdir():
        shutil.copytree(tokenizer, directory, dirs_exist_ok=True, copy_function=shutil.copy)
        head = (load_config(directory).vocab_size, load_config(directory).hidden_size)
        writer = HFWriter(
            directory, {"lm_head.weight": (head, torch.bfloat16)}, max_file_bytes=1 << 40
        )
        writer.write_header("model.safetensors")
    row = {"prompt": [{"role": "user", "content": DAPO}], "reward_model": {"ground_truth": "34"}}
    for name in ("dapo-math-17k", "aime-2024"):
        parquet.write_table(pyarrow.Table.from_pylist([row]), places / "DATA" / f"{name}.parquet")
    ranks, options = ranks_and_servers(path.stem)
    config = configuration.load(path, options)
    check_values(config, ranks)
    check(config, ranks)
