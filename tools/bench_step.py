"""Time, memory and operations of one step: full OPD, TA-OPD in both schedules, TRL's trainer.

    python tools/bench_step.py --pair tiny
    TAOPD_DATA=DIR python tools/bench_step.py --pair smollm2 --prompts 8
    python tools/bench_step.py --pair slice --prompts 2 --cut 0.8

All arms run the same rollouts through the package's own functions, without the optimizer's step, so
that every repeat does the same. docs/step_cost.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from megatron_taopd import batching, score_hidden
from megatron_taopd import config as configuration
from megatron_taopd.accounting import ModelCost, step_operations
from megatron_taopd.loss import kept_row_loss
from megatron_taopd.models import weights
from megatron_taopd.models.hf_map import padded_vocab_size
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.layout import forward_layout, student_layout
from megatron_taopd.parallel.memory import peak_memory
from megatron_taopd.parallel.vocab import rows_within
from megatron_taopd.prompts import PromptStream, load_prompts
from megatron_taopd.rollout.engine import Sampling, make_rollout_batch
from megatron_taopd.rollout.horizon import Horizon
from megatron_taopd.rollout.local import LocalEngine
from megatron_taopd.scoring import Heads, score
from megatron_taopd.selection import budget, select, selection_metrics
from megatron_taopd.student import Student
from megatron_taopd.teachability import learnable_disagreement
from megatron_taopd.teacher.megatron import MegatronTeacher
from megatron_taopd.training import backward
from megatron_taopd.vocab_map import VocabMap, Vocabulary

ROOT = Path(__file__).parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIGS = {"tiny": "tiny_pair.yaml", "smollm2": "smollm2.yaml"}
RATIO = 0.1  # that the targets are set for
K = 16
LAYERS = {"student": 36, "teacher": 40}  # of Qwen3-4B and Qwen3-14B
OPTIMIZER = SimpleNamespace(
    lr=1e-6, min_lr=None, decay="constant", warmup_steps=0, weight_decay=0.0,
    beta1=0.9, beta2=0.98, eps=1e-8, clip=1.0,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pair", choices=["tiny", "smollm2", "slice"], default="tiny")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, help="default: of the pair; slice 192")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3, RATIO, 0.05])
    parser.add_argument("--concentrate", type=float, default=0.4, help=f"beside 0, at {RATIO:.0%}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--head-memory-mib", type=int, default=256, help="logits at a time")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, help="of this rank; default: torch's")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL's trainer out")
    parser.add_argument(
        "--layers", nargs=2, type=int, default=[2, 4], help="slice: of student and teacher"
    )
    parser.add_argument("--cut", type=float, help="slice: share of tokens trained, as on smollm2")
    parser.add_argument("--rows-per-token", type=float, default=1.0, help="slice: rows over tokens")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    if RATIO not in arguments.ratios:
        parser.error(f"--ratios: {RATIO} is missing, which the targets are set for")
    if arguments.pair == "slice" and not arguments.cut:
        parser.error("--pair slice needs --cut: what --pair smollm2 says is trained at 10 %")
    if arguments.pair == "smollm2" and "TAOPD_DATA" not in os.environ:
        parser.error("--pair smollm2 needs gsm8k/train.jsonl under the directory TAOPD_DATA")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    os.environ.update(
        KINETO_LOG_LEVEL="99", TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_DISABLE_TELEMETRY="1"
    )
    joined = platform.initialize()
    transformers.utils.logging.set_verbosity_error()

    try:
        measured = measure(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    finally:
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        console = Console()
        if not console.is_terminal:
            console.width = 160
        for table in tables(measured):
            console.print(table)
        if arguments.json:
            arguments.json.write_text(json.dumps(measured, indent=2) + "\n")
    if joined:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------ the models


@dataclass(frozen=True)
class Models:
    """Both models, tensor parallel over all ranks; the student recomputes if its config says so.

    Attributes:
        generate: a length → the rollouts with it; None for random weights and tokens.
        peers: () → (student, teacher) of transformers, with the same weights.
    """

    student: object
    teacher: object
    heads: object
    read: Callable
    generate: Callable | None
    peers: Callable
    micro_batch_tokens: int

    @property
    def layout(self):
        return self.student.layout

    @contextmanager
    def recompute(self, granularity: str) -> Iterator[None]:
        config = self.student.config
        config.recompute_granularity = None if granularity == "none" else granularity
        try:
            yield
        finally:
            config.recompute_granularity = "full"


def build(paths: dict, vocab_map, arguments, generate=None, teacher_head=None, peers=None):

    dtype, tp = DTYPES[arguments.precision], dist.get_world_size()
    student = Student(
        paths["student"], student_layout(tp, 1), dtype, "full", OPTIMIZER, 1,
        vocab_map.size, vocab_map.absent,
    )  # fmt: skip
    tokens = arguments.micro_batch_tokens
    teacher = MegatronTeacher(paths["teacher"], forward_layout(tp, 1), dtype, tokens)
    shard = student.shard
    if teacher_head is None:
        columns = vocab_map.columns(shard.start, shard.stop)
        head = weights.load_head(paths["teacher"], columns, dtype)
    else:
        head = teacher_head(teacher)
    chunk_rows = rows_within(arguments.head_memory_mib << 20, shard.stop - shard.start)
    return Models(
        student,
        teacher,
        Heads(student.head_weight, head, shard, chunk_rows),
        partial(vocab_map.read, prompts=None, max_tokens=teacher.longest_sequence),
        generate,
        peers or partial(peers_on_disk, paths, dtype),
        tokens,
    )


def pair_on_disk(arguments):
    """Models and rollouts of one of the examples' configurations."""
    config = configuration.load(ROOT / "examples" / CONFIGS[arguments.pair])
    paths = {"student": config.student.path, "teacher": config.teacher.path}
    vocabularies = {name: Vocabulary.from_pretrained(path) for name, path in paths.items()}
    vocab_map = VocabMap.between(vocabularies["student"], vocabularies["teacher"])
    data = config.data
    prompts = load_prompts(
        data.prompts, vocabularies["student"].tokenizer, data.prompt_column, None,
        data.template, data.system, data.max_prompt_tokens,
    )  # fmt: skip
    indices = PromptStream(len(prompts), config.run.seed).take(arguments.prompts)
    engine = LocalEngine.from_hf(
        paths["student"], DTYPES[arguments.precision], platform.device(), seed=config.run.seed,
        rank=dist.get_rank(), world_size=dist.get_world_size(), vocab_size=vocab_map.size,
    )  # fmt: skip
    longest = arguments.max_new_tokens or config.rollout.max_new_tokens

    def generate(length: int = longest):
        token_ids = [prompts.token_ids[i] for i in indices]
        return engine.generate(token_ids, indices, 1, Sampling(max_new_tokens=length))

    return build(paths, vocab_map, arguments, generate), generate(), config.rollout


