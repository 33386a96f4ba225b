"""Teachers that SGLang servers run, for models that no layout of the training ranks holds.

`SGLangTeacher` gets the hidden states at the response rows and loses nothing: our own teacher head
does the rest, as for a `MegatronTeacher`. `SGLangTopkTeacher` gets log-probabilities of the
teacher's top-K and of the sampled tokens, all that a server without our hook and without hidden
states can say; scores are then bounds (`parallel.vocab.score_topk`).

Rank 0 looks after the servers. Where they are dealt over several ranks (`serving.sources`), each of
these asks its own and holds what they answer; else rank 0 asks all. A server's trouble is a
RuntimeError on every rank.

Measured on one CPU server, per number of a hidden state: with the hook of `serving.hidden_states`
5.33 bytes in fp32 and 2.67 in bf16; as the lists of `return_hidden_states` 19.6 and 10.9. Of two
million numbers the answer takes .1 s to read instead of 1.3 s (.45 s with orjson), and leaves the
server up to 1.5 s earlier. SGLang's Engine within a process of our own gives the same lists.
"""

from __future__ import annotations

import asyncio
import shlex
import time
import uuid
import zlib
from abc import ABC, abstractmethod
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taopd.formats.output_head import find_head
from megatron_taopd.models import weights
from megatron_taopd.parallel import platform, watchdog
from megatron_taopd.parallel.exchange import RowShard, no_rows
from megatron_taopd.parallel.layout import Layout
from megatron_taopd.parallel.objects import broadcast_object, gather, of_all_ranks, on_rank_0
from megatron_taopd.serving.answers import Answer, as_answer
from megatron_taopd.serving.client import Elsewhere, Replicas
from megatron_taopd.serving.hidden_states import HOOK_ARGS, SERVER_ARGS, unpack
from megatron_taopd.serving.identity import agreed, probe_log_probs, probe_tokens, same_model
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.serving.replica import Replica
from megatron_taopd.serving.sources import share_out
from megatron_taopd.teacher.dispatch import ReadRows, dispatch
from megatron_taopd.teacher.topk import TopkRows
from megatron_taopd.types import Sequences

_BLOCK = 8192  # rows of the head that are held at a time while it is compared


