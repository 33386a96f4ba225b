"""One step of the method on ranks, and the same step in dense float64, for the tests to compare."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from megatron_taopd.config.schema import (
    LossSection,
    MoeSection,
    OptimizerSection,
    SelectionSection,
    TrainSection,
)
from megatron_taopd.data.vocab_map import VocabMap
from megatron_taopd.types import RolloutBatch, WantedRows
from support import dense
from support.rounding import MULTIPLE

OPTIMIZER = OptimizerSection(
    lr=1e-3, min_lr=None, decay="constant", warmup_steps=0, weight_decay=0.0,
    beta1=0.9, beta2=0.98, eps=1e-8, clip=1.0,
)  # fmt: skip


def make_model(
    path, vocab_size, hidden_size, layers, seed, tied=True, key_value_heads=4, experts=0
):
    """A random Qwen3 checkpoint whose 4 heads and 4 layers allow TP and PP up to 4."""
    sizes = dict(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    config = Qwen3Config(**sizes)
    if experts:
        config = Qwen3MoeConfig(
            **sizes,
            num_experts=experts,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            norm_topk_prob=True,
        )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return str(path)


def make_pair(root):
    """A student of 200 tokens and a teacher of 216, of which these are common."""
    return (
        make_model(root / "student", 200, 32, layers=4, seed=0),
        make_model(root / "teacher", 216, 48, layers=4, seed=1, tied=False),
    )


def train_step(student, seed):
    """With made-up gradients, the same on all layouts and for both copies of tied embeddings; all
    moments move."""
    student.model.zero_grad_buffer()
    for parameter in student.model.parameters():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + parameter.numel())
        parameter.main_grad.copy_(torch.rand(parameter.shape, generator=generator))
    student.step()


def make_batch(vocab_size, num_sequences=12, seed=0) -> RolloutBatch:
    """Random prompts of 2–6 and responses of 1–14 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, n):
        return torch.randint(low, high, (n,), generator=generator)

    prompts, responses = draw(2, 7, num_sequences), draw(1, 15, num_sequences)
    cu_seqlens = torch.nn.functional.pad((prompts + responses).cumsum(0), (1, 0))
    rows = int(responses.sum())
    return RolloutBatch(
        tokens=draw(0, vocab_size, int(cu_seqlens[-1])),
        cu_seqlens=cu_seqlens,
        prompt_lengths=prompts,
        log_probs=torch.randn(rows, generator=generator) - 3,
        truncated=torch.zeros(num_sequences, dtype=torch.bool),
        prompts=torch.arange(num_sequences),
        weight_versions=torch.zeros(rows, dtype=torch.int64),
    )


