"""Bytes of device memory by rank and phase: what is alive, and what makes the peak.

Each item is what the code that allocates it takes; docs/plan.md says where that is. Ranks of one
student stage, one teacher stage and the same servers next to them differ in nothing but padding.

Letters: T tokens of a micro-batch, R rows, e bytes of an element.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_taopd.parallel.exchange import rounds
from megatron_taopd.parallel.packing import EXPORT_BYTES
from megatron_taopd.parallel.vocab.projection import logits_bytes, rows_within
from megatron_taopd.plan.collectives import asking
from megatron_taopd.plan.setup import Servers, Setup, Share
from megatron_taopd.plan.shapes import (
    Architecture,
    Grid,
    buffer_elements,
    optimizer_bytes,
    optimizer_elements,
    parameter_elements,
    student_buffers,
)
from megatron_taopd.rollout.engine import CACHE_ROOM

GIB = 2**30

# What to change when an item is the largest of a phase that does not fit.
REMEDIES = {
    "student weights": "student.parallel.tp or pp",
    "gradients": "student.parallel.tp or pp",
    "optimizer states": "student.parallel.tp or pp, or more GPUs",
    "moving average": "student.parallel.tp or pp, or more GPUs",
    "average on its way": "student.parallel.tp or pp, or more GPUs",
    "gather buffer": "train.micro_batch_tokens",
    "teacher trunk": "teacher.parallel.tp, pp or ep, or teacher.offload: true",
    "other teachers": "teachers.NAME.offload: true, or servers.gpus",
    "teacher head": "student.parallel.tp",
    "rollout copy": "rollout.engine: sglang",
    "rollout servers": "rollout.servers.mem_fraction, or rollout.sync.release_memory: true",
    "teacher servers": "teacher.servers.mem_fraction or gpus",
    "KV cache": "rollout.batch_size",
    "prefill": "rollout.batch_size",
    "sampling": "rollout.batch_size",
    "forward pass": "train.micro_batch_tokens, or parallel.cp",
    "rows read": "rollout.prompts, or more data or context parallelism of the teacher",
    "rows in transit": "rollout.prompts",
    "teacher rows": "rollout.prompts, or more data or context parallelism of the student",
    "kept teacher rows": "selection.ratio",
    "logits": "train.head_memory_mib",
    "kept layer outputs": "train.replay_memory_mib, or train.schedule: two_pass",
    "activations": "train.recompute: full, or train.micro_batch_tokens, or parallel.cp",
    "backward of a layer": "train.micro_batch_tokens, or parallel.cp",
    "Adam's temporaries": "Apex or TransformerEngine, or student.parallel.tp",
    "whole tensors": "rollout.sync.bucket_mib",
    "cached by torch": "rollout.sync.bucket_mib",
}


@dataclass(frozen=True)
class Place:
    """Ranks that hold the same: the first of them, how many, and what they hold."""

    rank: int
    count: int
    stage: int  # of the student
    teacher_stage: int | None
    servers: tuple[str, ...]  # that share the device
    asks: float  # share of a served teacher's servers that it asks, and so of all rows that it has


def places(setup: Setup) -> list[Place]:
    """List all kinds of ranks of a run, in the order of their first rank."""
    found: dict[tuple, list[int]] = {}
    for rank, key in enumerate(zip(*(_held(each) for each in setup.each), strict=True)):
        found.setdefault(key, []).append(rank)
    return [Place(ranks[0], len(ranks), *key[0]) for key, ranks in found.items()]


def _held(setup: Setup) -> Iterator[tuple]:
    """Yield what each rank holds: the fields of its `Place` after rank and count."""
    teacher, served = setup.teacher_grid, setup.teacher_servers
    asked = Counter() if served is None else asking(setup, served)
    for rank in range(setup.gpus):
        local = rank if rank < setup.gpus_per_node else None
        servers = tuple(
            name
            for name, each in (("rollout", setup.rollout), ("teacher", served))
            if each is not None and local in each.gpus
        )
        asks = asked[rank] / max(asked.total(), 1)
        yield setup.student_grid.stage(rank), teacher and teacher.stage(rank), servers, asks


def phases(
    setup: Setup, place: Place, memory_gib: float, cuda: bool = True
) -> dict[str, dict[str, int]]:
    """Count the bytes of everything that is alive at the worst moment of each phase, by item.

    Of several teachers a phase has the items of the one with which it takes most, as if the whole
    batch were that one's: what share of a batch is whose, the prompts decide.

    Args:
        memory_gib: of the device, of which colocated servers take a share.
        cuda: as for `activation_bytes`.
    """
    if not setup.others:
        return _phases(setup, place, memory_gib, cuda, others=0)
    each = setup.each
    own = [Place(place.rank, place.count, *[*_held(one)][place.rank]) for one in each]
    stays = [_stays(*those, memory_gib) for those in zip(each, own, strict=True)]
    found: dict[str, dict[str, int]] = {}
    for one, its_place, its_own in zip(each, own, stays, strict=True):
        by_phase = _phases(one, its_place, memory_gib, cuda, others=sum(stays) - its_own)
        for phase, items in by_phase.items():
            if sum(items.values()) > sum(found.get(phase, {}).values()):
                found[phase] = items
    return found


def _stays(setup: Setup, place: Place, memory_gib: float) -> int:
    """Count the bytes of a teacher that are on the device while others read."""
    own, size = setup.teacher_grid, 0
    if own is not None and not setup.offload:
        elements = parameter_elements(setup.teacher, own, place.teacher_stage, head=False)
        size += elements * setup.itemsize
    if "teacher" in place.servers:
        size += _share(setup.teacher_servers, memory_gib)
    return size


def _phases(
    setup: Setup, place: Place, memory_gib: float, cuda: bool, others: int
) -> dict[str, dict[str, int]]:
    """Count the bytes by phase with one teacher, while others have so many on the device."""
    student, teacher, work, e = setup.student, setup.teacher, setup.workload, setup.itemsize
    grid, own = setup.student_grid, setup.teacher_grid
    share = work.share(grid, setup.micro_batch_tokens)
    tokens = share.tokens_at_a_time
    last = place.stage == grid.pp - 1

    buffers = student_buffers(student, grid, place.stage)
    elements = buffer_elements(buffers)
    owned = optimizer_elements(buffers, grid.data_ranks)
    resident = {
        "student weights": elements * e,
        "gradients": elements * 4,
        "optimizer states": optimizer_bytes(owned, e),
    }
    if setup.average:
        resident["moving average"] = owned * 4
    if grid.sequence:  # one buffer for all layers' gathered inputs, which Megatron keeps
        resident["gather buffer"] = tokens * student.hidden * e
    if last and not setup.columns_only:
        resident["teacher head"] = student.vocab // grid.tp * teacher.hidden * e
    trunk = 0
    if own is not None:
        trunk = parameter_elements(teacher, own, place.teacher_stage, head=False) * e
    if trunk and not setup.offload:
        resident["teacher trunk"] = trunk
    resident["other teachers"] = others
    if setup.rollout is None:
        resident["rollout copy"] = student.elements * e
    if "teacher" in place.servers:
        resident["teacher servers"] = _share(setup.teacher_servers, memory_gib)
    servers = (
        {"rollout servers": _share(setup.rollout, memory_gib)} if "rollout" in place.servers else {}
    )
    if not setup.release_memory:
        resident |= servers
        servers = {}

    # What the teacher said stays where it was read until it is where it is scored.
    row = (2 * setup.k + 1) * 4 if setup.columns_only else teacher.hidden * e
    reads, sends = 0, 0
    if place.asks:
        reads, sends = round(place.asks * work.sequences * work.response) * row, grid.tp
    elif own is not None and place.teacher_stage == own.pp - 1:
        read_here = work.as_read.share(own, setup.micro_batch_tokens)
        reads, sends = read_here.rows * row, -(-grid.tp // own.tp)
    read = {"teacher trunk": trunk, "rows read": reads}
    scored = {"teacher rows": share.rows * row} if last else {}
    found = {"rollout": resident | servers | (read if setup.stream else {})}
    if setup.rollout is None:
        found["rollout"] |= _rollout(setup)
    if own is not None:
        # Servers give memory back once every answer is read (`engine.offload`), streamed or not.
        by_teacher = work.as_read.share(own, setup.micro_batch_tokens)
        at_a_time = by_teacher.tokens_at_a_time
        at_hand = {"forward pass": forward_bytes(teacher, own, at_a_time, e, by_teacher.cp)}
        # Before it, the student's own weights are put aside.
        if setup.average and (moved := owned * e + _export(setup)) > at_hand["forward pass"]:
            at_hand = {"average on its way": moved}
        found["teacher"] = resident | servers | read | at_hand
    most = max(sends * reads, *scored.values(), row) // row
    in_transit = sends * reads // rounds(most)
    found["exchange"] = resident | {"rows read": reads} | scored | {"rows in transit": in_transit}

    rows = share.rows_at_a_time
    columns = student.vocab // grid.tp
    chunk = rows_within(setup.head_memory, columns)
    # The heads' turn is when the layers are done.
    work_at_hand = {"forward pass": forward_bytes(student, grid, tokens, e, share.cp)}
    if last:
        picked = rows * (student.hidden * e + row) + tokens * student.hidden * e
        logits = logits_bytes(rows, chunk, columns) + picked
        if logits > work_at_hand["forward pass"]:
            work_at_hand = {"logits": logits}
    kept = {}
    if setup.replay:
        outputs = replay_bytes(student, grid, share.tokens, e)
        if outputs <= setup.replay_memory:
            kept = {"kept layer outputs": outputs}
    found["scoring"] = resident | scored | kept | work_at_hand
    base = resident | scored | kept
    if last and not kept and grid.data_ranks > 1:  # at the ranks that train their sequences
        base["kept teacher rows"] = round(work.kept * share.rows) * row
    found["training"] = base | _training(setup, place.stage, share, bool(kept), cuda)
    found["optimizer"] = resident | scored | {"Adam's temporaries": owned * 4}
    found["sync"] = resident | servers | scored | _sync(setup)
    found["checkpoint"] = resident
    if setup.release_memory and "rollout" in place.servers:
        _add_cached(found)
    return {
        phase: {item: size for item, size in items.items() if size}
        for phase, items in found.items()
    }


def _add_cached(found: dict[str, dict[str, int]]) -> None:
    """Add what torch's allocator has reserved and does not use, while servers are there, too.

    It is emptied before the servers take their memory again, and grows with the phases after that.
    In one process it is used again, and so adds nothing to the peak where no server comes back.
    """
    reserved = 0
    for phase in ("sync", "rollout", "teacher"):
        if (items := found.get(phase)) is not None:
            own = sum(items.values()) - items.get("rollout servers", 0)
            reserved = max(reserved, own)
            found[phase] = items | {"cached by torch": reserved - own}


def host_bytes(setup: Setup, place: Place) -> dict[str, int]:
    """Count what a rank holds in the memory of its host, by item.

    A save keeps 12 bytes of every element that the rank's optimizer owns, its fp32 weight and
    moments, 4 more of a moving average, and the model's own weight (`checkpoints.shards`), in
    pinned memory that stays for the next one. An offloaded teacher stays in pinned memory for the
    whole run, and so do the heads of several. None is rounded up (`parallel.copies.HostCopies`).
    """
    student, grid = setup.student, setup.student_grid
    owned = optimizer_elements(student_buffers(student, grid, place.stage), grid.data_ranks)
    found = {"a save": owned * (12 + 4 * setup.average + setup.itemsize)}
    offloaded = heads = 0
    for each in setup.each:
        own = each.teacher_grid
        if own is not None and each.offload:
            stage = own.stage(place.rank)
            elements = parameter_elements(each.teacher, own, stage, head=False)
            offloaded += elements * setup.itemsize
        if not each.columns_only and place.stage == grid.pp - 1:
            heads += student.vocab // grid.tp * each.teacher.hidden * setup.itemsize
    if offloaded:
        found["offloaded teacher"] = offloaded
    if setup.others:
        found["teacher heads"] = heads
    return found


def peak(by_phase: dict[str, dict[str, int]]) -> tuple[str, int]:
    """Return (phase, bytes) of the worst moment."""
    sums = {phase: sum(items.values()) for phase, items in by_phase.items()}
    worst = max(sums, key=sums.get)
    return worst, sums[worst]


def peak_bytes(setup: Setup, memory_gib: float) -> int:
    """Return the peak of the worst rank."""
    return max(peak(phases(setup, place, memory_gib))[1] for place in places(setup))


def problems(place: Place, by_phase: dict[str, dict[str, int]], usable: float) -> Iterator[str]:
    """Yield a line for each phase of these ranks that does not fit into `usable` bytes."""
    for phase, items in by_phase.items():
        if (total := sum(items.values())) <= usable:
            continue
        largest = max(items, key=items.get)
        yield (
            f"rank {place.rank} (and {place.count - 1} like it): {phase} needs "
            f"{total / GIB:.1f} GiB of {usable / GIB:.1f}; largest: {largest}, "
            f"{items[largest] / GIB:.1f} GiB: change {REMEDIES[largest]}"
        )


# ---------------------------------------------------------------------------------------- passes


def activation_bytes(
    model: Architecture, grid: Grid, tokens: int, itemsize: int, recompute: str, cuda: bool = True
) -> int:
    """Count the bytes that autograd keeps of one layer and T tokens of a micro-batch, on one rank.

    Args:
        recompute: none, selective (core attention) or full.
        cuda: fused norms and flash attention, as on CUDA. On the CPU a norm keeps its input and
            its result before the weight in fp32, and attention its output twice.
    """
    e, tp = itemsize, grid.tp
    hidden = model.hidden // grid.shards
    if recompute == "full":
        return tokens * hidden * e
    heads, groups = model.heads // tp, max(1, model.groups // tp)
    queries, keys = heads * model.head_dim, groups * model.head_dim
    # The projections together; ranks that share a key-value head have them all.
    shards = tp if model.groups >= tp else 1
    projected = (model.queries + 2 * model.keys) // shards * e

    def norm(width: int, rows: float, input_is_kept: bool = False) -> float:
        if cuda:
            return (0 if input_is_kept else width * e) + 4 * rows
        return 4 * width * (1 if input_is_kept and e == 4 else 2) + 4 * rows

    per_token = norm(hidden, 1 / grid.shards) + hidden * e + projected
    if model.qk_norm:
        # Keys are a view of the projections, and so are queries if they lie side by side there.
        per_token += norm(queries, heads, groups in (1, heads))
        per_token += norm(keys, groups, True)
    per_token += (2 * queries + keys) * e  # rotated, and the output
    if recompute == "none":
        per_token += 4 * heads + (0 if cuda else queries * e)
    per_token += norm(hidden, 1 / grid.shards) + hidden * e
    if model.experts:
        # The router's logits and choices; of each choice the token, gate and up, SiLU, up + 0,
        # their product, that times its probability, and where it came from.
        per_choice = (model.hidden + 6 * model.ffn // tp) * e + 4 + 2 * 8
        per_token += 4 * model.experts + model.experts_per_token * (8 + per_choice)
    else:
        per_token += 5 * model.ffn // tp * e  # gate and up, SiLU, up + 0, their product
    return round(tokens * per_token)


def stage_activation_bytes(
    model: Architecture, grid: Grid, stage: int, tokens: int, itemsize: int,
    recompute: str, cuda: bool = True,
) -> int:  # fmt: skip
    """Return what a whole stage keeps of one micro-batch."""
    layer = activation_bytes(model, grid, tokens, itemsize, recompute, cuda)
    total = model.layers // grid.pp * layer
    hidden = model.hidden // grid.shards
    if stage == 0:
        total += 8 * tokens  # ids
    if recompute == "none":
        total += 2 * tokens * model.head_dim * itemsize  # cosines and sines, the same in all layers
    if stage == grid.pp - 1:
        # The last norm's input, and on CUDA its result, which the head reads.
        total += tokens * hidden * 2 * (itemsize if cuda else 4)
        total += 4 * tokens // grid.shards
    return total


def recomputed(recompute: str, grid: Grid) -> str:
    """Return what is computed again: without TransformerEngine, attention over shared sequences."""
    return "selective" if grid.cp > 1 and recompute == "none" else recompute


def shared_keys(model: Architecture, grid: Grid, cp: int) -> int:
    """Count the elements of gathered keys and values for each token of a rank.

    All ranks' keys and values, and those that this rank's two chunks attend to, in their order.
    """
    if cp == 1:
        return 0
    return (4 * cp + 1) * model.head_dim * max(1, model.groups // grid.tp)


def forward_bytes(model: Architecture, grid: Grid, tokens: int, itemsize: int, cp: int = 1) -> int:
    """Count the most bytes that a layer has alive without a graph, its input included.

    In the MLP: the input, the residual, its norm, gate and up, SiLU, up + 0, their product. In
    attention: the projections, normed, rotated. Routed tokens are counted evenly spread over the
    experts: sent, received, sorted by expert, and their results.

    Args:
        cp: ranks that share the sequences; 1: they are whole.
    """
    hidden = model.hidden // grid.shards
    gathered = model.hidden if grid.sequence else 0
    if model.experts:
        # Without sequence parallelism every TP rank sends all tokens to its experts.
        routed = model.experts_per_token * tokens // grid.shards
        experts = routed * (grid.tp if grid.sequence else 1) * 4 * model.hidden
        per_expert = experts // 4 // model.hidden * grid.ep // model.experts
        inner = per_expert * 5 * model.ffn // grid.tp
        keys = tokens * shared_keys(model, grid, cp)
        return (tokens * 3 * hidden + max(experts + inner, keys)) * itemsize
    attention = 3 * (model.queries + 2 * model.keys) // min(grid.tp, model.groups)
    attention += shared_keys(model, grid, cp)
    mlp = 5 * model.ffn // grid.tp
    return tokens * (4 * hidden + gathered + max(attention, mlp)) * itemsize


def backward_bytes(model: Architecture, grid: Grid, tokens: int, itemsize: int, cp: int = 1) -> int:
    """Count the bytes of gradients that a layer has alive in addition to what autograd kept.

    In the MLP these are the output's, the residual's, and those of gate and up; with experts, the
    last of each choice of a token, and its own; in attention over shared sequences gathered keys
    and values, and their gradients.
    """
    gathered = model.hidden if grid.sequence else 0
    mlp = 2 * model.ffn // grid.tp
    if model.experts:
        mlp = model.experts_per_token * (model.hidden + mlp)
    inner = max(mlp, 2 * shared_keys(model, grid, cp))
    return tokens * (2 * model.hidden // grid.shards + gathered + inner) * itemsize


def replay_bytes(model: Architecture, grid: Grid, tokens: int, itemsize: int) -> int:
    """Count the bytes of layers' outputs that a rank keeps (`models.replay.kept_bytes`)."""
    return model.layers // grid.pp * -(-tokens // grid.shards) * model.hidden * itemsize


