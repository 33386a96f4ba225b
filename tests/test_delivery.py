"""A batch that the teacher reads as it comes: who holds its rows, the same numbers, no copies."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from support.ranks import RankError, run_ranks
from support.step import make_batch, make_model

from megatron_taopd.data.batching import Placement, assign, hand_out, rows_by_rank
from megatron_taopd.rollout.engine import make_rollout_batch
from megatron_taopd.types import RolloutBatch, WantedRows, ranges

VOCABULARY, WIDTH = 64, 32


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("teacher"), VOCABULARY, WIDTH, 4, seed=1)


def part_of(batch: RolloutBatch, places: list[int]) -> RolloutBatch:
    """These sequences of a batch, as an engine hands them out."""
    prompts, responses = [], []
    for place in places:
        prompt, response = batch.sequence(place).tensor_split([int(batch.prompt_lengths[place])])
        prompts.append(prompt.tolist())
        responses.append(response)
    zeros = [torch.zeros(len(response)) for response in responses]
    return make_rollout_batch(prompts, places, responses, zeros, [False] * len(places), zeros)


def arriving(batch: RolloutBatch, size: int) -> list[list[int]]:
    """Places in parts of this size, the shortest response first, as servers finish them."""
    order = batch.response_lengths.argsort(stable=True)
    return [places.sort().values.tolist() for places in order.split(size)]


# ------------------------------------------------------------------------------------------- deals


@pytest.mark.parametrize("size", [1, 2, 3, 8, 16, 24, 40, 100, 512])
@pytest.mark.parametrize("finished", ["shortest first", "in any order"])
def test_rows_held_are_balanced_over_the_parts_of_a_heavy_tailed_batch(size, finished):
    """512 responses with a median of 1,100 tokens and a longest of 7,168, on 16 ranks."""
    ranks, generator = 16, torch.Generator().manual_seed(0)
    responses = (7 + torch.randn(512, generator=generator)).exp().clamp(1, 7168).long()
    prompts = torch.randint(20, 1024, (512,), generator=generator)
    order = torch.randperm(512, generator=generator)
    if finished == "shortest first":
        order = responses.argsort()
    layout = SimpleNamespace(dp=ranks, data_rank=0, tp=1, cp=1, sequence=False)
    held = torch.zeros(ranks, dtype=torch.int64)
    for places in order.split(size):
        rows, lengths = responses[places], (prompts + responses)[places]
        part = RolloutBatch(
            tokens=torch.zeros(int(lengths.sum()), dtype=torch.int64),
            cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
            prompt_lengths=prompts[places],
            log_probs=torch.zeros(int(rows.sum())),
            truncated=torch.zeros(len(places), dtype=torch.bool),
            prompts=places,
            weight_versions=torch.zeros(int(rows.sum()), dtype=torch.int64),
        )
        dealt = assign(part, WantedRows.all(part), layout, 8192, held)
        held += rows_by_rank(part, dealt.owner, ranks)
    assert held.sum() == responses.sum()
    assert held.max() <= 1.1 * held.double().mean()


def test_shares_go_to_who_holds_least():
    """By hand: rank 1 has least and takes the share of 5 rows, then ranks 2 and 0; of equals the
    first."""
    assert hand_out(["a", "b", "c"], [3, 5, 1], [9, 2, 4]) == ["c", "b", "a"]
    assert hand_out(["a", "b", "c", "d"], [2, 2, 1, 1], [0, 7, 7, 0]) == ["a", "c", "d", "b"]
    # Nobody is behind: as the plan has it, so that both models share out a whole batch alike.
    assert hand_out(["a", "b"], [1, 2], [4, 4]) == ["a", "b"]


def test_shares_are_compared_by_their_rows():
    """Two ranks, which hold 5 rows and none: the answer of 9 goes to the second, the two of 2 to
    the first."""
    answers = [torch.zeros(rows) for rows in (9, 2, 2)]
    batch = make_rollout_batch([[1]] * 3, range(3), answers, answers, [False] * 3, answers)
    layout = SimpleNamespace(dp=2, data_rank=0, tp=1, cp=1, sequence=False)
    everything = WantedRows.all(batch)
    assert assign(batch, everything, layout, 64).owner.tolist() == [0, 1, 1]
    assert assign(batch, everything, layout, 64, torch.tensor([5, 0])).owner.tolist() == [1, 0, 0]


def test_rows_are_counted_by_the_rank_that_runs_them():
    batch = make_batch(VOCABULARY, num_sequences=4)
    owner = torch.tensor([2, 0, 2, 2])
    rows = batch.response_lengths.tolist()
    assert rows_by_rank(batch, owner, 4).tolist() == [rows[1], 0, rows[0] + rows[2] + rows[3], 0]


# ------------------------------------------------------------------------------------------- ranks


def read_in_parts(teacher_dir, parallel, batch, parts, micro_batch_tokens=40):
    """Two batches by `loop.read_parts`, and the second delivered to a student without tensor
    parallelism: (of each batch, the rows of its parts that this rank holds; ids and rows that came
    here)."""
    from megatron_taopd import loop
    from megatron_taopd.data import batching
    from megatron_taopd.data.vocab_map import VocabMap
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform
    from megatron_taopd.teacher.dispatch import dispatch
    from megatron_taopd.teacher.megatron import MegatronTeacher
    from megatron_taopd.teacher.teachers import Teachers

    platform.emulate_cuda()
    layout = layouts.student_layout(1, 1)
    teacher = MegatronTeacher(
        teacher_dir, layouts.forward_layout(*parallel), torch.float32, micro_batch_tokens
    )
    pending = SimpleNamespace(
        parts=lambda: ((torch.tensor(places), part_of(batch, places)) for places in parts)
    )
    run = SimpleNamespace(
        config=SimpleNamespace(rollout=SimpleNamespace(stream=True)),
        distiller=SimpleNamespace(
            teachers=Teachers({"teacher": teacher}, {"teacher": VocabMap(torch.arange(VOCABULARY))})
        ),
        phase=lambda _: nullcontext(),
        monitor=SimpleNamespace(span=lambda _: nullcontext()),
    )
    held = []
    for _ in range(2):
        [read] = loop.read_parts(run, pending).values()
        held.append([len(part.held.ids) for _, part in read])
    everything = WantedRows.all(batch)
    assigned = batching.assign(batch, everything, layout, micro_batch_tokens)
    came = dispatch(read, batch, layout, assigned)
    assert not read  # nothing refers to what was sent
    return held, came.ids, came.rows


LAYOUTS = {  # of the teacher: (tp, pp), which leaves so many data-parallel ranks
    "DP2": (2, (1, 1), 2),
    "DP4": (4, (1, 1), 4),
    "TP2 DP2": (4, (2, 1, True), 2),
    "PP2 DP2": (4, (1, 2), 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_are_held_in_equal_shares_and_give_the_rows_of_the_whole(teacher_dir, layout, size):
    world_size, parallel, dp = LAYOUTS[layout]
    batch = make_batch(VOCABULARY, num_sequences=13)
    case = teacher_dir, parallel, batch
    streamed = run_ranks(world_size, read_in_parts, *case, arriving(batch, size))
    whole = run_ranks(world_size, read_in_parts, *case, [list(range(13))])

    longest, (tp, *_) = int(batch.response_lengths.max()), parallel
    for held in zip(*(rounds for rounds, _, _ in streamed), strict=True):
        sums = [sum(parts) for parts in held]
        holding = sums[-dp * tp :]  # the ranks of the last stage
        assert sum(holding) == sum(sums) == batch.num_rows * tp
        assert max(holding) - min(holding) <= longest
    for (first, second), _, _ in streamed:  # each batch is dealt anew
        assert first == second

    for (_, ids, rows), (_, whole_ids, whole_rows) in zip(streamed, whole, strict=True):
        order, whole_order = ids.argsort(), whole_ids.argsort()
        assert torch.equal(ids[order], whole_ids[whole_order])
        assert torch.equal(rows[order], whole_rows[whole_order])
    assert sorted(i for _, ids, _ in streamed for i in ids.tolist()) == [*range(batch.num_rows)]


def test_a_row_that_is_not_held_is_a_mistake():
    with pytest.raises(RankError, match="asked for a row that this rank does not hold"):
        run_ranks(1, ask_for_what_is_not_there)


def ask_for_what_is_not_there():
    from megatron_taopd.parallel.exchange import RowShard, Traffic, send_rows

    held = [RowShard(torch.tensor([5, 2]), torch.ones(2, 3))]
    traffic = Traffic(torch.tensor([2, 3]), torch.tensor([2]))
    send_rows(held, traffic, traffic, 1)


# ------------------------------------------------------------------------------------------ memory


def peak_of_delivery(batch, parts):
    """(bytes held, bytes received, the most that existed), from before the parts were read."""
    from megatron_taopd.data import batching
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.exchange import RowShard
    from megatron_taopd.parallel.memory import peak_memory
    from megatron_taopd.teacher.dispatch import ReadRows, dispatch

    platform.emulate_cuda()
    layout, rank = layouts.student_layout(1, 1), dist.get_rank()
    everything = WantedRows.all(batch)
    scorers = batching.assign(batch, everything, layout, 4096)
    with peak_memory() as memory:
        read, bytes_held = [], 0
        for number, places in enumerate(parts):
            part = part_of(batch, places)
            holders = (torch.arange(len(places)) + number) % dist.get_world_size()
            ids = part.rows_of((holders == rank).nonzero()[:, 0])
            rows = torch.full((len(ids), 1024), float(number))
            read.append((torch.tensor(places), ReadRows(RowShard(ids, rows), holders[:, None])))
            bytes_held += rows.nbytes
        del rows
        came = dispatch(read, batch, layout, scorers)
    return bytes_held, came.rows.nbytes, memory.peak


@pytest.mark.parametrize("size", [100, 800])
def test_delivery_has_every_row_at_most_twice(size):
    """Once where it was read or where it is scored, and once on its way."""
    batch = make_batch(VOCABULARY, num_sequences=800)
    for held, received, peak in run_ranks(2, peak_of_delivery, batch, arriving(batch, size)):
        assert peak <= 2.2 * max(held, received)  # numbers of rows, and 256 rows at a time


def peak_between_layouts(batch, tp, holding, width, dtype):
    """(bytes held, bytes received, the most that existed, all arrived) of a delivery to a student
    with TP, where `holding` teacher ranks have the rows of each sequence by turns."""
    from megatron_taopd.data import batching
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.exchange import RowShard
    from megatron_taopd.parallel.memory import peak_memory
    from megatron_taopd.teacher.dispatch import ReadRows, dispatch

    platform.emulate_cuda()
    layout, rank = layouts.student_layout(tp, 1), dist.get_rank()
    everything = WantedRows.all(batch)
    scorers = batching.assign(batch, everything, layout, 4096)
    holders = torch.arange(batch.num_sequences) % holding
    with peak_memory() as memory:
        ids = batch.rows_of((holders == rank).nonzero()[:, 0])
        rows = (ids[:, None] % 199).expand(-1, width).to(dtype)
        rows = rows.contiguous()
        held = rows.nbytes
        read = [
            (torch.arange(batch.num_sequences), ReadRows(RowShard(ids, rows), holders[:, None]))
        ]
        del rows
        came = dispatch(read, batch, layout, scorers)
    arrived = came.rows == (came.ids[:, None] % 199).to(dtype)
    wanted = batch.rows_of((scorers.owner == layout.dp_rank).nonzero()[:, 0])
    whole = bool(arrived.all()) and torch.equal(came.ids.sort().values, wanted.sort().values)
    return held, came.rows.nbytes, memory.peak, whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("world_size", "tp", "holding"), [(2, 2, 2), (2, 2, 1), (2, 1, 1), (4, 4, 4)]
)
def test_every_layout_has_every_row_at_most_twice(world_size, tp, holding, dtype):
    """Each of a student's TP ranks gets all rows, so that holders send many copies of theirs."""
    batch = make_batch(VOCABULARY, num_sequences=800)
    case = peak_between_layouts, batch, tp, holding, 2048, dtype
    for held, received, peak, whole in run_ranks(world_size, *case):
        assert whole
        assert received == batch.num_rows * 2048 * dtype.itemsize * tp // world_size or tp == 1
        sent = tp * held
        # Numbers of rows take as much as 3 % of these; 256 rows are copied by their numbers.
        assert peak <= 1.03 * (held + received) + sent / 16 + 256 * 2048 * dtype.itemsize


