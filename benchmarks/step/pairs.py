"""The pairs of models that a step is measured on, and their rollouts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from megatron_taopd import config as configuration
from megatron_taopd.config.schema import OptimizerSection
from megatron_taopd.data.prompts import PromptStream, load_prompts
from megatron_taopd.data.vocab_map import VocabMap, Vocabulary
from megatron_taopd.formats.hf import DTYPES
from megatron_taopd.models import weights
from megatron_taopd.models.student import Student
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.layout import forward_layout, student_layout
from megatron_taopd.rollout.engine import Sampling, make_rollout_batch
from megatron_taopd.rollout.local import LocalEngine
from megatron_taopd.step.output_heads import OutputHeads, open_heads
from megatron_taopd.teacher.megatron import MegatronTeacher

ROOT = Path(__file__).parents[2]
CONFIGS = {"tiny": "tiny_pair.yaml", "smollm2": "smollm2.yaml"}
RATIO = 0.1  # that the targets are set for
K = 16
LAYERS = {"student": 36, "teacher": 40}  # of Qwen3-4B and Qwen3-14B
OPTIMIZER = OptimizerSection(warmup_steps=0, weight_decay=0.0)


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
    vocab_map: VocabMap
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

    @contextmanager
    def without_gradients(self) -> Iterator[None]:
        """Memory for a peer that has gradients of its own."""
        self.student.model.offload_grad_buffers()
        try:
            yield
        finally:
            self.student.model.restore_grad_buffers()


def build(paths: dict, vocab_map, arguments, generate=None, teacher_head=None, peers=None):

    dtype, tp = DTYPES[arguments.precision], dist.get_world_size()
    student = Student(
        paths["student"], student_layout(tp, 1), dtype, "full", OPTIMIZER, 1,
        vocab_map.size,
    )  # fmt: skip
    tokens = arguments.micro_batch_tokens
    teacher = MegatronTeacher(paths["teacher"], forward_layout(tp, 1), dtype, tokens)
    chunk_rows = student.rows_within(arguments.head_memory_mib)
    if teacher_head is None:
        heads = open_heads(student, paths["teacher"], vocab_map, chunk_rows)
    else:
        shard = student.trunk.vocab_shard(vocab_map.size, vocab_map.absent)
        heads = OutputHeads(student.head_weight, teacher_head(teacher), shard, chunk_rows)
    return Models(
        student,
        teacher,
        heads,
        vocab_map,
        generate,
        peers or partial(peers_on_disk, paths, dtype),
        tokens,
    )


def pair_on_disk(arguments):
    """Models and rollouts of one of the examples' configurations."""
    config = configuration.load(ROOT / "examples" / CONFIGS[arguments.pair])
    paths = {"student": config.student.path, "teacher": config.teacher.path}
    vocabularies = {name: Vocabulary.from_pretrained(path) for name, path in paths.items()}
    student = vocabularies["student"].ending_at(config.rollout.stop_token_ids)
    vocab_map = VocabMap.between(student, vocabularies["teacher"])
    prompts = load_prompts(config.data.prompts, student.tokenizer, config.data)
    indices = PromptStream(len(prompts), config.run.seed).take(arguments.prompts)
    engine = LocalEngine.from_hf(
        paths["student"], DTYPES[arguments.precision], platform.device(), seed=config.run.seed,
        rank=dist.get_rank(), world_size=dist.get_world_size(), vocab_size=vocab_map.size,
        eos_token_ids=student.eos_token_ids,
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
    versions = [torch.zeros(longest, dtype=torch.int64) for _ in prompts]
    batch = make_rollout_batch(
        prompts, range(len(prompts)), responses, log_probs, [True] * len(prompts), versions
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
