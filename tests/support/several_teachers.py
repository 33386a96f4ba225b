"""One step of several teachers on ranks, and the same step in dense float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_taopd.config.schema import LossSection, SelectionSection, TrainSection
from megatron_taopd.data.vocab_map import VocabMap
from support import dense
from support.step import OPTIMIZER, gather_gradients, relative_error, whole_mask

K = 5


@dataclass(frozen=True)
class Taught:
    """A teacher: its checkpoint, its layout (None: served), its ids, and what it reads."""

    path: str
    parallel: tuple | None
    vocab_map: VocabMap
    offload: bool = False


def open_several(student_dir, student_parallel, teachers, prompts, of_prompt, train):
    """The product's step of a student and several teachers, by name, in fp32."""
    from megatron_taopd.formats.output_head import find_head
    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.serving.model import ServedModel
    from megatron_taopd.step.distiller import Distiller
    from megatron_taopd.step.guard import Guard
    from megatron_taopd.step.output_heads import open_all_heads
    from megatron_taopd.teacher.megatron import MegatronTeacher
    from megatron_taopd.teacher.sglang import SGLangTeacher
    from megatron_taopd.teacher.teachers import Teachers
    from support.served_teacher import ServedTeacher

    student = Student(
        student_dir, layouts.student_layout(*student_parallel), torch.float32, train.recompute,
        OPTIMIZER, 100, min(each.vocab_map.size for each in teachers.values()),
    )  # fmt: skip
    engines = {}
    for name, each in teachers.items():
        if each.parallel is None:
            served = None if dist.get_rank() else ServedTeacher(each.path)
            width = find_head(each.path).shape[1]
            model = ServedModel.of(each.path, 128)
            engines[name] = SGLangTeacher(served, model, width, torch.float32)
        else:
            layout = layouts.forward_layout(*each.parallel)
            engines[name] = MegatronTeacher(
                each.path, layout, torch.float32, train.micro_batch_tokens, each.offload
            )
    maps = {name: each.vocab_map for name, each in teachers.items()}
    of_each = [(each.path, each.vocab_map) for each in teachers.values()]
    return Distiller(
        student, Teachers(engines, maps, prompts, of_prompt),
        open_all_heads(student, of_each, 7), Guard(max_skipped=3, loss_spike=0),
        SelectionSection(ratio=0.3, k=K), LossSection(), train,
    )  # fmt: skip


def step_of_several(
    student_dir, student_parallel, teachers, batch, prompts, of_prompt, *,
    scope="batch", mini_batches=1, replay=False, look=None, micro_batch_tokens=40,
):  # fmt: skip
    """Score, select and back-propagate one batch; on every rank the global results."""
    from megatron.core import parallel_state

    from megatron_taopd.parallel import platform
    from megatron_taopd.step.scoring import whole_scores

    platform.emulate_cuda()
    train = TrainSection(
        micro_batch_tokens=micro_batch_tokens,
        mini_batches=mini_batches,
        schedule="replay" if replay else "two_pass",
    )
    try:
        distiller = open_several(student_dir, student_parallel, teachers, prompts, of_prompt, train)
        distiller.selection = replace(distiller.selection, scope=scope)
        student, gradients = distiller.student, []
        before_update = student.step

        def step():
            gradients.append(gather_gradients(student))
            return before_update()

        student.step = step
        lesson = distiller.learn(batch, distiller.read(batch), 0)
        return {
            "scores": whole_scores(lesson.scored),
            "mask": whole_mask(lesson.selection.kept, batch.num_rows),
            "metrics": lesson.selection.metrics | lesson.trained,
            "gradients": gradients[0],
            "look": look and look(distiller, lesson),
        }
    finally:
        parallel_state.destroy_model_parallel()


def dense_step_of_several(student_dir, teachers, batch, prompts, of_prompt, scope="batch"):
    """The same step: whole models, a sequence at a time, each over what its teacher has, too."""

    def logits(dtype):
        student = AutoModelForCausalLM.from_pretrained(student_dir, dtype=dtype)
        models = [
            AutoModelForCausalLM.from_pretrained(each.path, dtype=dtype)
            for each in teachers.values()
        ]
        pairs = []
        for i in range(batch.num_sequences):
            number = int(of_prompt[batch.prompts[i]])
            vocab_map = [*teachers.values()][number].vocab_map
            alone = batch.only(torch.tensor([i]))
            read, _ = vocab_map.read(alone, prompts, 128)
            z_s = student(alone.tokens[None]).logits[0, alone.row_positions]
            with torch.no_grad():
                z_t = models[number](read.tokens[None]).logits[0, read.row_positions]
            common = vocab_map.common
            pairs.append((z_s[:, common], z_t[:, vocab_map.teacher_ids[common]]))
        return student, pairs

    with torch.no_grad():
        _, pairs = logits(torch.float64)
    columns = [
        torch.cat([f(z_s, z_t) for z_s, z_t in pairs])
        for f in (
            lambda z_s, z_t: dense.disagreement(z_s, z_t, K),
            lambda z_s, z_t: dense.compatibility(z_s, z_t, K),
            lambda z_s, z_t: dense.entropy(z_s),
            lambda z_s, z_t: dense.entropy(z_t),
        )
    ]
    d, c, h_s, _ = columns
    whose = of_prompt[batch.prompts].repeat_interleave(batch.response_lengths)
    groups = [torch.ones_like(whose, dtype=torch.bool)]
    if scope == "teacher":
        groups = [whose == number for number in range(len(teachers))]
    mask = torch.zeros(batch.num_rows, dtype=torch.bool)
    for rows in groups:
        scores = dense.selector_scores("teachability", d[rows], c[rows], h_s[rows])
        mask[rows] = dense.select(scores, 0.3)

    def back_propagated(dtype):
        student, pairs = logits(dtype)
        losses = torch.cat([dense.divergence(z_s, z_t, "reverse_kl") for z_s, z_t in pairs])
        losses[mask].mean().backward()
        return losses.detach(), {n: p.grad for n, p in student.named_parameters()}

    losses, exact = back_propagated(torch.float64)
    with dense.in_float32():
        _, plain = back_propagated(torch.float32)
    return {
        "scores": columns,
        "mask": mask,
        "loss": losses[mask].mean().item(),
        "gradients": exact,
        "rounding": relative_error(plain, exact),
        "of": [
            {
                "rows": int((whose == number).sum()),
                "kept_share": mask[whose == number].double().mean().item(),
                "disagreement": d[whose == number].mean().item(),
                "compatibility": c[whose == number].mean().item(),
                "loss": losses[mask & (whose == number)].mean().item(),
            }
            for number in range(len(teachers))
        ],
    }
