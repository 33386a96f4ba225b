"""The teacher's trunk in a layout of its own: forward only, tokens in, hidden states out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.data import batching
from megatron_taopd.data.batching import Placement
from megatron_taopd.formats.hf import load_config
from megatron_taopd.formats.hf_map import longest_sequence
from megatron_taopd.models import gpt, weights
from megatron_taopd.models.average import WeightAverage
from megatron_taopd.models.pipeline import forward
from megatron_taopd.parallel import platform, watchdog
from megatron_taopd.parallel.copies import HostCopies
from megatron_taopd.parallel.exchange import RowShard
from megatron_taopd.parallel.layout import Layout
from megatron_taopd.parallel.packing import batch_multiple
from megatron_taopd.teacher.dispatch import ReadRows, dispatch
from megatron_taopd.types import Sequences, WantedRows

_CHECKSUM_BLOCK = 1 << 22  # bytes


class MegatronTeacher:
    """A trunk that does not learn; its head is read apart, in the student's shards.

    Its weights are those of a directory (`weights.load_head` has the head's), or they `follow` the
    student's.

    Args:
        hf_dir: Hugging Face checkpoint directory.
        layout: of the teacher, any over the same ranks; with expert parallelism for a mixture of
            experts.
        dtype: of its weights and activations.
        micro_batch_tokens: the most tokens in a packed micro-batch.
        offload: keep the weights in (pinned) CPU memory between uses.
    """

    def __init__(
        self,
        hf_dir: str | Path,
        layout: Layout,
        dtype: torch.dtype,
        micro_batch_tokens: int,
        offload: bool = False,
    ):
        hf = load_config(hf_dir)
        self.layout = layout
        self.dtype = dtype
        self.micro_batch_tokens = micro_batch_tokens
        config = gpt.transformer_config(hf, layout, dtype)
        self.trunk = gpt.Trunk(hf, config, layout, head=False).requires_grad_(False).eval()
        weights.load_weights(self.trunk, hf_dir)
        self.rows_held = torch.zeros(layout.dp, dtype=torch.int64)  # by `read`, since `resident`
        self._followed: tuple[WeightAverage, Tensor | None] | None = None
        self._is_behind = False  # since the `resident` block began
        self.host = None
        if offload:
            self.host, wait = HostCopies().take([p.detach() for p in self.trunk.parameters()])
            wait()
            self.copies = torch.cuda.Stream()  # on which weights travel
            self._release()

    @property
    def longest_sequence(self) -> int:
        """The longest sequence, in tokens, that a micro-batch and the model's positions take."""
        layout = self.layout
        multiple = batch_multiple(layout.tp, layout.cp, layout.sequence)
        capacity = self.micro_batch_tokens // multiple * multiple
        return min(capacity, longest_sequence(self.trunk.hf))

    @property
    def offloaded_bytes(self) -> int:
        """The bytes of this rank's weights that wait in host memory; 0: they stay on the device."""
        return 0 if self.host is None else sum(copy.nbytes for copy in self.host)

    @torch.no_grad()
    def hidden_states(self, batch: Sequences, student: Layout, scorers: Placement) -> RowShard:
        """Run `read` and `dispatch` for a batch that is whole."""
        with self.resident():
            parts = [(torch.arange(batch.num_sequences), self.read(batch))]
        return dispatch(parts, batch, student, scorers)

    @torch.no_grad()
    def read(self, sequences: Sequences) -> ReadRows:
        """Run the trunk over sequences; their rows stay where they were computed.

        Parts of a batch that are read within one `resident` block are dealt so that every
        data-parallel rank holds about equally many rows of all of them: counts differ by at most
        what one part alone gives its ranks more than others, a sequence or so.

        Args:
            sequences: in the teacher's ids; the same on every rank. The weights are `resident`, or
                on their way.

        Collectives: those of the trunk's forward; before those of a batch's first part those of
        `WeightAverage.fill`, if the weights follow the student's.
        """
        everything = WantedRows.all(sequences)
        own = batching.assign(
            sequences, everything, self.layout, self.micro_batch_tokens, self.rows_held
        )
        ranks = own.owner // self.layout.cp
        self.rows_held += batching.rows_by_rank(sequences, ranks, self.layout.dp)
        self._await_weights()
        if self._followed is not None and self._is_behind:
            average, head = self._followed
            average.fill(self.trunk, head)
            self._is_behind = False
        held = self._forward(own.micro_batches)
        tp_ranks = torch.arange(self.layout.tp)
        starts, data_ranks = own.runs(sequences)
        holders = self.layout.last_stage_rank(data_ranks[:, None], tp_ranks)
        return ReadRows(held, holders, starts)

    def _forward(self, micro_batches: list[batching.MicroBatch]) -> RowShard:
        """Copy each micro-batch's rows to where they stay, so that there is one copy of them."""
        sizes = [len(m.rows) if self.layout.is_last_stage else 0 for m in micro_batches]
        shape = sum(sizes), self.trunk.config.hidden_size
        rows = torch.empty(shape, dtype=self.dtype, device=platform.device())
        places = iter(rows.split(sizes))

        def keep(micro_batch: batching.MicroBatch, hidden: Tensor) -> None:
            next(places).copy_(gpt.pick_rows(hidden, micro_batch.rows, self.layout))

        forward(self.trunk, self.layout, micro_batches, keep)
        ids = torch.cat([m.row_ids for m in micro_batches])
        return RowShard(ids[: len(rows)], rows)

    def metrics(self) -> dict[str, float]:
        """Return what the log says of its work: nothing."""
        return {}

    def close(self) -> None:
        """Do nothing: nothing outlives this process."""

    # -- weights -------------------------------------------------------------------------------

    def follow(self, average: WeightAverage, head: Tensor | None) -> None:
        """Read with the average as it is when the first part of a batch is read.

        Args:
            head: [V, D], this rank's rows of the teacher's head, which are filled as well; None: it
                has none.
        """
        self._followed = average, head

    def fingerprint(self) -> int:
        """Return a checksum of all ranks' weights that changes with any bit of any of them.

        Those that follow the student's change with each update, and have none: 0.

        Collectives: an all-reduce of 8 bytes.
        """
        if self._followed is not None:
            return 0
        total = torch.zeros(1, dtype=torch.int64, device=platform.device())
        place = self.layout.rank + 1
        for parameter in self.trunk.parameters():
            for block in parameter.data.flatten().view(torch.uint8).split(_CHECKSUM_BLOCK):
                watchdog.heartbeat()
                weights = torch.arange(1, len(block) + 1, device=block.device)
                total += place * (block * weights).sum().to(total.device)
                place += 1
        dist.all_reduce(total)
        return int(total)

    def _release(self) -> None:
        for parameter, host in zip(self.trunk.parameters(), self.host, strict=True):
            parameter.data = host

    def _begin_to_fetch(self, host: list[Tensor]) -> None:
        """Copy the weights to the device on a stream of their own, next to what it does.

        Their memory is the computing stream's, which frees it, too.
        """
        device = platform.device()
        arriving = [torch.empty(copy.shape, dtype=copy.dtype, device=device) for copy in host]
        self.copies.wait_stream(torch.cuda.current_stream())  # which may still read what was there
        with torch.cuda.stream(self.copies):
            for parameter, weights, copy in zip(
                self.trunk.parameters(), arriving, host, strict=True
            ):
                weights.copy_(copy, non_blocking=True)
                parameter.data = weights

    def _await_weights(self) -> None:
        """Have the device wait until the weights are there; the host goes on."""
        if self.host is not None:
            torch.cuda.current_stream().wait_stream(self.copies)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Hold the weights on the device while a batch is read in the block, whole or in parts.

        Offloaded weights are on their way when the block begins: what is done in it before the
        first `read`, waiting for servers that generate, goes on meanwhile. After it their memory
        is the device's again.
        """
        self.rows_held.zero_()
        self._is_behind = self._followed is not None
        if self.host is None:
            yield
            return
        self._begin_to_fetch(self.host)
        try:
            yield
        finally:
            self._await_weights()  # or what takes their memory next could be written over
            self._release()
            platform.empty_cache()