def with_invalid_tokens(batch, seed=0) -> RolloutBatch:
    """The batch with two fifths of the response tokens invalid, and all of its third response."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(len(batch.log_probs), generator=generator) > 0.4
    first, end = batch.response_lengths.cumsum(0)[1:3].tolist()
    valid[first:end] = False
    return replace(
        batch,
        valid=valid,
        log_probs=batch.log_probs[valid],
        weight_versions=batch.weight_versions[valid],
    )


def step_on_ranks(
    student_dir,
    teacher_dir,
    student_parallel,
    teacher_parallel,
    batch,
    size,
    ratio=0.3,
    micro_batch_tokens=40,
    chunk_rows=7,
    loss=None,
    mask=None,
    steps=1,
    offload=False,
    recompute="none",
    vocab_map=None,
    teacher_prompts=None,
    replay=False,
    moe=None,
):
    """Score, select and back-propagate one batch; on every rank the global results.

    Without a vocab_map, ids below size are the same in both models.

    Returns a dict: scores ([R] each), mask, metrics, gradients by Hugging Face name, and, after
    `steps` optimizer steps on the same batch, the weights and the teacher's fingerprints.
    """
    from megatron.core import parallel_state

    from megatron_taopd.parallel import platform
    from megatron_taopd.step.distiller import Selection
    from megatron_taopd.step.scoring import whole_scores

    platform.emulate_cuda()
    vocab_map = vocab_map or VocabMap(torch.arange(size))
    train = TrainSection(
        micro_batch_tokens=micro_batch_tokens,
        schedule="replay" if replay else "two_pass",
        recompute=recompute,
    )
    try:
        distiller = open_distiller(
            (student_dir, student_parallel), (teacher_dir, teacher_parallel), vocab_map, train,
            chunk_rows, offload, MoeSection(**(moe or {})),
        )  # fmt: skip
        distiller.selection = SelectionSection(ratio=ratio, k=5)
        distiller.loss = LossSection(**(loss or {}))
        if mask is not None:
            given = WantedRows.known(batch, mask.nonzero()[:, 0])
            distiller.select = lambda scored, seed: Selection(None, given, {})
        distiller.teachers.prompts = teacher_prompts
        student, teacher = distiller.student, distiller.teachers[0]
        before_update, gradients = student.step, []

        def step():
            gradients.append(gather_gradients(student) if not gradients else None)
            return before_update()

        student.step = step
        fingerprint = teacher.fingerprint()
        lessons = [distiller.learn(batch, distiller.read(batch), 0) for _ in range(steps)]
        first = lessons[0]
        return {
            "scores": whole_scores(first.scored),
            "mask": whole_mask(first.selection.kept, batch.num_rows),
            "metrics": first.trained,
            "gap": first.scored.gap,
            "grad_norm": first.trained["grad_norm"],
            "gradients": gradients[0],
            "weights": dict(student.named_tensors()),
            "fingerprints": (fingerprint, teacher.fingerprint()),
            "layout": str(student.layout),
        }
    finally:
        parallel_state.destroy_model_parallel()


def whole_mask(kept, num_rows):
    """[R] bool: the kept rows that any rank knows of."""
    mask = torch.zeros(num_rows, dtype=torch.uint8)
    mask[kept.ids] = 1
    dist.all_reduce(mask, op=dist.ReduceOp.MAX)
    return mask.bool()


def open_distiller(student, teacher, vocab_map, train, chunk_rows=7, offload=False, moe=None):
    """The product's step on two checkpoints in fp32, (directory, layout) each."""
    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.step.distiller import Distiller
    from megatron_taopd.step.guard import Guard
    from megatron_taopd.step.output_heads import open_heads
    from megatron_taopd.teacher.megatron import MegatronTeacher
    from megatron_taopd.teacher.teachers import Teachers

    student_dir, student_parallel = student
    teacher_dir, teacher_parallel = teacher
    model = Student(
        student_dir, layouts.student_layout(*student_parallel), torch.float32, train.recompute,
        OPTIMIZER, 100, vocab_map.size, moe,
    )  # fmt: skip
    reader = MegatronTeacher(
        teacher_dir, layouts.forward_layout(*teacher_parallel), torch.float32,
        train.micro_batch_tokens, offload,
    )  # fmt: skip
    heads = open_heads(model, teacher_dir, vocab_map, chunk_rows)
    guard = Guard(max_skipped=3, loss_spike=0)
    teachers = Teachers({"teacher": reader}, {"teacher": vocab_map})
    return Distiller(model, teachers, heads, guard, SelectionSection(), LossSection(), train)


def gather_gradients(student):
    """Whole gradients by Hugging Face name. The distributed optimizer leaves each data-parallel
    rank only its share of every bucket reduced, so the shares are gathered first."""
    from megatron_taopd.models import weights

    groups = student.layout.groups
    model = student.model
    for buffers, group in (
        (model.buffers, groups.dp_cp),
        (model.expert_parallel_buffers, groups.expt_dp),
    ):
        for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
            share = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, share, group=group)
    exported = weights.export_weights(
        student.trunk, lambda p: p.main_grad.clone() if p.requires_grad else torch.zeros_like(p)
    )
    return dict(exported)


def row_logits(
    student_dir,
    teacher_dir,
    batch,
    size,
    vocab_map=None,
    teacher_prompts=None,
    dtype=torch.float64,
):
    """Logits of both models at all response rows, whole models, a sequence at a time, for the
    tokens that both models have; and the student."""
    vocab_map = vocab_map or VocabMap(torch.arange(size))
    valid = slice(None) if batch.valid is None else batch.valid
    batch = replace(batch, valid=None)  # every response token has a row, and then some are dropped
    teacher_inputs, _ = vocab_map.read(batch, teacher_prompts, 128)
    columns = vocab_map.common, vocab_map.teacher_ids[vocab_map.common]
    student = AutoModelForCausalLM.from_pretrained(
        student_dir, dtype=dtype, experts_implementation="eager"
    )
    teacher = AutoModelForCausalLM.from_pretrained(
        teacher_dir, dtype=dtype, experts_implementation="eager"
    )
    student_logits, teacher_logits = [], []
    for i in range(batch.num_sequences):
        rows = slice(*batch.cu_rows[i : i + 2].tolist())
        logits = student(batch.sequence(i)[None]).logits[0, batch.row_positions[rows]]
        student_logits.append(logits[:, columns[0]])
        with torch.no_grad():
            logits = teacher(teacher_inputs.sequence(i)[None]).logits[
                0, teacher_inputs.row_positions[rows]
            ]
        teacher_logits.append(logits[:, columns[1]])
    return torch.cat(student_logits)[valid], torch.cat(teacher_logits)[valid], student