def test_rounds_are_even_and_alike_on_both_sides():
    """By hand: rank 0 sends five rows to rank 1 and two to itself, in two rounds."""
    from megatron_taopd.parallel.exchange import Traffic, _in_rounds, rounds

    outgoing = Traffic(torch.tensor([1, 6, 0, 2, 4, 5, 7]), torch.tensor([2, 5]))
    ids, counts = _in_rounds(outgoing, 2)
    assert ids.tolist() == [1, 0, 2, 4, 6, 5, 7]  # 4 is the third of five: 2 · 2 // 5 = 0
    assert counts.tolist() == [[1, 3], [1, 2]]
    incoming = Traffic(torch.tensor([0, 2, 4, 5, 7]), torch.tensor([5, 0]))
    ids, counts = _in_rounds(incoming, 2)
    assert ids.tolist() == [0, 2, 4, 5, 7]
    assert counts.tolist() == [[3, 0], [2, 0]]
    assert [rounds(rows) for rows in (0, 1, 128, 129, 4096, 10**6)] == [1, 1, 1, 2, 32, 32]


def routes_of_rows(batch, layout, owner, holders, rank, world_size):
    """Row by row: (ids, counts) of what a rank sends and gets, and the rounds of all."""
    copies = []
    for t in range(layout.tp):
        for row, sequence in enumerate(batch.row_sequences().tolist()):
            destination = layout.last_stage_rank(int(owner[sequence]), t)
            has = holders[sequence].tolist()
            source = destination if destination in has else has[t % len(has)]
            copies.append((row, source, destination))
    sides = []
    for own, partner in ((1, 2), (2, 1)):
        mine = [copy for copy in copies if copy[own] == rank]
        ids = [copy[0] for other in range(world_size) for copy in mine if copy[partner] == other]
        counts = [sum(copy[partner] == other for copy in mine) for other in range(world_size)]
        sides.append((ids, counts))
    moved = [sum(copy[end] == r for copy in copies) for end in (1, 2) for r in range(world_size)]
    return sides, max(moved)