class _Teacher(ABC):
    """The part that both teachers share; `width` and `dtype` are those of their rows.

    Collective: makes a gloo group, and whatever `check` finds is raised on every rank.
    """

    def __init__(
        self,
        replicas: Replicas | None,
        model: ServedModel,
        width: int,
        dtype: torch.dtype,
        own: Replicas | None = None,
    ):
        self.replicas, self.model, self.width, self.dtype = replicas, model, width, dtype
        self.counts: Counter[str] = Counter()
        self.reference: np.ndarray | None = None  # what `fingerprint` compares with, on rank 0
        self.leads = replicas is not None
        shared = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo") if shared else None
        assert self.leads == (not shared or dist.get_rank() == 0)
        self.alone = not any(gather(own is not None, self.group))  # rank 0 asks all
        self.asks = replicas if self.alone else own
        self._ask(self._check_all)

    @property
    def longest_sequence(self) -> int:
        """Return the most tokens that the servers take of a sequence."""
        return self.model.longest

    @property
    def offloaded_bytes(self) -> int:
        """Return 0: no weights are here."""
        return 0

    def resident(self) -> AbstractContextManager:
        """Do nothing: the weights are the servers' affair."""
        return nullcontext()

    def hidden_states(self, batch: Sequences, student: Layout, owner: Tensor) -> RowShard:
        """Call `read` and `dispatch` for a batch that is whole."""
        parts = [(torch.arange(batch.num_sequences), self.read(batch))]
        return dispatch(parts, batch, student, owner)

    def read(self, sequences: Sequences) -> ReadRows:
        """Ask the servers, each sequence once, all at the same time.

        Each rank that asks servers takes a run of neighbours, in proportion to its servers and in
        tokens, and holds their rows. What its servers cannot take goes to those of other ranks.

        Args:
            sequences: in the teacher's ids; the same on every rank.

        Collectives: two gathers of some bytes a rank, and one every SIGN_OF_LIFE_S.

        Raises:
            ValueError: a sequence that no server takes, on every rank.
            RuntimeError: of a rank that asks, on every rank.
        """
        started = time.monotonic()
        rank = dist.get_rank() if dist.is_initialized() else 0
        holders = torch.zeros(sequences.num_sequences, dtype=torch.int64)
        found: dict[int, Tensor] = {}  # rows of this rank's sequences
        left = dict.fromkeys(range(sequences.num_sequences), 0)  # and attempts at each
        while left:
            places = torch.tensor([*left])
            owner = share_out(sequences.lengths[places], self._able())
            holders[places] = owner
            mine = {i: left[i] for i in places[owner == rank].tolist()}
            asked = None
            if mine:
                asked = self.asks.spawn(self._ask_all(sequences, mine, found))
            try:
                answers = [answer for answer in of_all_ranks(asked, self.group) if answer]
            except BaseException:
                if asked is not None:
                    asked.cancel()
                raise
            left = {place: made for others, _ in answers for place, made in others.items()}
            if self.leads:
                for _, counts in answers:
                    self.counts.update(counts)
        if self.leads:
            self.counts["tokens"] += len(sequences.tokens)
            self.counts["seconds"] += time.monotonic() - started
        held = no_rows(self.width, self.dtype)
        if found:
            mine = sorted(found)
            rows = torch.cat([found.pop(i) for i in mine])
            ids = sequences.rows_of(torch.tensor(mine))
            held = RowShard(ids, rows.to(platform.device()))
        return ReadRows(held, holders[:, None])

    def _able(self) -> list[int]:
        """Return how many servers each rank can ask, once any can. Collective.

        Raises:
            RuntimeError: all servers of all ranks are given up.
        """
        while not self.alone:
            own = self.asks
            words = gather((len(own.ready), own.troubles) if own else (0, ""), self.group)
            able = [count for count, _ in words]
            if any(able):
                return able
            troubles = [trouble for _, trouble in words]
            if None not in troubles:
                raise RuntimeError(f"no server is left: {'; '.join(filter(None, troubles))}")
            time.sleep(1)
        return [1]  # rank 0

    def fingerprint(self) -> int:
        """Return a number that changes with the model that is served.

        The log-probabilities of some fixed tokens, asked of every server that is up, must stay
        within rounding (`same_model`) of the first ones on average. That sees another model, a
        server that was restarted with other weights, and servers that differ. It does not see a
        change that moves no log-probability by more, single bits among them, and nothing that
        happened before.

        Collective: a broadcast of some bytes.

        Raises:
            RuntimeError: no server answers, or they differ, on every rank.
        """
        return self._ask(self._fingerprint)

    def metrics(self) -> dict[str, float]:
        """Return the metrics since the last call, on rank 0; none on the others."""
        if not self.leads:
            return {}
        counts, self.counts = self.counts, Counter()
        return {"teacher/tokens_per_second": counts["tokens"] / max(counts["seconds"], 1e-9)}

    def close(self) -> None:
        for replicas in (self.asks, self.replicas):
            if replicas is not None:
                replicas.close()

    # What the forms differ in

    @abstractmethod
    def request(self, tokens: list[int], first: int) -> dict:
        """Make the /generate request for rows from position `first` on."""

    @abstractmethod
    def rows(self, answer: Answer, tokens: list[int], positions: Tensor) -> Tensor:
        """Return the rows at these positions of a sequence, [r, width].

        Raises:
            RuntimeError: the answer is not what was asked for.
        """

    @property
    @abstractmethod
    def tokens_after(self) -> int:
        """Count the tokens behind the last row that a server has to see."""

    @abstractmethod
    async def check(self, replica: Replica) -> None:
        """Raise ValueError or RuntimeError where a server does not serve this form."""

    # Rank 0, which looks after the servers

    def _ask(self, coroutine: Callable[[], Coroutine]) -> Any:
        """Return what the servers answer rank 0. Collective: see `on_rank_0`."""
        replicas = self.replicas
        return on_rank_0(lambda: replicas.spawn(coroutine()), self.group)

    async def _post(self, replica: Replica, request: dict) -> Answer:
        """Ask this server, once."""
        body = await self.replicas.post(replica, "/generate", request)
        return as_answer(f"{replica.url}/generate", body)

    async def _check_all(self) -> None:
        for replica in self.replicas.live:
            await self.check(replica)

    async def _fingerprint(self) -> int:
        replicas = self.replicas.live
        asking = (probe_log_probs(self.replicas.post, r, self.model) for r in replicas)
        answers = await asyncio.gather(*asking, return_exceptions=True)
        found = [
            (replica, answer)
            for replica, answer in zip(replicas, answers, strict=True)
            if not isinstance(answer, BaseException)
        ]
        if not found:
            raise RuntimeError(f"no server of the teacher answers: {self._urls}: {answers}")
        try:
            _, log_probs = agreed(*zip(*found, strict=True))
        except ValueError as error:
            raise RuntimeError(f"the teacher's servers differ: {error}") from None
        if self.reference is None:
            self.reference = log_probs
        same = np.abs(log_probs - self.reference).mean() <= same_model(replicas)
        return zlib.crc32((self.reference if same else log_probs).round(3).tobytes())

    # A rank that asks

    async def _ask_all(
        self, sequences: Sequences, places: dict[int, int], found: dict[int, Tensor]
    ) -> tuple[dict[int, int], Counter[str]]:
        """Ask for the rows of some sequences, and put them where they are to be found.

        Args:
            places: of the sequences in the batch, and the attempts at each so far.

        Returns:
            The places that other ranks have to ask for, likewise; this rank's counts, on rank 0
            none, which has them.
        """
        for i in places:
            self.model.check(f"sequence {i} of the teacher", sequences.sequence(i).tolist(), 0)
        left: dict[int, int] = {}

        async def ask(place: int, made: int) -> None:
            try:
                found[place] = await self._ask_one(sequences, place, made)
            except Elsewhere as error:
                left[place] = error.made

        tasks = [asyncio.ensure_future(ask(*item)) for item in places.items()]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        counts: Counter[str] = Counter()
        if not self.leads:
            counts, self.counts = self.counts, counts
        return left, counts

    async def _ask_one(self, sequences: Sequences, index: int, made: int) -> Tensor:
        first, last = sequences.cu_rows[index : index + 2].tolist()
        positions = sequences.positions_of(torch.arange(first, last))
        if not len(positions):
            return torch.empty(0, self.width, dtype=self.dtype)
        seen = int(positions[-1]) + 1 + self.tokens_after
        tokens = sequences.sequence(index)[:seen].tolist()
        request = self.request(tokens, int(positions[0]))
        answer = await self.asks.complete(request, made, self.alone)
        watchdog.heartbeat()
        return self.rows(answer, tokens, positions)

    @property
    def _urls(self) -> str:
        return ", ".join(replica.url for replica in (self.replicas or self.asks).all)