def dense_gradients(loss, *models_and_batch, **vocabularies):
    """`loss(student's logits, teacher's)` of whole models in float64: its value, its gradients by
    name, and the relative error of what float32 makes of them, done the same way."""

    def back_propagated(dtype):
        z_s, z_t, student = row_logits(*models_and_batch, **vocabularies, dtype=dtype)
        value = loss(z_s, z_t)
        value.backward()
        return value.item(), gradients_by_name(student)

    value, exact = back_propagated(torch.float64)
    with dense.in_float32():
        _, plain = back_propagated(torch.float32)
    return value, exact, relative_error(plain, exact)


def gradients_by_name(model):
    """Gradients by the names of a checkpoint, where each expert's projections are apart."""
    named = {}
    for name, parameter in model.named_parameters():
        prefix, experts, projection = name.partition("mlp.experts.")
        if projection == "gate_up_proj":
            for expert, gate_up in enumerate(parameter.grad):
                gate, up = gate_up.split(len(gate_up) // 2)
                named[f"{prefix}{experts}{expert}.gate_proj.weight"] = gate
                named[f"{prefix}{experts}{expert}.up_proj.weight"] = up
        elif projection == "down_proj":
            for expert, down in enumerate(parameter.grad):
                named[f"{prefix}{experts}{expert}.down_proj.weight"] = down
        else:
            named[name] = parameter.grad
    return named


def relative_error(gradients, expected) -> float:
    """Worst over tensors of |g − e| / |e| in the Frobenius norm, and none missing."""
    assert gradients.keys() == expected.keys()
    return max(
        ((gradients[n].double() - e.double()).norm() / e.double().norm()).item()
        for n, e in expected.items()
    )


def assert_gradients(gradients, expected, rounding: float) -> None:
    """See that they differ by no more than a few times that relative error."""
    error = relative_error(gradients, expected)
    assert error <= MULTIPLE * rounding, (error, rounding)


def dense_step(
    student_dir, teacher_dir, batch, size, ratio=0.3, mask=None, loss=None, **vocabularies
):
    """The same step in float64: no cuts, no packing, no shards."""
    given = student_dir, teacher_dir, batch, size
    with torch.no_grad():
        z_s, z_t, _ = row_logits(*given, **vocabularies)
    d, c = dense.disagreement(z_s, z_t, 5), dense.compatibility(z_s, z_t, 5)
    h_s, h_t = dense.entropy(z_s), dense.entropy(z_t)
    vocab_map = vocabularies.get("vocab_map") or VocabMap(torch.arange(size))
    valid = torch.ones(len(batch.response_tokens())).bool() if batch.valid is None else batch.valid
    tokens = batch.response_tokens()[valid]
    log_q = torch.full((len(tokens), size), -torch.inf, dtype=torch.float64)
    log_q[:, vocab_map.common] = dense.log_probs(z_t)
    log_p = torch.full_like(log_q, -torch.inf)
    log_p[:, vocab_map.common] = dense.log_probs(z_s)
    log_p, log_q = (v.gather(1, tokens[:, None])[:, 0] for v in (log_p, log_q))
    if mask is None:
        mask = dense.select(dense.selector_scores("teachability", d, c, h_s), ratio)
    loss = {"kind": "reverse_kl", "weights": "none", "gamma": 0.5} | (loss or {})
    weights = torch.ones(len(tokens), dtype=torch.float64)
    if loss["weights"] == "discrepancy":
        lengths = [int(own.sum()) for own in valid.split(batch.response_lengths.tolist())]
        weights = dense.discrepancy_weights(log_p, log_q, lengths, loss["gamma"])

    def weighted_mean(z_s, z_t):
        losses = dense.divergence(z_s[mask], z_t[mask], loss["kind"])
        return (weights[mask].to(losses.dtype) * losses).sum() / weights[mask].sum()

    value, gradients, rounding = dense_gradients(weighted_mean, *given, **vocabularies)
    return {
        "scores": (d, c, h_s, h_t, log_q),
        "mask": mask,
        "loss": value,
        "weights": weights,
        "gradients": gradients,
        "rounding": rounding,
        "grad_norm": torch.stack([g.norm() for g in gradients.values()]).norm().item(),
    }
