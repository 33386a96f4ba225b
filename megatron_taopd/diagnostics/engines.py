"""Who answers a bank's prompts: the in-process engine, or SGLang servers of the student.

Both are context managers for `bank.add_rollouts`, once all but the vocabulary and the longest
sequence is given: `partial(local_engine, student=…, …)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_taopd.data.vocab_map import Vocabulary
from megatron_taopd.parallel import platform
from megatron_taopd.rollout.local import LocalEngine
from megatron_taopd.rollout.sglang import SGLangEngine
from megatron_taopd.serving.begin import begin_servers, wait_for_servers

if TYPE_CHECKING:
    from megatron_taopd.config import ServersSection


@contextmanager
def local_engine(
    vocabulary: Vocabulary,
    _longest: int,
    *,
    student: str | Path,
    seed: int,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
) -> Iterator[LocalEngine]:
    """Open it on every rank of the job, if there is one.

    Args:
        student: Hugging Face directory.
        batch_size: sequences generated at once on a rank.
    """
    rank, world_size = 0, 1
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    engine = LocalEngine.from_hf(
        student,
        dtype,
        platform.device(),
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        vocab_size=tokens_of(vocabulary),
        eos_token_ids=vocabulary.eos_token_ids,
    )
    with closing(engine):
        yield engine


@contextmanager
def sglang_engine(
    vocabulary: Vocabulary,
    longest: int,
    *,
    student: str | Path,
    dtype: torch.dtype,
    servers: ServersSection,
    logs: Path,
) -> Iterator[SGLangEngine]:
    """Open servers that rank 0 starts and, whatever happens, ends; or some that are there.

    Every rank calls this, in a process group (`platform.initialize`).

    Args:
        student: Hugging Face directory, whose weights the servers have.
        dtype: of servers that are started; their logs go to the directory `logs`.

    Raises:
        ValueError: on every rank: a server did not start, does not answer, serves another model or
            takes no sequence of `longest` tokens.

    Collectives: a broadcast of some 100 bytes; makes a gloo group.
    """
    begun = begin_servers(servers, str(student), longest, dtype, logs, fixed_weights=True)
    model, replicas = wait_for_servers(begun, "engine sglang", servers.start_timeout_s)
    with replicas or nullcontext():
        yield SGLangEngine(replicas, model, tokens_of(vocabulary), vocabulary.eos_token_ids)


def tokens_of(vocabulary: Vocabulary) -> int:
    """Return how many ids can be drawn: those up to the last that stands for a token."""
    return 1 + max(vocabulary.tokenizer.get_vocab().values())