class SGLangTeacher(_Teacher):
    """Hidden states of the response rows from SGLang servers, which run the trunk unmodified.

    The servers return them of the whole prompt, normed, as the head takes them. Servers with the
    hook of `serving.hidden_states` (`HOOK_ARGS`) pack them; others need
    `--enable-return-hidden-states`, and send 4 times the bytes. A prefill must be whole: not in
    chunks, and of nothing that is in the prefix cache. Chunks are the server's to avoid
    (`SERVER_ARGS`); a key of its own keeps each request from the prefixes of others.

    Args:
        replicas: on rank 0, of servers with fixed weights; None on the others. The teacher closes
            it.
        model: that they serve; its `longest` is the longest sequence.
        hidden_size: D.
        dtype: of the rows: the run's precision.
        own: those of the servers that this rank asks; None on every rank: rank 0 asks all. The
            teacher closes it.

    Raises:
        ValueError: a server returns no hidden states, on every rank.
    """

    tokens_after = 0

    def __init__(
        self,
        replicas: Replicas | None,
        model: ServedModel,
        hidden_size: int,
        dtype: torch.dtype,
        own: Replicas | None = None,
    ):
        self.packs = True
        super().__init__(replicas, model, hidden_size, dtype, own)
        self.packs = broadcast_object(self.packs, group=self.group)  # what rank 0 has seen
        self.layout = f"SGLang({len(replicas.all)})" if self.leads else "SGLang"

    def request(self, tokens: list[int], first: int) -> dict:
        return {
            "input_ids": tokens,
            # None at all would return nothing.
            "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
            "extra_key": uuid.uuid4().hex,
            "return_hidden_states": not self.packs,
        }

    def rows(self, answer: Answer, tokens: list[int], positions: Tensor) -> Tensor:
        hidden = _hidden_states(answer)
        found = (0, 0) if hidden is None else tuple(hidden.shape)
        if found != (len(tokens), self.width):
            raise RuntimeError(
                f"{self._urls}: hidden states of {len(tokens)} × {self.width} were expected, the "
                f"answer has {found[0]} × {found[1]}: was the prefill in chunks, or a prefix in "
                f"the cache? Start the server with {' '.join(SERVER_ARGS)}"
            )
        return hidden[positions].to(self.dtype)

    async def check(self, replica: Replica) -> None:
        request = self.request([0, 0], 0)
        answer = await self._post(replica, request)
        if answer.meta_info.hidden is None:
            self.packs = False
            request["return_hidden_states"] = True
            try:
                answer = await self._post(replica, request)
            except RuntimeError as error:
                raise ValueError(
                    f"teacher.servers: {replica.url} returns no hidden states ({error}); start it "
                    f"with {shlex.join(HOOK_ARGS)} where megatron_taopd is installed, else with "
                    f"{' '.join(SERVER_ARGS)} --enable-return-hidden-states"
                ) from None
        self.rows(answer, [0, 0], torch.arange(2))

    async def _check_all(self) -> None:
        """Check further that our head on a server's hidden states says what the server says."""
        await super()._check_all()
        for replica in self.replicas.live:
            await self._check_head(replica)

    async def _check_head(self, replica: Replica) -> None:
        hidden, tokens, theirs = [], [], []
        for sequence in probe_tokens(self.model):
            request = self.request(sequence, 0) | {"return_logprob": True, "logprob_start_len": 0}
            answer = await self._post(replica, request)
            self.rows(answer, sequence, torch.arange(1))  # all of them are there
            hidden.append(_hidden_states(answer)[:-1])
            tokens += sequence[1:]
            theirs += answer.meta_info.input_token_logprobs.log_probs[1:].tolist()
        rows, targets = torch.cat(hidden), torch.tensor(tokens)
        ours, explained = await asyncio.to_thread(
            head_log_probs, self.model.path, rows, targets, self.dtype
        )
        gap = float((ours - torch.tensor(theirs, dtype=torch.float64)).abs().max())
        if not gap <= explained:  # nor NaN
            raise ValueError(
                f"teacher.servers: {replica.url}: log-probabilities that the head in "
                f"{self.model.path} gives to its hidden states are up to {gap:.3g} from its own, "
                f"rounding explains {explained:.2g}: it serves another model than teacher.path, or "
                "one whose logits are more than head · hidden states; take teacher.form: topk"
            )