def in_flight(grid: Grid, stage: int, micro_batches: int) -> int:
    """Count the micro-batches whose activations a stage holds at a time, in 1F1B."""
    return min(micro_batches, grid.pp - stage)


# --------------------------------------------------------------------------------------- details


def _training(setup: Setup, stage: int, share: Share, replayed: bool, cuda: bool) -> dict[str, int]:
    student, grid, work, e = setup.student, setup.student_grid, setup.workload, setup.itemsize
    last, tokens = stage == grid.pp - 1, share.tokens_at_a_time
    flying = in_flight(grid, stage, share.micro_batches)
    own = recomputed(setup.recompute, grid)
    recompute = "full" if replayed else own
    activations = stage_activation_bytes(student, grid, stage, tokens, e, recompute, cuda)
    if replayed:  # outputs are handed over from the kept ones as they are looked up
        activations -= (student.layers - 1) * tokens * student.hidden // grid.shards * e
    largest = max(
        (elements // grid.tp if cut else elements for _, elements, cut, _ in student.layer)
    )
    # A layer's gradients, and the graph of one that runs again.
    layer = backward_bytes(student, grid, tokens, e, share.cp) + largest * e
    if recompute == "full":
        inner = recomputed("none", grid) if own == "full" or not replayed else own
        layer += activation_bytes(student, grid, tokens, e, inner, cuda)
    items = {"activations": activations * flying}
    if last:
        rows = max(1, round(work.kept * share.rows_at_a_time))
        columns = student.vocab // grid.tp
        chunk = rows_within(setup.head_memory, columns)
        logits = logits_bytes(rows, chunk, columns)
        # Rows of both models and the student's gradient, which is fp32 at first.
        logits += rows * (student.hidden * 2 + setup.teacher.hidden) * e
        logits += min(rows, chunk) * student.hidden * 4 if cuda and e == 2 else 0
        if logits > layer:
            return items | {"logits": logits}
    return items | {"backward of a layer": layer}


def _rollout(setup: Setup) -> dict[str, int]:
    """Count the in-process engine's bytes: a cache, one layer of it twice, logits and noise."""
    student, work, e = setup.student, setup.workload, setup.itemsize
    batch = min(setup.batch_size, -(-work.sequences // setup.gpus))
    longest = work.prompt + setup.longest_response
    cache = batch * (longest + CACHE_ROOM) * 2 * student.keys * e
    columns = batch * student.vocab
    alone = Grid()
    return {
        "KV cache": cache * (student.layers + 1),
        # The model's logits, fp32 copies with and without noise, and a block of random bits.
        "sampling": columns * (e + 12) + 16 * min(columns, max(2**26, student.vocab)),
        "prefill": forward_bytes(student, alone, batch * work.prompt, e),
    }


def _export(setup: Setup) -> int:
    """Count the bytes of a bucket of the export, its shards and a whole parameter."""
    e, grid = setup.itemsize, setup.student_grid
    whole = setup.student.largest * e
    together = min(max(whole, EXPORT_BYTES), setup.student.elements * e)
    found = 0
    if grid.tp * grid.pp > 1:
        found += together // grid.tp
    if grid.tp > 1:
        found += together + whole
    return found


def _sync(setup: Setup) -> dict[str, int]:
    """Count the bytes of the export, and of buckets on their way to servers.

    A rank that broadcasts to servers has two of these: one on its way, one being filled.
    """
    found = _export(setup)
    if setup.rollout is not None:
        buckets = 1 + (setup.sync_way == "distributed")
        found += buckets * min(setup.sync_bucket, setup.student.elements * setup.itemsize)
    return {"whole tensors": found}


def _share(servers: Servers, memory_gib: float) -> int:
    return round(servers.mem_fraction * memory_gib * GIB)
