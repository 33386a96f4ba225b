"""Bytes that each collective of a step puts on the wire, per rank.

What a rank sends, which for these collectives is what it receives, by a ring's arithmetic: an
all-gather or a reduce-scatter of n bytes over p ranks sends n·(p−1)/p, an all-reduce twice that.
"""

from __future__ import annotations

from megatron_taopd.plan.shapes import Buffer, Grid


def gather_bytes(total: float, ranks: int) -> float:
    """Count an all-gather to, or a reduce-scatter from, `total` bytes on every rank."""
    return total * (ranks - 1) / ranks


def all_reduce_bytes(total: float, ranks: int) -> float:
    """Count an all-reduce of `total` bytes: a reduce-scatter and an all-gather."""
    return 2 * gather_bytes(total, ranks)


def trunk_forward_bytes(tokens: int, hidden: int, layers: int, itemsize: int, tp: int) -> float:
    """Count tensor parallelism in a stage's forward pass: two all-reduces a layer.

    Under sequence parallelism these are two all-gathers and two reduce-scatters, which is as much.
    """
    return layers * 2 * all_reduce_bytes(tokens * hidden * itemsize, tp)


def trunk_backward_bytes(
    tokens: int, hidden: int, layers: int, itemsize: int, tp: int, sequence: bool
) -> float:
    """Count the backward pass: as forward; with sequence parallelism, inputs are gathered again."""
    again = 2 * gather_bytes(tokens * hidden * itemsize, tp) if sequence else 0
    return trunk_forward_bytes(tokens, hidden, layers, itemsize, tp) + layers * again


def key_value_bytes(tokens: int, keys: int, layers: int, itemsize: int, cp: int) -> float:
    """Count keys and values of sequences that a context-parallel group shares, to all its ranks.

    Args:
        tokens: of a rank.
        keys: elements of a token's keys, on a tensor-parallel rank.
    """
    return layers * gather_bytes(2 * tokens * cp * keys * itemsize, cp)


def pick_rows_bytes(
    tokens: int, rows: int, hidden: int, itemsize: int, tp: int, sequence: bool, backward: bool
) -> float:
    """Count `models.gpt.pick_rows` on the last stage."""
    if sequence:
        return (1 + backward) * gather_bytes(tokens * hidden * itemsize, tp)
    return all_reduce_bytes(rows * hidden * itemsize, tp) if backward else 0.0


def pipeline_bytes(tokens: int, hidden: int, itemsize: int, shards: int) -> float:
    """Count one micro-batch from a stage to the next; shards: tp under sequence parallelism."""
    return tokens * hidden * itemsize / shards


def routed_bytes(activations: float, experts_per_token: int, grid: Grid) -> float:
    """Count what a rank sends to all experts of a layer, those on itself included."""
    return activations * experts_per_token / grid.shards


def expert_bytes(routed: float, layers: int, ep: int) -> float:
    """Count a stage's forward pass over EP: tokens to experts and back, if evenly routed."""
    return layers * 2 * gather_bytes(routed, ep)


def score_bytes(rows: int, k: int, tp: int) -> float:
    """Count one all-gather of 24K+28 bytes a row and rank (`parallel.vocab.score_sampled`)."""
    return gather_bytes(rows * (24 * k + 28) * tp, tp)


def loss_bytes(rows: int, tp: int) -> float:
    """Count one all-gather of 20 bytes a row and rank: the reverse KL's normalisers and sum."""
    return gather_bytes(rows * 20 * tp, tp)


def hidden_state_bytes(
    rows: int, hidden: int, itemsize: int, student_tp: int, student_dp: int, teacher_dp: int,
    teacher_tp: int,
) -> tuple[float, float]:  # fmt: skip
    """Count the teacher's rows to who scores them: (sent, received) by a rank that has some.

    Every rank of the scoring TP group gets the row; its holders take turns in sending.
    """
    row = hidden * itemsize
    sent = -(-rows // teacher_dp) * -(-student_tp // teacher_tp) * row
    return sent, -(-rows // student_dp) * row


def buffer_bytes(buffers: tuple[Buffer, ...], itemsize: int) -> float:
    """Count the reduce-scatter of gradients (itemsize 4), or the all-gather of updated weights."""
    return sum(gather_bytes(itemsize * buffer.elements, buffer.ranks) for buffer in buffers)


def export_bytes(shards: int, itemsize: int, tp: int, pp: int) -> tuple[float, float]:
    """Count `models.weights.export_weights` of the whole model: (over TP, over the pipeline).

    Args:
        shards: elements of a tensor-parallel rank's part of the whole model.
    """
    own = shards * itemsize
    return gather_bytes(tp * own, tp), own if pp > 1 else 0.0