def head_log_probs(
    hf_dir: str | Path, hidden: Tensor, targets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """Compute what our head of a checkpoint says of a server's hidden states.

    Args:
        hidden: [n, D] as the server sent them.
        targets: [n] int64 token ids.
        dtype: that rows and head have in the run.

    Returns:
        [n] float64 log-probabilities on the CPU; the most by which the server's may differ from
        them. Logits are rounded to the narrower dtype on both sides, by half an ε each, which moves
        a log-probability by twice that: 2 ε of the highest logit. And 4 ε of fp32: of the
        log-probability, and √D times of |hidden| · |row| for a sum of D products.

    Memory: _BLOCK rows of the head.
    """
    head = find_head(hf_dir)
    rows = hidden.to(platform.device(), dtype)
    targets = targets.to(rows.device)
    totals, chosen = (
        rows.new_full((len(rows),), value, dtype=torch.float64) for value in (-torch.inf, 0)
    )
    highest = longest = 0.0
    for start in range(0, head.shape[0], _BLOCK):
        ids = torch.arange(start, min(start + _BLOCK, head.shape[0]))
        weight = weights.load_rows(hf_dir, head, ids, dtype).float()
        logits = rows.float() @ weight.t()
        totals = totals.logaddexp(logits.double().logsumexp(1))
        here = (targets >= start) & (targets < start + len(ids))
        chosen[here] = logits[here].gather(1, targets[here, None] - start)[:, 0].double()
        highest = max(highest, float(logits.abs().max()))
        longest = max(longest, float(weight.norm(dim=1).max()))
    narrow = max((_dtype_of(hidden), dtype), key=lambda d: torch.finfo(d).eps)
    log_probs = chosen - totals
    sums = head.shape[1] ** 0.5 * longest * float(rows.float().norm(dim=1).max())
    explained = 2 * torch.finfo(narrow).eps * highest
    explained += 4 * torch.finfo(torch.float32).eps * (sums + float(log_probs.abs().max()))
    return log_probs.cpu(), explained


def _dtype_of(hidden: Tensor) -> torch.dtype:
    """Return the narrowest dtype that holds these numbers, which SGLang's lists do not name."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(hidden.to(dtype).to(hidden.dtype), hidden):
            return dtype
    return hidden.dtype


def _hidden_states(answer: Answer) -> Tensor | None:
    """Return the prompt's [T, D], packed by our hook or in SGLang's lists; None: neither."""
    if answer.meta_info.hidden is not None:
        return unpack(answer.meta_info.hidden[0])
    lists = answer.meta_info.hidden_states
    return torch.from_numpy(np.array(lists[0], dtype=np.float32)) if lists else None


class SGLangTopkTeacher(_Teacher):
    """The teacher's top-K and the sampled tokens' log-probabilities, from any SGLang server.

    One scoring request a sequence, over its response rows: 8/3·K·4 bytes a row, and about 35 for
    the sampled token. SGLang computes them from logits in the model's dtype, so they have the
    rounding of that.

    Args:
        replicas, model, own: as for `SGLangTeacher`.
        k: tokens reported for each row; at least `selection.k`, and better several times that.
        student_ids: [teacher's vocabulary] int64, the student's id of each of the teacher's, −1
            where there is none (`student_ids_of`); None where they are the same.
    """

    tokens_after = 1  # the sampled one, whose log-probability is asked for

    def __init__(
        self,
        replicas: Replicas | None,
        model: ServedModel,
        k: int,
        student_ids: Tensor | None = None,
        own: Replicas | None = None,
    ):
        if not 1 <= k <= model.vocab_size:
            raise ValueError(
                f"teacher.topk: {k} must be within 1 … {model.vocab_size}, the teacher's vocabulary"
            )
        self.k, self.student_ids = k, student_ids
        super().__init__(replicas, model, 2 * k + 1, torch.int32, own)
        self.layout = f"SGLang({len(replicas.all)}), top {k}" if self.leads else "SGLang"

    def request(self, tokens: list[int], first: int) -> dict:
        return {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": first,
            "top_logprobs_num": self.k,
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }

    def rows(self, answer: Answer, tokens: list[int], positions: Tensor) -> Tensor:
        meta, first = answer.meta_info, int(positions[0])
        expected = [len(tokens) - 1 - first, self.k]
        found = meta.input_top_logprobs_shape
        sampled = torch.from_numpy(meta.input_token_logprobs.log_probs)[1:]
        whole = found == expected and len(sampled) == expected[0]
        if not whole or meta.input_top_logprobs_null_prefix != 1:
            raise RuntimeError(
                f"{self._urls}: top log-probabilities of {expected[0]} × {expected[1]} were "
                f"expected, the answer has {found}; this needs SGLang 0.5.20 or later"
            )
        picked = positions - first
        ids = _flat(meta.input_top_logprobs_idx_flat_b64, np.int32, found)[picked].long()
        ids = ids if self.student_ids is None else self.student_ids[ids]
        log_probs = _flat(meta.input_top_logprobs_val_flat_b64, np.float32, found)[picked]
        self.counts["rows"] += len(picked)
        self.counts["mass"] += float(log_probs.double().exp().sum())
        return TopkRows(ids, log_probs, sampled[picked]).pack()

    async def check(self, replica: Replica) -> None:
        answer = await self._post(replica, self.request([0, 0], 0))
        self.rows(answer, [0, 0], torch.arange(1))
        self.counts.clear()

    def metrics(self) -> dict[str, float]:
        """Add that scores are bounds, and the mean teacher mass of what is reported."""
        rows, mass = self.counts["rows"], self.counts["mass"]
        metrics = super().metrics()
        if self.leads:
            metrics |= {"teacher/topk_bound": 1, "teacher/topk_mass": mass / max(rows, 1)}
        return metrics


def student_ids_of(teacher_ids: Tensor, teacher_vocabulary: int) -> Tensor:
    """Invert `VocabMap.teacher_ids`: [teacher_vocabulary] int64, −1 where there is none."""
    known = (teacher_ids >= 0).nonzero()[:, 0]
    student_ids = torch.full((teacher_vocabulary,), -1)
    student_ids[teacher_ids[known]] = known
    return student_ids


def _flat(encoded: str, dtype: type, shape: list[int]) -> Tensor:
    return torch.from_numpy(np.frombuffer(b64decode(encoded), dtype).reshape(shape).copy())
