"""Seconds by phase: operations over attained rates, bytes over attained bandwidths.

Estimates from arithmetic. Every sequence has the workload's length, every rank its even share, and
what a rate attains of its peak is a field of `Cluster`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_taopd.monitoring.accounting import Work, added, step_operations
from megatron_taopd.monitoring.throughput import throughput
from megatron_taopd.plan import links
from megatron_taopd.plan.cluster import Cluster
from megatron_taopd.plan.collectives import sources
from megatron_taopd.plan.memory import replay_bytes
from megatron_taopd.plan.setup import Setup
from megatron_taopd.plan.shapes import (
    Architecture,
    Grid,
    exported,
    optimizer_elements,
    parameter_elements,
    student_buffers,
)


@dataclass(frozen=True)
class Phase:
    """A phase's time.

    Attributes:
        seconds: of the step.
        parts: what it is made of, in seconds; they need not add up where some overlap.
    """

    seconds: float
    parts: dict[str, float]


def step_phases(setup: Setup, cluster: Cluster) -> dict[str, Phase]:
    """Return the phases of a step in their order; they follow one another.

    `checkpoint` is not of every step. Of several teachers each reads an equal share of the
    sequences, one after the other.
    """
    if setup.others:
        return _phases_of_several(setup, cluster)
    run = _work(setup)
    operations = step_operations(setup.student.cost, setup.teacher.cost, run)
    return {
        "rollout": rollout(setup, cluster),
        "teacher": teacher(setup, cluster, operations["flops/teacher"]),
        "exchange": exchange(setup, cluster),
        "scoring": scoring(setup, cluster),
        "training": training(setup, cluster, operations["flops/training"], run.kept_rows),
        "optimizer": optimizer(setup, cluster),
        "sync": sync(setup, cluster),
        "checkpoint": checkpoint(setup, cluster),
    }


def _phases_of_several(setup: Setup, cluster: Cluster) -> dict[str, Phase]:
    """Return the phases of a step whose teachers read in turn; the others are means over them."""
    whole = [step_phases(each, cluster) for each in setup.each]
    read = [step_phases(each, cluster) for each in _shares(setup)]

    def weighted(phases: Sequence[Phase], weight: float) -> Phase:
        parts: Counter[str] = Counter()
        for phase in phases:
            parts.update({name: weight * seconds for name, seconds in phase.parts.items()})
        return Phase(weight * sum(phase.seconds for phase in phases), dict(parts))

    return {
        name: weighted([each[name] for each in read], 1)
        if name in ("teacher", "exchange")
        else weighted([each[name] for each in whole], 1 / len(whole))
        for name in whole[0]
    }


def _shares(setup: Setup) -> list[Setup]:
    """Return the run with each teacher alone and its share of the sequences."""
    share = -(-setup.workload.sequences // len(setup.each))
    return [replace(each, workload=replace(each.workload, sequences=share)) for each in setup.each]


def _work(setup: Setup) -> Work:
    """Return what a step runs."""
    work = setup.workload
    lengths = torch.full((work.sequences,), work.length)
    return Work(
        scored=lengths - 1,
        read=torch.full((work.sequences,), work.as_read.length - 1),
        trained=(lengths.double() * work.trained).ceil().long(),
        num_rows=work.sequences * work.response,
        kept_rows=max(1, round(work.kept * work.sequences * work.response)),
        replayed=is_replayed(setup),
        recompute=setup.recompute,
        generated=(torch.arange(work.sequences) < work.generated) * work.response,
    )


def step_throughput(setup: Setup, cluster: Cluster, phases: dict[str, Phase]) -> dict[str, float]:
    """Return the `perf/*` that a run of these phases would log (`monitoring.throughput`).

    A run's teacher phase has the exchange, and its training the optimizer.
    """
    run, seconds = _work(setup), {name: phase.seconds for name, phase in phases.items()}
    record = added(
        step_operations(each.student.cost, each.teacher.cost, _work(each))
        for each in _shares(setup)
    )
    record |= {
        "time/teacher": seconds["teacher"] + seconds["exchange"],
        "time/scoring": seconds["scoring"],
        "time/training": seconds["training"] + seconds["optimizer"],
        "time/step": step_seconds(phases, setup.waits),
        "valid_rows": run.num_rows,
        "tokens_generated": (generated := int(run.generated.sum())),
        "tokens_rolled_out": setup.workload.sequences * setup.workload.length,
        "tokens_read": int(run.read.sum()),
        "tokens_scored": int(run.scored.sum()),
        "tokens_trained": int(run.trained.sum()),
    }
    if generated:
        record["rollout/tokens_per_second"] = generated / seconds["rollout"]
    if all(each.teacher_grid is None for each in setup.each):
        record["teacher/tokens_per_second"] = record["tokens_read"] / seconds["teacher"]
    peak = cluster.fp32_tflops if setup.itemsize == 4 else cluster.bf16_tflops
    return throughput(record, setup.used, peak)


def step_seconds(phases: dict[str, Phase], waits: int = 0) -> float:
    """Return a step's time, without checkpoints.

    Servers that generate while the student trains are kept from it by an update of the weights
    alone, and the longest response has so many steps to end in, and the rollout of one more.

    Args:
        waits: `Setup.waits`; 0: one phase after the other.
    """
    generated = phases["rollout"].seconds
    rest = sum(p.seconds for name, p in phases.items() if name not in ("rollout", "checkpoint"))
    if not waits:
        return generated + rest
    busy = generated - phases["rollout"].parts["longest response"] + phases["sync"].seconds
    return max(rest, busy, (generated + rest) / (waits + 1))


def is_replayed(setup: Setup) -> bool:
    """Tell whether training replays the layers' outputs: asked for, and within their memory."""
    grid = setup.student_grid
    share = setup.workload.share(grid, setup.micro_batch_tokens)
    outputs = replay_bytes(setup.student, grid, share.tokens, setup.itemsize)
    return setup.replay and outputs <= setup.replay_memory


