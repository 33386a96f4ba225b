"""A student and a teacher of any size as one rank of many has them, without memory and peers.

    python fake_ranks.py STUDENT_DIR TEACHER_DIR '{"world_size": 64, "ranks": [0, 63], …}'

The process group is torch's fake one, whose collectives do nothing, and every tensor is on the meta
device; models, buffers and optimizer are Megatron's own. Prints a JSON list, one object per rank. A
process of its own, because neither the group nor the device could be shared with anything else.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_taopd.parallel import platform

OPTIMIZER = SimpleNamespace(
    lr=1e-6, min_lr=None, decay="constant", warmup_steps=0, weight_decay=0.0,
    beta1=0.9, beta2=0.98, eps=1e-8, clip=1.0,
)  # fmt: skip


def on_meta_device() -> None:
    """Let "cuda" be the meta device in what Megatron builds, and all its groups fake ones."""
    platform.emulate_cuda()
    create = dist.new_group

    def new_group(ranks=None, **options):
        return create(ranks, **{**options, "backend": "fake"})

    dist.new_group = dist.distributed_c10d.new_group = new_group
    platform.device = torch.cuda.current_device = lambda: torch.device("meta")
    plain = torch.Tensor.type

    def as_cuda(tensor, *args, **kwargs):
        if args or kwargs or not tensor.is_meta:
            return plain(tensor, *args, **kwargs)
        return {
            torch.bfloat16: "torch.cuda.BFloat16Tensor",
            torch.float32: "torch.cuda.FloatTensor",
        }[tensor.dtype]

    torch.Tensor.type = as_cuda


def measure(student_dir, teacher_dir, rank, world_size, student, teacher, dtype) -> dict:
    from megatron.core import parallel_state

    import megatron_taopd.models.student as module
    from megatron_taopd.formats.hf import load_config
    from megatron_taopd.models import gpt, weights
    from megatron_taopd.parallel.layout import forward_layout, student_layout

    weights.load_weights = lambda *_: None
    plain = module.DistributedDataParallelConfig
    module.DistributedDataParallelConfig = lambda **options: plain(
        **{**options, "overlap_grad_reduce": True}  # as on CUDA
    )
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        layout = student_layout(**student)
        built = module.Student(student_dir, layout, dtype, "none", OPTIMIZER, 10, 1)
        (distributed,) = built.optimizer.chained_optimizers
        distributed.init_state_fn(distributed.optimizer, distributed.config)
        states = [t for s in distributed.optimizer.state.values() for t in s.values()]
        for group in distributed.shard_fp32_from_float16_groups:
            states += group
        hf = load_config(teacher_dir)
        own = forward_layout(**teacher)
        trunk = gpt.Trunk(hf, gpt.transformer_config(hf, own, dtype), own, head=False)
        for tensor in (*built.trunk.parameters(), *states, *trunk.parameters()):
            assert tensor.is_meta
        return {
            "stage": layout.pp_rank,
            "dp_rank": layout.dp_rank,
            "teacher_stage": own.pp_rank,
            "weights": sum(p.nbytes for p in built.trunk.parameters()),
            "gradients": sum(b.grad_data.nbytes for b in built.model.buffers),
            "weight_buffer": sum(b.param_data.nbytes for b in built.model.buffers),
            "states": sum(t.nbytes for t in states),
            "teacher": sum(p.nbytes for p in trunk.parameters()),
            "buckets": sum(len(b.buckets) for b in built.model.buffers),
        }
    finally:
        module.DistributedDataParallelConfig = plain
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def main() -> None:
    student_dir, teacher_dir, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    dtype = getattr(torch, options.pop("dtype"))
    ranks = options.pop("ranks")
    on_meta_device()
    print(json.dumps([measure(student_dir, teacher_dir, r, dtype=dtype, **options) for r in ranks]))


if __name__ == "__main__":
    main()
