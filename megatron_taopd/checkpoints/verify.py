"""Whether a Hugging Face directory and a Megatron checkpoint are the same model."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.formats import hf_map
from megatron_taopd.formats.convert import Advance, rank_and_size, read_config, share
from megatron_taopd.formats.hf import HFCheckpoint, load_model, whole_shapes
from megatron_taopd.formats.megatron import MegatronCheckpoint, find_keys
from megatron_taopd.parallel.objects import gather


@dataclass
class Comparison:
    """Two checkpoints, tensor by tensor, over all ranks.

    Attributes:
        tensors, bytes: compared.
        different: how many differ in any bit.
        first: the first one of them, front to back.
        largest: |difference| of all elements; inf where one is not a number.
    """

    tensors: int = 0
    bytes: int = 0
    different: int = 0
    first: str | None = None
    largest: float = 0.0


def compare_tensors(hf_dir: str | Path, megatron_dir: str | Path, advance: Advance) -> Comparison:
    """Compare every tensor of both checkpoints bit for bit. Every rank calls this.

    Args:
        advance: told the bytes of each tensor that this rank has compared, and of all of them.

    Raises:
        ValueError: either checkpoint is damaged, or they are not of one architecture.

    Collectives: an all-gather of the ranks' comparisons.
    """
    hf = read_config(hf_dir)
    ours, theirs = HFCheckpoint(hf_dir), MegatronCheckpoint(megatron_dir)
    ours.check(hf)
    parameters = hf_map.parameters(hf)
    keys = find_keys(theirs, hf, parameters)
    shapes = whole_shapes(hf, parameters)
    sizes = [prod(shapes[name]) * theirs.dtype(keys[name][0]).itemsize for name in parameters]
    mine = Comparison()
    my_parameters, to_do = share(list(parameters.values()), sizes, *rank_and_size())
    for parameter in my_parameters:
        split = parameter.mapping.split(theirs.read(*keys[parameter.name]), hf)
        for name, other in zip(parameter.mapping.names, split, strict=True):
            tensor = ours[name]
            mine.tensors += 1
            mine.bytes += tensor.nbytes
            if not _same_bits(tensor, other):
                mine.different += 1
                mine.first = mine.first or name
                difference = (tensor.double() - other.double()).abs().max().item()
                mine.largest = max(mine.largest, difference if difference >= 0 else torch.inf)
            advance(tensor.nbytes, to_do)
    everyone = gather(mine)
    return Comparison(
        tensors=sum(c.tensors for c in everyone),
        bytes=sum(c.bytes for c in everyone),
        different=sum(c.different for c in everyone),
        first=next((c.first for c in everyone if c.first), None),
        largest=max(c.largest for c in everyone),
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype:
        return False
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return torch.equal(a.view(integers), b.contiguous().view(integers))


def check_layout(hf_dir: str | Path, tp: int = 1, pp: int = 1, ep: int = 1) -> None:
    """Raise ValueError unless the model, and the ranks that are there, divide by a layout."""
    from megatron_taopd.parallel.layout import data_parallel_size

    hf_map.check_layout(read_config(hf_dir), hf_dir, tp, pp, ep)
    data_parallel_size(tp, pp, ep)


def compare_logits(
    hf_dir: str | Path,
    megatron_dir: str | Path,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    dtype: torch.dtype = torch.float32,
    tokens: int = 64,
) -> tuple[float, float]:
    """Return (largest |difference|, largest |logit|) of a forward pass on both sides.

    transformers runs on rank 0, on the CPU, and is gone before Megatron loads the checkpoint, with
    its own loader, into a model of this layout. Needs a process group (`platform.initialize`).

    Args:
        tokens: random ones, in two packed sequences.

    Raises:
        ValueError: the model or the number of ranks does not divide by the layout.
    """
    # Megatron, which a comparison of bits does without.
    from megatron_taopd.data.batching import MicroBatch
    from megatron_taopd.models import gpt
    from megatron_taopd.models.student import FrozenStudent
    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.layout import student_layout

    hf = read_config(hf_dir)
    hf_map.check_layout(hf, hf_dir, tp, pp, ep)
    layout = student_layout(tp, pp, ep=ep)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(hf.vocab_size, (tokens,), generator=generator)
    lengths = [tokens - tokens // 3, tokens // 3]

    expected = torch.empty(tokens, hf.vocab_size)
    if dist.get_rank() == 0:
        reference = load_model(hf_dir, dtype)
        with torch.no_grad():
            parts = [reference(input_ids=part[None]).logits[0] for part in ids.split(lengths)]
        expected = torch.cat(parts).float()
        del reference
    expected = expected.to(platform.device())
    dist.broadcast(expected, src=0)

    model = FrozenStudent(hf_dir, layout, dtype, hf.vocab_size, megatron=megatron_dir)
    rows = torch.arange(tokens)
    packed = MicroBatch(
        tokens=ids,
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        sequences=(0, 1),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        rows=rows,
        row_ids=rows,
        targets=torch.zeros_like(rows),
    )

    def logits(micro_batch: MicroBatch, hidden_states: Tensor) -> Tensor:
        rows = gpt.pick_rows(hidden_states, micro_batch.rows, layout)
        return (rows @ model.head_weight.T).float()

    worst = torch.zeros(2, dtype=torch.float64, device=platform.device())
    for shard in model.forward([packed], logits):
        start = layout.tp_rank * shard.shape[1]
        columns = expected[:, start : start + shard.shape[1]]
        shard = shard[:, : columns.shape[1]]
        if shard.numel():
            worst[0] = (shard - columns).abs().max().nan_to_num(torch.inf)
            worst[1] = columns.abs().max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    difference, largest = worst.tolist()
    return difference, largest