# ----------------------------------------------------------------------------------------- rates


def _compute_rate(setup: Setup, cluster: Cluster, fraction: float) -> float:
    peak = cluster.fp32_tflops if setup.itemsize == 4 else cluster.bf16_tflops
    return peak * 1e12 * fraction


def _link_rate(setup: Setup, cluster: Cluster, span: int) -> float:
    """Return the rate over `span` ranks in a row: NVLink inside a node, else the network."""
    inside = span <= setup.gpus_per_node
    rate = cluster.nvlink_gb_s / 2 if inside else cluster.network_gb_s
    return rate * 1e9 * cluster.link_fraction


def pipeline_seconds(stage: float, last: float, pp: int, micro_batches: int) -> float:
    """Return a pipeline's time: the slowest stage's work, and the others' first micro-batch.

    Args:
        stage, last: seconds of a micro-batch on a stage, and on the last one with its heads.
    """
    return micro_batches * max(stage, last) + (pp - 1) * stage


# ---------------------------------------------------------------------------------------- phases


def rollout(setup: Setup, cluster: Cluster) -> Phase:
    """Estimate prefill by operations, decoding by the weights and cache read for every token.

    Where the average response is shorter than the longest, that one is waited for alone. What is
    under way when weights come has its cache computed again, unless it is kept.
    """
    model, work, served = setup.student, setup.workload, setup.rollout
    replicas, tp, at_once = setup.gpus, 1, setup.batch_size
    if served is not None:
        replicas, tp, at_once = served.replicas, served.tp, served.concurrency
    layer_seconds = cluster.local_layer_us * 1e-6 if served is None else 0.0
    rate = _compute_rate(setup, cluster, cluster.trunk_fraction) * tp
    memory_rate = cluster.hbm_gb_s * 1e9 * cluster.hbm_fraction * tp
    pending = -(-work.generated // replicas)
    if not pending:
        return Phase(0.0, {"prefill": 0.0, "decode": 0.0})
    batch = min(at_once, pending)
    waves = -(-pending // batch)
    prompts = torch.full((pending,), work.prompt)
    prefill = model.cost.trunk(prompts) / rate

    weights = model.elements * setup.itemsize
    token = 2 * model.layers * model.keys * setup.itemsize
    cache = batch * token * (work.prompt + work.response / 2)
    operations = batch * (
        model.cost.per_token
        + model.cost.per_row
        + model.cost.per_pair * (work.prompt + work.response / 2)
    )
    step = max((weights + cache) / memory_rate, operations / rate, layer_seconds * model.layers)
    decode = waves * work.response * step
    alone = setup.horizon * max(weights / memory_rate, layer_seconds * model.layers)
    parts = {
        "prefill": prefill,
        "decode": decode,
        "longest response": max(0.0, alone - decode),
    }
    if setup.ahead and not setup.keep_cache:
        half_done = torch.full((setup.ahead * pending,), work.prompt + work.response // 2)
        parts["cache again"] = model.cost.trunk(half_done) / rate
    return Phase(sum(parts.values()), parts)


def teacher(setup: Setup, cluster: Cluster, operations: float) -> Phase:
    """Estimate the teacher's forward pass.

    Args:
        operations: of the trunk, over all ranks.
    """
    setup = replace(setup, workload=setup.workload.as_read)
    model, grid, work = setup.teacher, setup.teacher_grid, setup.workload
    if grid is None:
        served = setup.teacher_servers
        ranks = served.replicas * served.tp
        rate = _compute_rate(setup, cluster, cluster.trunk_fraction)
        seconds = operations / (ranks * rate)
        return Phase(seconds, {"prefill": seconds})
    if model.experts and not grid.sequence:  # each token runs through its experts tp times
        inner = 6 * model.layers * model.hidden * model.ffn * model.experts_per_token
        operations += (grid.tp - 1) * inner * work.sequences * work.length
    forward = _forward(setup, cluster, model, grid, operations)
    parts = {"compute": forward.compute, "tensor parallel": forward.tensor}
    if grid.cp > 1:
        parts["context parallel"] = forward.context
    if grid.ep > 1:
        parts["experts"] = forward.experts
    stage = forward.compute + forward.tensor + forward.experts + forward.pipeline
    stage += forward.context
    seconds = pipeline_seconds(stage, stage, grid.pp, forward.micro_batches)
    parts = {name: forward.micro_batches * value for name, value in parts.items()}
    parts["bubble"] = seconds - forward.micro_batches * stage
    if setup.offload:
        resident = max(
            parameter_elements(model, grid, stage, head=False) for stage in range(grid.pp)
        )
        parts["weights to the device"] = (
            resident * setup.itemsize / (cluster.pcie_gb_s * 1e9 * cluster.link_fraction)
        )
        seconds += parts["weights to the device"]
    if setup.average:
        # Gathered over the data-parallel ranks and put back; between that, as in `sync`.
        parts["average"] = 2 * _gather_weights(setup, cluster) + sum(
            _export(setup, cluster).values()
        )
        seconds += parts["average"]
    return Phase(seconds, parts)


def exchange(setup: Setup, cluster: Cluster) -> Phase:
    """Estimate the all-to-all that takes the teacher's rows to the ranks that score them."""
    grid, own, work = setup.student_grid, setup.teacher_grid, setup.workload
    width = setup.teacher.hidden
    if setup.columns_only:
        width = (2 * setup.k + 1) * 4 // setup.itemsize
    readers, teacher_tp = (own.data_ranks, own.tp) if own is not None else (1, 1)
    rows = work.sequences * work.response
    sent, received = links.hidden_state_bytes(
        rows, width, setup.itemsize, grid.tp, grid.data_ranks, readers, teacher_tp
    )
    seconds = max(sent, received) / _link_rate(setup, cluster, setup.gpus)
    return Phase(seconds, {"all-to-all": seconds})


def scoring(setup: Setup, cluster: Cluster) -> Phase:
    """Estimate the student's forward pass, and both heads on the last stage: the others wait."""
    model, grid, work = setup.student, setup.student_grid, setup.workload
    lengths = torch.full((work.sequences,), work.length - 1)
    forward = _forward(setup, cluster, model, grid, model.cost.trunk(lengths))
    rows = work.share(grid, setup.micro_batch_tokens).rows_at_a_time
    per_row = model.cost.per_row + (0 if setup.columns_only else setup.teacher.cost.per_row)
    heads = rows * per_row / grid.tp / _compute_rate(setup, cluster, cluster.head_fraction)
    collective = links.score_bytes(rows, setup.k, grid.tp) + links.pick_rows_bytes(
        forward.tokens, rows, model.hidden, setup.itemsize, grid.tp, grid.sequence, backward=False
    )
    heads += collective / _link_rate(setup, cluster, grid.tp)
    stage = forward.compute + forward.tensor + forward.experts + forward.pipeline
    stage += forward.context
    seconds = pipeline_seconds(stage, stage + heads, grid.pp, forward.micro_batches)
    count = forward.micro_batches
    return Phase(
        seconds,
        {
            "compute": count * forward.compute,
            "tensor parallel": count * forward.tensor,
            **({"context parallel": count * forward.context} if grid.cp > 1 else {}),
            **({"experts": count * forward.experts} if grid.ep > 1 else {}),
            "heads": count * heads,
            "bubble": seconds - count * (stage + heads),
        },
    )


def training(setup: Setup, cluster: Cluster, operations: float, kept: int) -> Phase:
    """Estimate the training pass over the kept rows.

    Args:
        operations: of trunk and heads, over all ranks.
        kept: rows, likewise.
    """
    model, grid, work, e = setup.student, setup.student_grid, setup.workload, setup.itemsize
    teacher_row = 0 if setup.columns_only else setup.teacher.cost.per_row
    head_operations = kept * (3 * model.cost.per_row + teacher_row)
    trunk_operations = operations - kept * (3 * model.cost.per_row + setup.teacher.cost.per_row)
    forward = _forward(setup, cluster, model, grid, trunk_operations)
    tokens = round(forward.tokens * work.trained)
    layers = model.layers // grid.pp
    again = setup.recompute == "full" and not is_replayed(setup)
    tensor_bytes = (1 + again) * links.trunk_forward_bytes(
        tokens, model.hidden, layers, e, grid.tp
    ) + links.trunk_backward_bytes(tokens, model.hidden, layers, e, grid.tp, grid.sequence)
    tensor = tensor_bytes / _link_rate(setup, cluster, grid.tp)
    count = forward.micro_batches
    rows = -(-kept // (grid.data_ranks * count))
    heads = head_operations / (grid.data_ranks * grid.tp * count)
    heads /= _compute_rate(setup, cluster, cluster.head_fraction)
    picked = links.pick_rows_bytes(
        tokens, rows, model.hidden, e, grid.tp, grid.sequence, backward=True
    )
    heads += (links.loss_bytes(rows, grid.tp) + picked) / _link_rate(setup, cluster, grid.tp)
    # Keys and values are gathered for the attention that is computed again, too, and their
    # gradients reduced.
    context = 3 * forward.context * work.trained
    experts = (2 + again) * forward.experts * work.trained  # forward, again, and backward
    stage = forward.compute + tensor + experts + context + 2 * forward.pipeline * work.trained
    seconds = pipeline_seconds(stage, stage + heads, grid.pp, count)
    bubble = seconds - count * (stage + heads)

    # Reductions overlap the backward pass of the last micro-batch, bucket by bucket, on the first
    # stage only; the others wait for all of it, while the pipeline runs empty.
    reduce, exposed = 0.0, 0.0
    for index in range(grid.pp):
        buffers = student_buffers(model, grid, index)
        own = links.buffer_bytes(buffers, 4) / _link_rate(setup, cluster, grid.tp * grid.data_ranks)
        buckets = sum(len(buffer.buckets) for buffer in buffers)
        hidden = own * (1 - 1 / buckets) if index == 0 else 0.0
        reduce = max(reduce, own)
        exposed = max(exposed, own - min(hidden, stage * 2 / 3) - index * stage * 2 / 3)
    exposed *= setup.mini_batches
    return Phase(
        seconds + exposed,
        {
            "compute": count * forward.compute,
            "tensor parallel": count * tensor,
            **({"context parallel": count * context} if grid.cp > 1 else {}),
            **({"experts": count * experts} if grid.ep > 1 else {}),
            "heads": count * heads,
            "bubble": bubble,
            "gradients, not overlapped": setup.mini_batches * reduce,
            "gradients, exposed": exposed,
        },
    )


def optimizer(setup: Setup, cluster: Cluster) -> Phase:
    """Estimate Adam over a rank's share, and the weights' all-gather, which nothing overlaps."""
    model, grid = setup.student, setup.student_grid
    update, gather = 0.0, _gather_weights(setup, cluster)
    for stage in range(grid.pp):
        buffers = student_buffers(model, grid, stage)
        # Gradient, weight and moments read, all but the gradient written; the norm reads once more.
        # An average reads the weight, and is read and written.
        moved = optimizer_elements(buffers, grid.data_ranks) * (
            4 * (11 if setup.average else 8) + setup.itemsize
        )
        update = max(update, moved / (cluster.hbm_gb_s * 1e9 * cluster.hbm_fraction))
    parts = {"update": setup.mini_batches * update, "weights": setup.mini_batches * gather}
    return Phase(sum(parts.values()), parts)


def _gather_weights(setup: Setup, cluster: Cluster) -> float:
    """Return the seconds of the weights' all-gather over the data-parallel ranks."""
    grid = setup.student_grid
    bytes_ = max(
        links.buffer_bytes(student_buffers(setup.student, grid, stage), setup.itemsize)
        for stage in range(grid.pp)
    )
    return bytes_ / _link_rate(setup, cluster, grid.tp * grid.data_ranks)


def _export(setup: Setup, cluster: Cluster) -> dict[str, float]:
    """Return the seconds until whole tensors are on every rank."""
    shards = sum(p.shard for p in exported(setup.student, setup.student_grid))
    grid = setup.student_grid
    tensor, pipeline = links.export_bytes(shards, setup.itemsize, grid.tp, grid.pp)
    return {
        "over TP": tensor / _link_rate(setup, cluster, grid.tp),
        "over the pipeline": pipeline / _link_rate(setup, cluster, setup.gpus),
    }


def sync(setup: Setup, cluster: Cluster) -> Phase:
    """Estimate whole tensors on every rank, then into the engine's copy or to the servers.

    The next bucket is gathered while this one is sent; what goes down the pipeline shares the
    network with what goes to servers.
    """
    parts = _export(setup, cluster)
    whole = setup.student.elements * setup.itemsize
    if setup.rollout is None:
        parts["copy"] = 2 * whole / (cluster.hbm_gb_s * 1e9 * cluster.hbm_fraction)
    elif setup.sync_way == "disk":
        parts["to disk and back"] = 2 * whole / (cluster.storage_gb_s * 1e9)
    elif setup.sync_way == "tensor":
        parts["handles"] = 0.0
    else:
        most = max(sources(setup).values())
        parts["broadcast"] = most * whole / _link_rate(setup, cluster, setup.gpus_per_node + 1)
        sent = parts["over the pipeline"] + parts["broadcast"]
        shorter, longer = sorted((parts["over TP"], sent))
        return Phase(longer + shorter / -(-whole // setup.sync_bucket), parts)
    return Phase(sum(parts.values()), parts)


def checkpoint(setup: Setup, cluster: Cluster) -> Phase:
    """Estimate writing weights and optimizer states to the file system, all ranks together."""
    state = (8 if setup.itemsize == 4 else 12) + 4 * setup.average
    bytes_ = setup.student.elements * (setup.itemsize + state)
    seconds = bytes_ / (cluster.storage_gb_s * 1e9)
    return Phase(seconds, {"written": seconds})


# --------------------------------------------------------------------------------------- details


@dataclass(frozen=True)
class _Forward:
    """A micro-batch on one stage, in seconds; how many there are, and their tokens."""

    micro_batches: int
    tokens: int
    compute: float
    tensor: float
    experts: float
    pipeline: float
    context: float


def _forward(
    setup: Setup, cluster: Cluster, model: Architecture, grid: Grid, operations: float
) -> _Forward:
    """Estimate a micro-batch on one stage.

    Args:
        operations: of a pass over the whole batch, over all ranks.
    """
    work, e = setup.workload, setup.itemsize
    share = work.share(grid, setup.micro_batch_tokens)
    count = share.micro_batches
    tokens = -(-share.tokens // count)
    # The rank that has most sequences sets the pace.
    uneven = share.sequences * share.ranks / work.sequences
    rate = _compute_rate(setup, cluster, cluster.trunk_fraction)
    bytes_ = links.trunk_forward_bytes(tokens, model.hidden, model.layers // grid.pp, e, grid.tp)
    layers = model.layers // grid.pp
    keys = links.key_value_bytes(
        tokens, model.keys // min(grid.tp, model.groups), layers, e, share.cp
    )
    routed = links.routed_bytes(tokens * model.hidden * e, model.experts_per_token, grid)
    to_experts = links.expert_bytes(routed, model.layers // grid.pp, grid.ep)
    between = links.pipeline_bytes(tokens, model.hidden, e, grid.shards) if grid.pp > 1 else 0.0
    return _Forward(
        micro_batches=count,
        tokens=tokens,
        compute=uneven * operations / (grid.tp * grid.pp * grid.data_ranks * count * rate),
        tensor=bytes_ / _link_rate(setup, cluster, grid.tp),
        experts=to_experts / _link_rate(setup, cluster, grid.tp * grid.ep),
        pipeline=between / _link_rate(setup, cluster, setup.gpus),
        context=keys / _link_rate(setup, cluster, grid.tp * grid.cp),
    )