@pytest.mark.parametrize(("tp", "pp", "holding"), [(1, 1, 1), (2, 1, 2), (4, 2, 1), (2, 2, 4)])
def test_routes_by_sequence_are_those_of_every_row(monkeypatch, tp, pp, holding):
    """Of every rank of a student in 8; a sequence may be held by ranks that also score it."""
    from megatron_taopd.parallel import exchange
    from megatron_taopd.parallel.layout import Layout
    from megatron_taopd.teacher import dispatch

    world_size, generator = 8, torch.Generator().manual_seed(tp + holding)
    batch = make_batch(VOCABULARY, num_sequences=30)
    layout = Layout(tp, pp, world_size // (tp * pp), False, 0, None)
    owner = torch.randint(0, layout.dp, (30,), generator=generator)
    first = torch.randint(0, world_size, (30,), generator=generator)
    holders = (first[:, None] + torch.arange(holding)) % world_size
    monkeypatch.setattr(exchange.dist, "get_world_size", lambda: world_size)
    monkeypatch.setattr(exchange, "_FEWEST_ROWS", 8)
    for rank in range(world_size):
        monkeypatch.setattr(exchange.dist, "get_rank", lambda rank=rank: rank)
        scorers = Placement(batch.lengths, owner, torch.zeros(30, dtype=torch.bool), 1)
        held, none = (batch.cu_rows[:-1], holders), torch.zeros(30, dtype=torch.bool)
        routes = dispatch._routes(batch, layout, scorers, held, none)
        wanted, most = routes_of_rows(batch, layout, owner, holders, rank, world_size)
        for (ids, counts), of in zip(wanted, (routes.outgoing(), routes.incoming()), strict=True):
            runs, rows = of
            assert ranges(routes.first[runs], routes.rows[runs]).tolist() == ids
            assert rows.tolist() == counts
        assert routes.rounds == exchange.rounds(most) > 1


def order_of_an_offload(teacher_dir, batch):
    """What an offloaded teacher asks of the device, in its order, and what it read; and what one
    that is not offloaded read."""
    from unittest import mock

    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform
    from megatron_taopd.teacher import megatron
    from megatron_taopd.teacher.megatron import MegatronTeacher

    platform.emulate_cuda()
    layouts.student_layout(1, 1)
    layout, calls = layouts.forward_layout(1, 1), []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    copy, forward = torch.Tensor.copy_, megatron.forward

    def copied(self, source, non_blocking=False):
        if current[-1] == "copies":
            calls.append("copy" if non_blocking else "copy that blocks")
        current.append("inside")  # torch looks `copy_` up again to tell a mode of it
        copy(self, source)
        current.pop()
        return self

    def run(*args):
        calls.append("forward")
        return forward(*args)

    @contextmanager
    def on(stream):
        current.append(stream.name)
        yield
        current.pop()

    current = ["computing"]
    plain = MegatronTeacher(teacher_dir, layout, torch.float32, 64)
    with plain.resident():
        expected = plain.read(batch).held.rows
    with (
        mock.patch.object(torch.cuda, "Stream", lambda: Stream("copies")),
        mock.patch.object(torch.cuda, "current_stream", lambda *_: Stream("computing")),
        mock.patch.object(torch.cuda, "stream", on),
        mock.patch.object(torch.Tensor, "copy_", copied),
        mock.patch.object(megatron, "forward", run),
        mock.patch.object(platform, "empty_cache", lambda: calls.append("empty cache")),
    ):
        teacher = MegatronTeacher(teacher_dir, layout, torch.float32, 64, offload=True)
        host = [parameter.data_ptr() for parameter in teacher.trunk.parameters()]
        with teacher.resident():
            calls.append("servers generate")
            away = [parameter.data_ptr() for parameter in teacher.trunk.parameters()]
            rows = teacher.read(batch).held.rows
        back = [parameter.data_ptr() for parameter in teacher.trunk.parameters()]
    moved = not {*host} & {*away} and back == host
    return calls, moved, torch.equal(rows, expected)


def test_offloaded_weights_travel_while_others_work(teacher_dir):
    batch = make_batch(VOCABULARY, num_sequences=4)
    ((calls, moved, equal),) = run_ranks(1, order_of_an_offload, teacher_dir, batch)
    assert moved and equal
    copies = calls.count("copy")
    assert copies > 10
    assert calls == [
        "copies waits for computing",
        *["copy"] * copies,
        "servers generate",  # nobody has waited for the copies
        "computing waits for copies",
        "forward",
        "computing waits for copies",
        "empty cache",  # once nothing refers to the weights on the device
    ]


def peak_of_reading(teacher_dir, batch, micro_batch_tokens):
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.memory import peak_memory
    from megatron_taopd.teacher.megatron import MegatronTeacher

    platform.emulate_cuda()
    layouts.student_layout(1, 1)
    layout = layouts.forward_layout(1, 1)
    teacher = MegatronTeacher(teacher_dir, layout, torch.float32, micro_batch_tokens)
    with teacher.resident(), peak_memory() as memory:
        part = teacher.read(batch)
    return part.held.rows.nbytes, memory.peak


def test_reading_has_every_row_once(teacher_dir):
    """And what micro-batches of 64 tokens and numbers of rows need: half as much as these narrow
    rows."""
    batch = make_batch(VOCABULARY, num_sequences=1200)
    ((held, peak),) = run_ranks(1, peak_of_reading, teacher_dir, batch, 64)
    assert held == batch.num_rows * WIDTH * 4
    assert peak < 1.9 * held
