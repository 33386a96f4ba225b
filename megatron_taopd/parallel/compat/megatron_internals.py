"""Private parts of Megatron-core, written for version 0.16."""

from __future__ import annotations

import inspect
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

Bucket = tuple[str, list[tuple[WriteItem, Any]]]  # a file's name, and what goes into it


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's plan of which rank writes what, without the writing."""

    def _get_save_and_finalize_callbacks(self, writer, planned, *_):
        self.writer, self.metadata = writer, planned[1]
        return self

    def execute_sync(self) -> None:
        """Do nothing where Megatron's `save` writes."""


@dataclass
class SavePlan:
    """The part of a checkpoint that this rank is to write.

    Attributes:
        transforms: see `torch_internals.write_item`.
    """

    transforms: Any
    _writer: filesystem_async.FileSystemWriterAsync
    _metadata: Metadata | None  # on rank 0

    def finish(self, results: list[list[WriteResult]]) -> None:
        """Write, on rank 0, which tensor lies where in the files of all ranks.

        Args:
            results: by rank, what `torch_internals.write_item` returned.

        Raises:
            OSError: the disk is full, say.
        """
        self._writer.finish(self._metadata, results)


def plan_save(
    sharded: dict, directory: Path, copy: Callable[[list[tuple[Tensor, bool]]], list[Tensor]]
) -> tuple[SavePlan, list[Bucket], dict]:
    """Plan a distributed checkpoint and copy this rank's part of it; no file is touched.

    Megatron's own asynchronous save forks processes from one that has threads of its own, and takes
    no checksums. So only its plan is taken, which it returns nowhere.

    Args:
        sharded: the state, with Megatron's sharded tensors.
        copy: returns what is to be written of tensors; told of each whether the memory is the
            state's own, or has been copied by Megatron.

    Returns:
        The plan, the files with their contents, and the state that is no tensor, which rank 0
        writes.

    Collectives: a gather of the plan (some 300 bytes a tensor and rank) to rank 0, and its scatter.
    """
    tensors, common = save_preprocess(sharded)
    filesystem_async._results_queue = queue.Queue()  # or Megatron starts a process to have one
    plan = _Plan("torch_dist", 1)
    plan.save(tensors, directory)
    writer = plan.writer
    own = {
        t.data.untyped_storage().data_ptr()
        for t in nested_values(tensors)
        if isinstance(t, ShardedTensor)
    }
    planned = [(name, *contents) for _path, name, contents in writer.write_buckets]
    tensors = [tensor for _name, _objects, items in planned for _item, tensor in items]
    copies = iter(copy([(t, t.untyped_storage().data_ptr() in own) for t in tensors]))
    buckets = [
        (name, objects + [(item, next(copies)) for item, _tensor in items])
        for name, objects, items in planned
    ]
    writer.write_buckets = None  # it would keep the state's tensors alive
    return SavePlan(writer.transforms, writer, plan.metadata), buckets, common


def allocate_moments(distributed: Any) -> None:
    """Give a distributed optimizer zero moments, which it has only after its first update.

    Megatron does so itself, by this function, but only where it loads its own checkpoints.
    """
    distributed.init_state_fn(distributed.optimizer, distributed.config)


def owned_states(distributed: Any) -> Iterator[tuple[Tensor, slice, dict[str, Tensor]]]:
    """Yield what a distributed optimizer owns: of each parameter a range of its elements.

    Yields:
        The model's parameter; the range of its flattened elements; their state by name, each 1-D
        and fp32, and the optimizer's own memory: `param` and Adam's two moments. Its count of
        updates is left out.
    """
    for buffers in distributed.gbuf_ranges:
        for buckets in buffers.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    states = distributed._get_main_param_and_optimizer_states(parameter)
                    states = {name: t.detach() for name, t in states.items() if name != "step"}
                    yield parameter, slice(ranges["param"].start, ranges["param"].end), states


def publish_masters(distributed: Any) -> None:
    """Round the fp32 weights that a distributed optimizer owns into the model's, as a step does."""
    distributed._copy_main_params_to_model_params()


class HiddenStatesModel(GPTModel):
    """A GPTModel whose last stage returns the normed hidden states instead of logits or a loss.

    No option of Megatron's does that while the output projection, with its place in checkpoints and
    in tied gradients, stays. Everything after the last layer is in this method.
    """

    def _postprocess(self, hidden_states: Tensor, *_, **__) -> Tensor:
        return hidden_states


def define_missing_names() -> None:
    """Define a name that routers ask for, and that there is only with TransformerEngine.

    `moe_utils` compares te_general_gemm with None without having imported it. (As of 0.16.)
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def count_routed_tokens_ahead() -> None:
    """Let experts get their tokens without the host, which knows how many there are in all.

    Megatron picks them by a mask, once with and once without their probabilities, and after a mask
    the host has to be told what it left. TransformerEngine's kernel for it is another choice. From
    version 0.17 on, Megatron sorts instead.
    """
    if ".masked_select(" in inspect.getsource(moe_utils.permute):
        token_dispatcher.permute = _permute


def _permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | Tensor | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    if fused or drop_and_pad or not isinstance(num_out_tokens, int):
        return moe_utils.permute(tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad)
    routed = routing_map.T.flatten()  # by expert
    places = torch.nonzero_static(routed, size=num_out_tokens).squeeze(1)
    if probs is not None:
        probs = probs.T.flatten().index_select(0, places)
    rows = places % len(tokens)
    return tokens.index_select(0, rows), probs, rows


def accumulates_gradients() -> bool:
    """Tell whether Megatron's own linear layers can add gradients to the buffer in the matmul.

    Apex has the kernel; Megatron looks for it at its import.
    """
    return layers._grad_accum_fusion_available


def let_engine_accumulate() -> None:
    """Let layers of TransformerEngine add gradients to the buffer in the matmul, without Apex.

    TransformerEngine has kernels of its own. The one layer of a trunk that is Megatron's even so,
    the output projection, would refuse without Apex's; its forward pass is never run.
    """
    layers._grad_accum_fusion_available = True


def keep_norms_on_the_device() -> None:
    """Let the gradient norm without TransformerEngine and Apex be taken on the device.

    Megatron's own stand-in for their kernel has the host wait for each parameter's norm.
    """
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm


def _l2_norm(_chunk: int, _noop_flag: Tensor, tensor_lists: list, _each: bool) -> tuple:
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensor_lists[0]]
    return torch.linalg.vector_norm(torch.stack(norms))[None], None


def keep_norm_before_router(layer: ModuleSpec) -> None:
    """Let a layer without TransformerEngine save the norm before its router under its own name.

    Megatron renames it as if it were fused into the dense MLP. TransformerEngine fuses no norm into
    a router, and checkpoints have its names.
    """
    del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
