"""Weights as a checkpoint that the servers read."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_taopd.formats.hf import MAX_FILE_BYTES, HFWriter, copy_side_files
from megatron_taopd.parallel.objects import on_rank_0
from megatron_taopd.rollout.weight_sync.buckets import Bucket
from megatron_taopd.rollout.weight_sync.sequence import BucketSync, Client, Replica


class DiskSync(BucketSync):
    """Writes a Hugging Face directory and has the servers read it.

    Args: those of `BucketSync`, and
        directory: for the checkpoints; the servers find it under this path, too. Each version has
            a directory of its own, which is removed when the servers have read it.

    Bytes: the weights, written once and read by every worker of every server.
    """

    def __init__(self, *args, directory: str | Path, **kwargs):
        super().__init__(*args, **kwargs)
        self.directory = Path(directory).absolute()
        self._version: Path | None = None  # the directory of the push that is under way
        self._writer: HFWriter | None = None

    @property
    def _checkpoint(self) -> Path:
        """The path that servers report as their model's: it ends in the model's own name."""
        return self._version / self.hf_dir.absolute().name

    def _prepare(
        self, client: Client | None, targets: Sequence[Replica] | None, version: int
    ) -> None:
        def make() -> None:
            self._version = self.directory / f"weights-{version}"
            shutil.rmtree(self._version, ignore_errors=True)
            self._checkpoint.mkdir(parents=True)

        on_rank_0(make)

    def _send(
        self,
        client: Client | None,
        targets: Sequence[Replica] | None,
        bucket: Bucket,
        where: str = "",
    ) -> None:
        try:
            on_rank_0(lambda: self._write(bucket))
        except RuntimeError as error:
            raise RuntimeError(f"{error}{where}") from error

    def _write(self, bucket: Bucket) -> None:
        dtype = bucket.entries[0].dtype
        if self._writer is None:
            plan = {name: (shape, dtype) for name, shape in self.shapes.items()}
            self._writer = HFWriter(self._checkpoint, plan, MAX_FILE_BYTES)
            copy_side_files(self.hf_dir, self._checkpoint, [dtype])
        for name, tensor in bucket.tensors():
            self._writer.write(name, tensor)

    def _last(self, client: Client, targets: Sequence[Replica]) -> None:
        self._writer.write_index()
        request = {
            "model_path": str(self._checkpoint),
            "load_format": "auto",  # not that of its start, which may have been "dummy"
            "flush_cache": False,
        }
        self._post_all(client, targets, "/update_weights_from_disk", request, self.timeout_s)
        self._discard()

    def _abandon(self) -> None:
        self._discard()

    def _discard(self) -> None:
        self._writer = None
        if self._version is not None:  # on rank 0
            shutil.rmtree(self._version, ignore_errors=True)