def peers_on_disk(paths: dict, dtype: torch.dtype):

    load = partial(AutoModelForCausalLM.from_pretrained, dtype=dtype)
    return [load(paths[name]).to(platform.device()) for name in ("student", "teacher")]


def qwen3_slice(arguments):
    """Some layers of Qwen3-4B and Qwen3-14B at their real widths; random weights and tokens.

    The teacher's head is its embedding here (in Qwen3-14B they are two matrices): one less to hold.
    """

    shared = dict(vocab_size=151936, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
    configs = {
        "student": Qwen3Config(
            hidden_size=2560, intermediate_size=9728, num_attention_heads=32,
            num_hidden_layers=arguments.layers[0], architectures=["Qwen3ForCausalLM"], **shared,
        ),
        "teacher": Qwen3Config(
            hidden_size=5120, intermediate_size=17408, num_attention_heads=40,
            num_hidden_layers=arguments.layers[1], architectures=["Qwen3ForCausalLM"], **shared,
        ),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{name}" for name in configs}
        for name, config in configs.items():
            config.save_pretrained(paths[name])
        # There is no checkpoint to read: the weights are drawn where they would be.
        with mock.patch.object(weights, "load_weights", draw_weights):
            models = build(
                paths,
                VocabMap(torch.arange(shared["vocab_size"])),
                arguments,
                teacher_head=lambda teacher: teacher.trunk.embedding.word_embeddings.weight,
                peers=lambda: [
                    peer_of(model.trunk, configs[name])
                    for name, model in (("student", models.student), ("teacher", models.teacher))
                ],
            )

    def draw(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=generator)

    longest = arguments.max_new_tokens or 192
    prompts = [draw(0, 150_000, 64).tolist() for _ in range(arguments.prompts)]
    responses = [draw(0, 150_000, longest) for _ in prompts]
    log_probs = [torch.zeros(longest) for _ in prompts]
    batch = make_rollout_batch(
        prompts, range(len(prompts)), responses, log_probs, [True] * len(prompts), 0
    )
    return models, batch, None


@torch.no_grad()
def draw_weights(trunk, _hf_dir) -> None:
    torch.manual_seed(0)
    for parameter in trunk.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)


def peer_of(trunk, config):
    """A transformers model over a trunk's memory; only query, key and value are copied."""

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = dict(weights.export_weights(trunk))
    model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(platform.device())
    return model


# -------------------------------------------------------------------------------------- the step


@dataclass(frozen=True)
class Arm:
    """One way to do the step.

    Attributes:
        ratio: ρ; 1 is full OPD in a single pass: nothing is scored, every row is trained on.
        schedule: single_pass, two_pass or replay.
        recompute: none or full. A replay does what full recomputation does, whatever is asked for.
    """

    ratio: float
    schedule: str
    recompute: str
    concentrate: float = 0.0

    def __str__(self) -> str:
        if self.schedule == "single_pass":
            return "full OPD"
        concentrated = f", c {self.concentrate:g}" if self.concentrate else ""
        return f"TA-OPD {100 * self.ratio:g} %, {self.schedule}{concentrated}"


def arms(ratios: list[float], concentrate: float) -> list[Arm]:
    full = [Arm(1.0, "single_pass", recompute) for recompute in ("none", "full")]
    return full + [
        Arm(ratio, schedule, recompute, c)
        for ratio in ratios
        for c in ((0.0, concentrate) if ratio == RATIO and concentrate else (0.0,))
        for schedule, recompute in (("two_pass", "none"), ("two_pass", "full"), ("replay", "full"))
    ]


class Step:
    """The phases of a step on one rollout batch; each can be run as often as one likes."""

    def __init__(self, models: Models, batch):
        self.models, self.batch = models, batch
        self.everything = torch.ones(batch.num_rows, dtype=torch.bool)
        self.reading, _ = models.read(batch)
        self.assigned = batching.assign(
            batch, self.everything, models.layout, models.micro_batch_tokens
        )

    @cached_property
    def teacher_rows(self):
        return self.read()

    @cached_property
    def scored(self):
        """(scores, gap, the layers' outputs)."""
        return self.score("replay")

    @property
    def scores(self):
        return self.scored[0]

    def read(self):
        return self.models.teacher.hidden_states(
            self.reading, self.models.layout, self.assigned.owner
        )

    def score(self, schedule: str):
        return score(
            self.batch, self.assigned, self.models.student, self.models.heads, self.teacher_rows,
            K, keep_outputs=schedule == "replay",
        )  # fmt: skip

    def select(self, ratio: float, concentrate: float = 0.0) -> Tensor:
        if ratio == 1:
            return self.everything
        return select("teachability", self.scores, ratio, 0, concentrate, self.batch.cu_rows)

    def select_and_train(self, arm: Arm) -> None:
        self.train(self.select(arm.ratio, arm.concentrate), arm.schedule, arm.recompute)

    def train(self, mask: Tensor, schedule: str, recompute: str) -> dict[str, float]:
        outputs = None
        if schedule == "replay":  # which uses the lists up
            outputs = [list(micro_batch) for micro_batch in self.scored[2]]
        with self.models.recompute(recompute):
            return backward(
                self.batch, mask, self.assigned, self.models.student, self.models.heads,
                self.teacher_rows, self.models.micro_batch_tokens, {"kind": "reverse_kl"}, outputs,
            )  # fmt: skip


def seconds(run: Callable[[], object]) -> float:
    """Until the last rank is done."""
    platform.synchronize()
    dist.barrier()
    started = time.perf_counter()
    result = run()
    platform.synchronize()
    dist.barrier()
    elapsed = time.perf_counter() - started
    del result
    return elapsed


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"  {text}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------- measuring


def measure(arguments) -> dict:
    """Agreement and memory once, then times, everything taking turns."""
    build_pair = qwen3_slice if arguments.pair == "slice" else pair_on_disk
    models, batch, rollout = build_pair(arguments)
    step = Step(models, batch)
    every = arms(arguments.ratios, arguments.concentrate)
    measured = {
        "setup": {
            **{k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
            "layout": str(models.layout),
            "threads": torch.get_num_threads(),
            "sequences": batch.num_sequences,
            "tokens": int(step.assigned.lengths.sum()),
            "rows": batch.num_rows,
            "chunk_rows": models.heads.chunk_rows,
            "micro_batches": len(step.assigned.micro_batches),
        },
    }
    if rollout is not None:  # the slice has no memory to spare for a second gradient
        measured["agreement"] = agreement(step)
        say(f"agreement: {measured['agreement']}")
    measured["memory"] = memory_of_phases(step)
    measured["arms"] = [asdict(arm) | {"name": str(arm)} | facts(step, arm) for arm in every]
    measured["full_opd_loss"] = step.train(step.everything, "single_pass", "none")["loss"]
    measured["concentration"] = concentration(step)
    measured["heads"] = heads = measure_heads(step)

    # What arms have in common is timed once a repeat.
    timed: dict[tuple, Callable] = {("teacher",): step.read}
    for schedule in ("two_pass", "replay"):
        timed["scoring", schedule] = partial(step.score, schedule)
    for arm in every:
        timed["training", arm] = partial(step.select_and_train, arm)
    for head in heads:
        for what in ("score", "loss"):
            timed["head", what, head["rows"]] = partial(
                run_head, models, what, head["rows"], models.heads.chunk_rows
            )
    if rollout is not None:
        timed |= horizon_phases(step, rollout, measured)
    if not arguments.no_trl and dist.get_world_size() == 1 and find_spec("trl"):
        timed |= trl_phases(step, measured)
    times: dict[tuple, list[float]] = {key: [] for key in timed}
    layers = []
    for repeat in range(arguments.repeats):
        for key, run in timed.items():
            times[key].append(seconds(run))
        layers.append(layer_seconds(step))
        say(f"timed {repeat + 1} of {arguments.repeats}")

    for arm, row in zip(every, measured["arms"], strict=True):
        row["seconds"] = {"teacher": times["teacher",], "training": times["training", arm]}
        if arm.schedule != "single_pass":
            row["seconds"]["scoring"] = times["scoring", arm.schedule]
    for head in heads:
        head["seconds"] = {what: times["head", what, head["rows"]] for what in ("score", "loss")}
    for name in ("horizon", "trl"):
        for row in measured.get(name, ()):
            own = (name, row["name"])
            row["seconds"] = {key[2]: spent for key, spent in times.items() if key[:2] == own}
    measured["layer_seconds"] = {key: [run[key] for run in layers] for key in layers[0]}
    if arguments.pair == "slice":
        measured["extrapolation"] = extrapolate(measured)
    return measured


def agreement(step: Step) -> dict[str, float]:
    """Relative differences of loss and gradient that ought to be rounding."""
    mask, everything = step.select(RATIO), step.everything

    def difference(mask: Tensor, other: str) -> float:
        """Of a replay from another schedule."""
        loss = step.train(mask, other, "none")["loss"]
        buffers = step.models.student.model.buffers
        reference = [buffer.grad_data.clone() for buffer in buffers]
        replayed = step.train(mask, "replay", "full")["loss"]
        pairs = zip(buffers, reference, strict=True)
        apart = sum((buffer.grad_data - one).norm() ** 2 for buffer, one in pairs) ** 0.5
        norm = sum(one.norm() ** 2 for one in reference) ** 0.5
        return max(abs(replayed / loss - 1), float(apart / norm))

    return {
        f"{100 * RATIO:g} %: replay from two_pass": difference(mask, "two_pass"),
        "everything kept: replay from full OPD": difference(everything, "single_pass"),
    }


def metered(run: Callable[[], object]) -> dict[str, int]:
    with peak_memory(platform.device().type) as memory:
        result = run()
    del result
    return {"peak": memory.peak, "temporaries": memory.temporaries}


def memory_of_phases(step: Step) -> dict[str, int]:
    """Peak bytes of the phases before training, results included, and bytes of what they leave;
    bytes of the gradients that training adds to."""
    buffers = step.models.student.model.buffers
    outputs = [output for outputs in step.scored[2] for output in outputs]
    return {
        "teacher": metered(step.read)["peak"],
        "two_pass": metered(partial(step.score, "two_pass"))["peak"],
        "replay": metered(partial(step.score, "replay"))["peak"],
        "teacher_rows": step.teacher_rows.rows.nbytes,
        "kept_outputs": sum(output.nbytes for output in outputs),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
    }


def facts(step: Step, arm: Arm) -> dict:
    """What no clock is needed for: peak memory of the training pass, operations, mass, tokens."""
    batch, models = step.batch, step.models
    mask = step.select(arm.ratio, arm.concentrate)
    trained = batching.cut_lengths(batch, mask)
    operations = step_operations(
        ModelCost.of(models.student.trunk.hf),
        ModelCost.of(models.teacher.trunk.hf),
        scored=step.assigned.lengths,
        read=batching.cut_lengths(step.reading, step.everything),
        trained=trained,
        num_rows=batch.num_rows,
        kept_rows=int(mask.sum()),
        replayed=arm.schedule == "replay",
        recompute=arm.recompute,
    )
    if arm.schedule == "single_pass":
        operations["flops/scoring"], operations["flops/of_full_opd"] = 0.0, 1.0
    selected = selection_metrics("teachability", step.scores, mask, batch.cu_rows, 0)
    # Without the reduction over data-parallel ranks: there is one, and gloo's would still copy all
    # gradients for it.
    config = models.student.config
    with mock.patch.object(config, "finalize_model_grads_func", lambda *_, **__: None):
        memory = metered(partial(step.train, mask, arm.schedule, arm.recompute))["temporaries"]
    say(f"{arm}, recompute {arm.recompute}: {memory / 1e6:,.0f} MB")
    return {
        "training_temporaries": memory,
        "kept_rows": int(mask.sum()),
        "tokens_trained": int(trained.sum()),
        **operations,
        "mass_retained": selected["selection/mass_retained"],
    }


def concentration(step: Step) -> list[dict[str, float]]:
    """What is kept and what is trained at ρ = 10 % as the budget is drawn together."""
    rows = []
    for c in (0.0, 0.2, 0.3, 0.4, 0.5, 0.6):
        mask = step.select(RATIO, c)
        selected = selection_metrics("teachability", step.scores, mask, step.batch.cu_rows, 0)
        names = ("mass_retained", "mass_of_best", "trained_share")
        rows.append({"concentrate": c} | {name: selected[f"selection/{name}"] for name in names})
    return rows


def run_head(models: Models, what: str, rows: int, chunk_rows: int) -> tuple[Tensor, ...]:
    """Both heads on rows of noise: scores, or the loss and the student's gradients; the inputs."""
    heads, dtype = models.heads, models.student.dtype
    student_hidden, teacher_hidden = (
        torch.randn(rows, weight.shape[1], device=weight.device, dtype=dtype)
        for weight in (heads.student, heads.teacher)
    )
    weight = heads.student.detach()
    if what == "score":
        score_hidden(
            student_hidden, weight, teacher_hidden, heads.teacher, K, heads.shard, chunk_rows
        )
    else:
        loss, _ = kept_row_loss(
            "reverse_kl", student_hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden,
            heads.teacher, heads.shard, chunk_rows,
        )  # fmt: skip
        loss.backward()
    return student_hidden, weight, teacher_hidden


def measure_heads(step: Step) -> list[dict]:
    """Temporaries of the loss's heads: on all rows at once and in chunks, on the kept rows."""
    rows, chunk_rows = step.batch.num_rows, step.models.heads.chunk_rows
    measured = []
    for count in (rows, budget(RATIO, rows)):
        loss = partial(run_head, step.models, "loss", count)
        measured.append(
            {
                "rows": count,
                "unchunked": metered(partial(loss, count))["temporaries"],
                "chunked": metered(partial(loss, chunk_rows))["temporaries"],
            }
        )
    return measured


@contextmanager
def decoder_clock(trunk) -> Iterator[dict[str, float]]:
    """Seconds between the first layer's input and the last one's output, forward and backward."""
    spent, started = {"forward": 0.0, "backward": 0.0}, {}

    def start(which: str, *_) -> None:
        platform.synchronize()
        started[which] = time.perf_counter()

    def stop(which: str, *_) -> None:
        platform.synchronize()
        spent[which] += time.perf_counter() - started[which]

    def before(_module, _args, kwargs) -> None:
        if kwargs["hidden_states"].requires_grad:  # its gradient is the last thing computed
            kwargs["hidden_states"].register_hook(partial(stop, "backward"))
        start("forward")

    def after(_module, _args, output) -> None:
        stop("forward")
        if output.requires_grad:
            output.register_hook(partial(start, "backward"))

    hooks = [
        trunk.decoder.register_forward_pre_hook(before, with_kwargs=True),
        trunk.decoder.register_forward_hook(after),
    ]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def layer_seconds(step: Step) -> dict[str, float]:
    """Seconds of a layer per token."""
    models, tokens = step.models, int(step.assigned.lengths.sum())
    with decoder_clock(models.teacher.trunk) as teacher:
        step.read()
    with decoder_clock(models.student.trunk) as student:
        step.train(step.everything, "single_pass", "none")
    layers = {
        name: len(model.trunk.decoder.layers)
        for name, model in (("student", models.student), ("teacher", models.teacher))
    }
    return {
        "teacher forward": teacher["forward"] / layers["teacher"] / tokens,
        "student forward": student["forward"] / layers["student"] / tokens,
        "student backward": student["backward"] / layers["student"] / tokens,
    }


# ------------------------------------------------------------------------------- shorter responses


def horizon_phases(step: Step, rollout, measured: dict) -> dict[tuple, Callable]:
    """The phases of TA-OPD, replayed, with responses in full and cut at what `auto` chooses."""
    longest = measured["setup"]["max_new_tokens"] or rollout.max_new_tokens
    horizon = Horizon("auto", longest, rollout.horizon_floor, rollout.horizon_prompt_weight)
    scores = step.scores
    teachability = learnable_disagreement(scores.disagreement, scores.compatibility)
    horizon.observe(step.batch, teachability, longest)
    phases, measured["horizon"] = {}, []
    for name, length in (("none", longest), ("auto", horizon.length(step=2))):
        batch = step.batch if name == "none" else step.models.generate(length)
        own = step if name == "none" else Step(step.models, batch)
        mask = own.select(RATIO)
        measured["horizon"].append(
            {
                "name": name,
                "length": length,
                "rows": batch.num_rows,
                "kept_rows": int(mask.sum()),
                "mass": float(horizon.mass[:length].sum() / horizon.mass.sum()),
            }
        )
        phases |= {
            ("horizon", name, "rollout"): partial(step.models.generate, length),
            ("horizon", name, "teacher"): own.read,
            ("horizon", name, "scoring"): partial(own.score, "replay"),
            ("horizon", name, "training"): partial(own.train, mask, "replay", "full"),
        }
    return phases


# ---------------------------------------------------------------------------------------- TRL


def trl_phases(step: Step, measured: dict) -> dict[tuple, Callable]:
    """Teacher, loss and backward pass of TRL's DistillationTrainer on the same rollouts."""
    student, teacher = step.models.peers()
    phases, measured["trl"] = {}, []
    for recompute in ("none", "full"):
        run, losses, sequences = trl_step(student, teacher, step.batch, step.models, recompute)
        name = f"recompute {recompute}"
        memory = metered(run)["peak"]
        measured["trl"].append(
            {
                "name": name,
                "recompute": recompute,
                "loss": sum(losses),
                "sequences_at_a_time": sequences,
                "peak": memory,
            }
        )
        say(f"TRL, {name}: loss {sum(losses):.6f}, {memory / 1e6:,.0f} MB")
        phases["trl", name, "step"] = run
    return phases


def trl_step(student, teacher, batch, models: Models, recompute: str):
    """(a function that does the step, the losses of its micro-batches, sequences in one)."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from trl import DistillationConfig, DistillationTrainer

    rollouts = padded(batch)
    width = rollouts["prompt_ids"].shape[1] + rollouts["completion_ids"].shape[1]
    count = batch.num_sequences
    at_once = max(
        n for n in range(1, count + 1)
        if count % n == 0 and (n == 1 or n * width <= models.micro_batch_tokens)
    )  # fmt: skip

    class OnGivenRollouts(DistillationTrainer):
        def _generate_and_score_completions(self, _prompts):
            return dict(rollouts)

    # Nothing is tokenised; the trainer wants to have something that could.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")), pad_token="a", eos_token="a"
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = OnGivenRollouts(
            student,
            teacher,
            DistillationConfig(
                output_dir=folder,
                use_cpu=not torch.cuda.is_available(),
                bf16=False,
                beta=1.0,
                per_device_train_batch_size=at_once,
                gradient_accumulation_steps=count // at_once,
                gradient_checkpointing=recompute == "full",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["a"] * count}),
            processing_class=tokenizer,
        )
    trainer.current_gradient_accumulation_steps = count // at_once
    losses: list[float] = []

    def run() -> list[Tensor]:
        if recompute == "full":
            student.gradient_checkpointing_enable()
        else:
            student.gradient_checkpointing_disable()
        losses.clear()
        for _ in range(count // at_once):
            loss = trainer.training_step(trainer.model, [{}], num_items_in_batch=batch.num_rows)
            losses.append(float(loss))
        gradients = [parameter.grad for parameter in student.parameters()]
        student.zero_grad(set_to_none=True)
        return gradients

    return run, losses, at_once


def padded(batch) -> dict[str, Tensor]:
    """The rollouts as TRL has them: prompts padded on the left, completions on the right."""
    cuts = zip(range(batch.num_sequences), batch.prompt_lengths.tolist(), strict=True)
    prompts, completions = zip(
        *(batch.sequence(i).tensor_split([length]) for i, length in cuts), strict=True
    )
    result = {}
    sides = {"prompt": (prompts, "left"), "completion": (completions, "right")}
    for name, (sequences, side) in sides.items():
        result[f"{name}_ids"] = pad_sequence(sequences, True, 0, side)
        masks = [torch.ones_like(sequence) for sequence in sequences]
        result[f"{name}_mask"] = pad_sequence(masks, True, 0, side)
    result = {name: tensor.to(platform.device()) for name, tensor in result.items()}
    return result | {"num_items_in_batch": torch.tensor(float(batch.num_rows))}


# ---------------------------------------------------------------------------- the models in full


def extrapolate(measured: dict) -> dict:
    """Seconds per token of a Qwen3-4B and a Qwen3-14B in full, from a layer's and a row's."""
    setup = measured["setup"]
    layer = {key: median(values) for key, values in measured["layer_seconds"].items()}
    all_rows = measured["heads"][0]
    costs = {
        "teacher": LAYERS["teacher"] * layer["teacher forward"],
        "forward": LAYERS["student"] * layer["student forward"],
        "backward": LAYERS["student"] * layer["student backward"],
        "score": median(all_rows["seconds"]["score"]) / all_rows["rows"],
        "loss": median(all_rows["seconds"]["loss"]) / all_rows["rows"],
    }
    # Matrices alone, at one operation a second.
    vocab = padded_vocab_size(151936)
    trunk = {
        "student": 2 * LAYERS["student"] * 2560 * (2 * 4096 + 2 * 1024 + 3 * 9728),
        "teacher": 2 * LAYERS["teacher"] * 5120 * (2 * 5120 + 2 * 1024 + 3 * 17408),
    }
    operations = {
        "teacher": trunk["teacher"],
        "forward": trunk["student"],
        "backward": 2 * trunk["student"],
        "score": 2 * vocab * (2560 + 5120),
        "loss": 2 * vocab * (3 * 2560 + 5120),
    }
    shares = {"cut": setup["cut"], "rows_per_token": setup["rows_per_token"]}
    return {
        "layer_seconds": layer,
        "costs": costs,
        **shares,
        "arms": extrapolated_arms(costs, **shares),
        "by_operations": extrapolated_arms(operations, **shares),
    }


def extrapolated_arms(costs: dict[str, float], cut: float, rows_per_token: float) -> list[dict]:
    """By phase, for one token that is rolled out and `rows_per_token` rows."""
    run = {"none": costs["forward"] + costs["backward"]}
    run["full"] = run["none"] + costs["forward"]
    loss = rows_per_token * costs["loss"]
    scoring = costs["forward"] + rows_per_token * costs["score"]
    rows = [
        {"name": "full OPD", "recompute": r, "scoring": 0.0, "training": run[r] + loss} for r in run
    ]
    for schedule, recompute, trained in (
        ("two_pass", "none", run["none"]),
        ("two_pass", "full", run["full"]),
        ("replay", "full", run["none"]),
    ):
        rows.append(
            {
                "name": f"TA-OPD {100 * RATIO:g} %, {schedule}",
                "recompute": recompute,
                "scoring": scoring,
                "training": cut * trained + RATIO * loss,
            }
        )
    for row in rows:
        row["teacher"] = costs["teacher"]
        row["step"] = row["teacher"] + row["scoring"] + row["training"]
    return rows


# -------------------------------------------------------------------------------------- results

REPLAY = f"TA-OPD {100 * RATIO:g} %, replay"


def medians(row: dict) -> dict[str, float]:
    return {phase: median(times) for phase, times in row["seconds"].items()}


def step_seconds(row: dict) -> float:
    return row["step"] if "step" in row else sum(medians(row).values())


def against_full(rows: list[dict], row: dict) -> dict[str, float]:
    """The step's time over full OPD's: with the same recomputation, and in its best form."""
    full = {r["recompute"]: step_seconds(r) for r in rows if r["name"] == "full OPD"}
    own = step_seconds(row)
    return {"÷ same": own / full[row["recompute"]], "÷ best": own / min(full.values())}


def step_memory(measured: dict, row: dict) -> int:
    """Peak of the whole step above the weights: what phases leave for later ones, gradients."""
    memory, schedule = measured["memory"], row["schedule"]
    kept = memory["kept_outputs"] if schedule == "replay" else 0
    scoring = 0 if schedule == "single_pass" else memory[schedule]
    rows = memory["teacher_rows"]
    training = rows + kept + row["training_temporaries"]
    return memory["gradients"] + max(memory["teacher"], rows + scoring, training)


def named(rows: list[dict], name: str, recompute: str = "full") -> dict:
    return next(r for r in rows if r["name"] == name and r["recompute"] == recompute)


def targets(measured: dict) -> Iterator[tuple[str, str, float, float]]:
    """(what, ≤ or ≥, limit, measured)."""
    rows, pair = measured["arms"], measured["setup"]["pair"]
    what, limit, timed = f"{REPLAY}: step", 0.9, rows
    if pair == "slice":
        what, limit, timed = f"{REPLAY}, 4B/14B: step", 0.95, measured["extrapolation"]["arms"]
    ratios = against_full(timed, named(timed, REPLAY))
    yield f"{what} ÷ full OPD's, same recomputation", "≤", limit, ratios["÷ same"]
    yield f"{what} ÷ full OPD's, best form", "≤", limit, ratios["÷ best"]
    all_rows, kept = measured["heads"]
    for form in ("unchunked", "chunked"):
        what = f"head temporaries of the loss: kept rows ÷ all rows, {form}"
        yield what, "≤", 0.15, kept["chunked"] / all_rows[form]
    if pair != "slice":
        cut = max(
            (row for row in measured["concentration"] if row["mass_of_best"] >= 0.9),
            key=lambda row: row["concentrate"],
        )
        what = f"concentrate {cut['concentrate']:g}: response tokens trained"
        yield f"{what}, {cut['mass_of_best']:.0%} of the kept mass", "≤", 0.6, cut["trained_share"]
        full, auto = measured["horizon"]
        what = f"horizon {auto['length']} of {full['length']}: rollout to training"
        ratio = step_seconds(auto) / step_seconds(full)
        yield f"{what}, {auto['mass']:.0%} of the mass", "≤", 0.65, ratio
    for peer in measured.get("trl", ()):
        ours = named(rows, "full OPD", peer["recompute"])
        what = f"full OPD, recompute {peer['recompute']}"
        yield f"{what}: time of TRL's ÷ ours", "≥", 1.5, step_seconds(peer) / step_seconds(ours)
        ratio = step_memory(measured, ours) / peer["peak"]
        yield f"{what}: peak above the weights, ours ÷ TRL's", "≤", 0.5, ratio


def tables(measured: dict) -> Iterator[Table]:
    setup = measured["setup"]
    rows = [
        {
            "scoring": 0.0,
            **row,
            **medians(row),
            "step": step_seconds(row),
            **against_full(measured["arms"], row),
            "FLOP": row["flops/of_full_opd"],
            "tok/s": round(setup["tokens"] / step_seconds(row)),
            "trained": row["tokens_trained"] / setup["tokens"],
            "MB train": round(row["training_temporaries"] / 1e6),
            "MB step": round(step_memory(measured, row) / 1e6),
        }
        for row in measured["arms"]
    ]
    yield table_of(
        f"{setup['pair']}: {setup['sequences']} sequences, {setup['tokens']:,} tokens, "
        f"{setup['rows']:,} rows, {setup['micro_batches']} micro-batches, {setup['layout']}, "
        f"{setup['precision']}, {setup['threads']} threads, median of {setup['repeats']}",
        rows,
        *("name", "recompute", "teacher", "scoring", "training", "step", "÷ same", "÷ best"),
        *("FLOP", "tok/s", "trained", "mass_retained", "MB train", "MB step"),
    )
    yield table_of(
        f"concentrate, at {100 * RATIO:g} %",
        measured["concentration"],
        *("concentrate", "trained_share", "mass_of_best", "mass_retained"),
    )
    heads = [
        {"rows": head["rows"], **{f"MB {k}": head[k] / 1e6 for k in ("unchunked", "chunked")}}
        | medians(head)
        for head in measured["heads"]
    ]
    title = f"heads alone, chunks of {setup['chunk_rows']} rows; memory of the loss, seconds"
    yield table_of(title, heads, "rows", "MB unchunked", "MB chunked", "loss", "score")
    if "horizon" in measured:
        rows = [row | medians(row) | {"all": step_seconds(row)} for row in measured["horizon"]]
        phases = ("rollout", "teacher", "scoring", "training", "all")
        title = f"rollout.horizon, with {REPLAY}; seconds"
        yield table_of(title, rows, "name", "length", "rows", "kept_rows", "mass", *phases)
    if "trl" in measured:
        rows = [
            row | medians(row) | {"MB step": round(row["peak"] / 1e6)} for row in measured["trl"]
        ]
        title = "TRL's DistillationTrainer: teacher, loss and backward pass"
        yield table_of(title, rows, "name", "sequences_at_a_time", "step", "MB step", "loss")
    if "extrapolation" in measured:
        yield from extrapolation_tables(measured["extrapolation"])
    if "agreement" in measured:
        rows = [{"": name, "loss, gradient": x} for name, x in measured["agreement"].items()]
        yield table_of("relative difference", rows, "", "loss, gradient")
    rows = [
        {
            "": what,
            "limit": f"{sign} {limit:g}",
            "measured": value,
            "is": "met" if (value <= limit if sign == "≤" else value >= limit) else "missed",
        }
        for what, sign, limit, value in targets(measured)
    ]
    yield table_of("targets", rows, "", "limit", "measured", "is")


def extrapolation_tables(figures: dict) -> Iterator[Table]:
    layer, costs = figures["layer_seconds"], figures["costs"]
    rows = [
        {"": f"{symbol}: {what}", "layers": layers, "each": 1e6 * each, "all": 1e6 * costs[name]}
        for symbol, what, layers, each, name in (
            ("t", "teacher forward", LAYERS["teacher"], layer["teacher forward"], "teacher"),
            ("f", "student forward", LAYERS["student"], layer["student forward"], "forward"),
            ("b", "student backward", LAYERS["student"], layer["student backward"], "backward"),
            ("s", "both heads, scores", 1, costs["score"], "score"),
            ("l", "both heads, loss", 1, costs["loss"], "loss"),
        )
    ]
    yield table_of("4B and 14B: µs per token, of heads per row", rows, "", "layers", "each", "all")
    pairs = zip(figures["arms"], figures["by_operations"], strict=True)
    phases = ("teacher", "scoring", "training", "step")
    rows = [
        row
        | {phase: 1e6 * row[phase] for phase in phases}
        | against_full(figures["arms"], row)
        | {"FLOP": against_full(figures["by_operations"], counted)["÷ same"]}
        for row, counted in pairs
    ]
    table = table_of(
        "4B and 14B: µs per token", rows, "name", "recompute", *phases, "÷ same", "÷ best", "FLOP"
    )
    cut, share = figures["cut"], figures["rows_per_token"]
    table.caption = (
        f"c = {cut:g} of the tokens trained, r = {share:g} rows per token, ρ = {RATIO:g}. Teacher: "
        "t. Scoring: f + r·s. Training: c·(f + b) + ρ·r·l; two_pass with recomputation c·(2f + b) "
        "+ ρ·r·l. Full OPD: no scoring, c = ρ = 1."
    )
    yield table


def table_of(title: str, rows: list[dict], *columns: str) -> Table:
    table = Table(box=SIMPLE, title=title)
    for name in columns:
        text = isinstance(rows[0][name], str)
        header = name.replace("mass_retained", "mass").replace("_", " ")
        table.add_column(header, justify="left" if text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row[name]) for name in columns))
    return table


def cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


if __name__ == "__main__":
    main()
