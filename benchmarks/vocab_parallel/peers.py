"""Other projects' own functions, which need no more of their packages than is imported here."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib import import_module, metadata
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.vocab_parallel.problem import Problem, Setup


@dataclass(frozen=True)
class Peer:
    """A package of another project, and its modules that have the function."""

    distribution: str
    modules: tuple[str, ...]
    on_megatron: bool = False

    def absence(self, setup: Setup) -> str | None:
        """Say why the function cannot be called here; None if it can."""
        try:
            metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return f"{self.distribution} is not installed"
        try:
            for module in self.modules:
                import_module(module)
        except ImportError as error:
            return f"{self.distribution} does not import: {error}"
        return None


class Compiler:
    """torch.compile, which writes C++ for the CPU."""

    on_megatron = False

    def absence(self, setup: Setup) -> str | None:
        """Say that nothing is compiled here; torch itself would say so of a compiler alone."""
        for switch in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
            if os.environ.get(switch) == "1":
                return f"{switch} is set"
        compiler = os.environ.get("CXX", "g++")
        if setup.device == "cpu" and shutil.which(compiler) is None:
            return f"no C++ compiler: {compiler}"
        return None


TRL = Peer("trl", ("trl.experimental.gkd", "trl.kernels.chunked_divergence"))
LIGER = Peer("liger_kernel", ("liger_kernel.chunked_loss",))
MS_SWIFT = Peer(
    "ms-swift",
    ("swift.rlhf_trainers.gkd_loss", "swift.megatron.trainers.vocab_parallel_utils"),
    on_megatron=True,
)
COMPILER = Compiler()
VERL = Peer("verl", ("verl.trainer.distillation.megatron.losses",), on_megatron=True)


# --- one rank; beta = 1 is the reverse KL


def trl_loss(p: Problem) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(*p.logits(), beta=1.0)


def trl_chunked_loss(p: Problem) -> Tensor:
    """What TRL's DistillationTrainer calls, with its own chunks (4096 rows × 32768 columns)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = (p.student_hidden, p.student_weight), (p.teacher_hidden, p.teacher_weight)
    divergence, _ = ChunkedDivergenceFunction.apply(*student, None, *teacher, None, 1.0)
    return divergence.mean()


def liger_loss(p: Problem) -> Tensor:
    """Run Liger's loss with its own chunks (1024 rows), compiled on CUDA, which is its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=p.student_hidden.is_cuda
    )
    labels = torch.zeros(p.num_rows, dtype=torch.long, device=p.student_hidden.device)
    student, teacher = (p.student_hidden, p.student_weight), (p.teacher_hidden, p.teacher_weight)
    return loss(*student, *teacher, labels)


# --- on Megatron's tensor-parallel group


def start_megatron(tp: int) -> None:
    """Let Megatron's groups be those of the benchmark: all ranks are one tensor-parallel group."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)


def ms_swift_loss(p: Problem) -> Tensor:
    """Run what its Megatron trainer's `loss_func` does, with its own chunks (512 rows)."""
    from swift.megatron.trainers import vocab_parallel_utils
    from swift.rlhf_trainers.gkd_loss import TeacherOutput, gkd_loss

    student, teacher = (logits[None] for logits in p.logits())
    labels = torch.zeros(student.shape[:2], dtype=torch.long, device=student.device)
    total, rows = gkd_loss(
        student, TeacherOutput(full_logits=teacher, labels=labels), labels,
        beta=1.0, temperature=1.0,
        log_softmax_fn=vocab_parallel_utils.vocab_parallel_log_softmax,
        kl_div_fn=vocab_parallel_utils.vocab_parallel_kl_div,
    )  # fmt: skip
    return total / rows


def verl_loss(p: Problem) -> Tensor:
    """Run its logits processor for Megatron, without its bound on log-probabilities.

    The teacher's top K come from a server there, and are given here.
    """
    from verl.trainer.distillation.megatron.losses import compute_forward_kl_topk

    ids, log_probs = (torch.nested.as_nested_tensor([x], layout=torch.jagged) for x in p.reported)
    losses = compute_forward_kl_topk(
        (p.student_hidden @ p.student_weight.t())[None],
        teacher_topk_log_probs=log_probs,
        teacher_topk_ids=ids,
        config=SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=None)),
        data_format="thd",
    )
    return losses["distillation_losses"].mean()
