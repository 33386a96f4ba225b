"""Long sequences shared by ranks: chunks, attention over them, models, and the whole step."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support import dense
from support.families import CONFIGS, save_random
from support.ranks import run_ranks
from support.step import (
    dense_step,
    make_batch,
    make_pair,
    row_logits,
    step_on_ranks,
    with_invalid_tokens,
)
from test_step import assert_agrees
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.scaling.fake import make_setup
from benchmarks.scaling.step import kept_rows
from benchmarks.scaling.step import make_batch as made_up
from megatron_taopd.data.batching import assign, plan, shorten
from megatron_taopd.data.chunks import Chunks
from megatron_taopd.plan import links, memory
from megatron_taopd.plan.collectives import step_collectives, teacher_row
from megatron_taopd.plan.setup import rows_by_rank
from megatron_taopd.plan.shapes import Architecture, Grid
from megatron_taopd.types import WantedRows

# ------------------------------------------------------------------------------------------ chunks


def test_chunks_of_two_ranks():
    """By hand: segments of 8 and 4 tokens, chunks of 2 and of 1; rank 0 has the outer ones."""
    chunks = Chunks(torch.tensor([8, 4]), 2)
    assert chunks.of(0).tolist() == [0, 1, 6, 7, 8, 11]
    assert chunks.of(1).tolist() == [2, 3, 4, 5, 9, 10]
    assert chunks.places().tolist() == [0, 1, 6, 7, 8, 9, 2, 3, 4, 10, 11, 5]
    outer = chunks.pieces(0)
    assert (outer.queries, outer.keys) == ([2, 2, 1, 1], [2, 8, 1, 4])
    assert outer.places.tolist() == [0, 1, 0, 1, 6, 7, 8, 9, 2, 3, 4, 4, 10, 11, 5]
    assert chunks.pieces(1).keys == [4, 6, 2, 3]


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_causal_work_is_equal(cp):
    chunks = Chunks(torch.tensor([2 * cp * 5, 2 * cp * 64]), cp)
    work = set()
    for rank in range(cp):
        pieces = chunks.pieces(rank)
        work.add(sum(q * k for q, k in zip(pieces.queries, pieces.keys, strict=True)))
    assert len(work) == 1


def test_only_what_does_not_fit_a_rank_is_shared():
    """By hand, micro-batches of 20 tokens, DP2 and CP2: 18 and 11 are shared, padded to 20 and 12;
    the group that has 11 gets 9 and 4 first; 25 would not fit 20."""
    lengths = [3, 18, 9, 11, 4, 0]
    assert plan(lengths, 2, 20, cp=2) == [
        [(1,), (0,)], [(1,), ()], [(3,), (2,)], [(3,), (4,)],
    ]  # fmt: skip
    with pytest.raises(
        ValueError, match="micro_batch_tokens: 20 is too small for sequence 0 of 28 tokens"
    ):
        plan([25], 2, 20, cp=2)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("cp", [2, 4])
def test_every_row_is_on_the_rank_that_the_placement_says(cp, sequence):
    """Of whole batches and of cut ones; tokens, positions and targets are the sequences' own."""
    batch = make_batch(100)
    mask = torch.rand(batch.num_rows, generator=torch.Generator().manual_seed(0)) < 0.3
    kept = WantedRows.known(batch, mask.nonzero()[:, 0])
    layouts = [
        SimpleNamespace(
            dp=2, cp=cp, data_ranks=2 * cp, data_rank=r, cp_rank=r % cp, tp=3, sequence=sequence
        )
        for r in range(2 * cp)
    ]
    for wanted in (WantedRows.all(batch), kept):
        ranks = [assign(batch, wanted, layout, 12 * cp) for layout in layouts]
        check_rows(batch, wanted, ranks)
        assert ranks[0].shared.any() and not ranks[0].shared[wanted.lengths > 0].all()
    longer = [assign(batch, WantedRows.all(batch), layout, 12 * cp) for layout in layouts]
    shorter = [shorten(batch, a, kept, layout) for a, layout in zip(longer, layouts, strict=True)]
    check_rows(batch, kept, [a for a, _ in shorter])
    for rank, (cut, places) in enumerate(shorter):
        group = longer[rank // cp * cp : rank // cp * cp + cp]
        for i, (micro_batch, place) in enumerate(zip(cut.micro_batches, places, strict=True)):
            own = longer[rank].micro_batches[i]
            shares = [a.micro_batches[i] for a in group] if own.pieces else [own]
            assert bool(own.pieces) == bool(micro_batch.pieces)
            real = place >= 0
            for name in ("tokens", "position_ids"):
                before = torch.cat([getattr(m, name) for m in shares])
                assert torch.equal(getattr(micro_batch, name)[real], before[place[real]])
            assert real[micro_batch.rows].all()


def check_rows(batch, wanted, ranks):
    starts, holders = ranks[0].runs(batch)
    run = torch.searchsorted(starts, torch.arange(batch.num_rows), right=True) - 1
    seen = []
    tokens = ranks[0].tokens_by_rank(len(ranks))
    for rank, assigned in enumerate(ranks):
        for m in assigned.micro_batches:
            assert (holders[run[m.row_ids]] == rank).all()
            positions = batch.positions_of(m.row_ids)
            assert torch.equal(m.position_ids[m.rows], positions)
            place = batch.cu_seqlens[batch.sequences_of(m.row_ids)] + positions
            assert torch.equal(m.tokens[m.rows], batch.tokens[place])
            assert torch.equal(m.targets, batch.tokens[place + 1])
            assert len(m.tokens) <= 12
            seen.append(m.row_ids)
        assert sum(len(m.tokens) for m in assigned.micro_batches) >= tokens[rank]
        assert len(assigned.micro_batches) == len(ranks[0].micro_batches)
    everything = wanted.of(batch, torch.arange(batch.num_sequences))
    assert torch.equal(torch.cat(seen).sort().values, everything)


# --------------------------------------------------------------------------------------- attention


def attention_on_ranks(segments, heads, groups, width):
    """(outputs, gradients of queries, keys and values) of a rank's chunks, in float64."""
    import torch.distributed as dist

    from megatron_taopd.models.attention import PackedAttention, Packing
    from megatron_taopd.parallel import platform

    platform.emulate_cuda()
    rank, cp = dist.get_rank(), dist.get_world_size()
    chunks = Chunks(torch.tensor(segments), cp)
    own, pieces = chunks.of(rank), chunks.pieces(rank)
    inputs, rotation, out_grad = attention_inputs(segments, heads, groups, width)
    q, k, v = (x[own].requires_grad_() for x in inputs)
    packing = Packing(
        qkv_format="thd", lengths=pieces.queries, key_lengths=pieces.keys, keys=pieces.places,
        rotation=tuple(x[own] for x in rotation), cp_group=dist.group.WORLD,
    )  # fmt: skip
    attention = PackedAttention(SimpleNamespace(kv_channels=width))
    out = attention(q, k, v, packed_seq_params=packing)
    out.backward(out_grad[own])
    return own, out.detach(), q.grad, k.grad, v.grad


def attention_inputs(segments, heads, groups, width):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(sum(segments), *shape, generator=generator, dtype=torch.float64)

    inputs = draw(heads, width), draw(groups, width), draw(groups, width)
    angles = draw(1, width // 2).repeat(1, 1, 2)
    return inputs, (angles.cos(), angles.sin()), draw(heads * width)


@pytest.mark.parametrize("cp", [2, 4])
def test_attention_over_chunks_is_that_of_whole_sequences(cp):
    segments, heads, groups, width = [16, 8, 40], 4, 2, 8
    inputs, (cosines, sines), out_grad = attention_inputs(segments, heads, groups, width)
    q, k, v = (x.requires_grad_() for x in inputs)

    def turned(x):
        first, second = x.chunk(2, -1)
        return x * cosines + torch.cat([-second, first], -1) * sines

    expected = []
    for parts in zip(*(x.split(segments) for x in (turned(q), turned(k), v)), strict=True):
        a, b, c = (x.repeat_interleave(heads // x.shape[1], 1) for x in parts)
        logits = torch.einsum("ihd,jhd->hij", a, b) / math.sqrt(width)
        logits = logits.masked_fill(torch.ones_like(logits[0]).triu(1).bool(), -torch.inf)
        expected.append(torch.einsum("hij,jhd->ihd", logits.softmax(-1), c).flatten(1))
    expected = torch.cat(expected)
    expected.backward(out_grad)
    for own, *found in run_ranks(cp, attention_on_ranks, segments, heads, groups, width):
        for ours, whole in zip(found, (expected, q.grad, k.grad, v.grad), strict=True):
            torch.testing.assert_close(ours, whole[own].detach(), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------- model


LENGTHS = [24, 9, 17]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    save_random(CONFIGS["qwen3"], path)
    return str(path)


def packed(vocabulary):
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(vocabulary, (n,), generator=generator) for n in LENGTHS]
    return tokens, [torch.rand(n, generator=generator, dtype=torch.float64) for n in LENGTHS]


def model_on_ranks(path, tp, cp, sequence):
    """This rank's part of Σ weight · log p(next token), and gradients by Hugging Face name."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_taopd.data.batching import build_micro_batch, share
    from megatron_taopd.formats import hf as hf_checkpoint
    from megatron_taopd.models import gpt, weights
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform
    from megatron_taopd.types import TeacherSequences

    platform.emulate_cuda()
    try:
        layout = layouts.student_layout(tp, 1, sequence, cp=cp)
        hf = hf_checkpoint.load_config(path)
        config = gpt.transformer_config(hf, layout, torch.float32)
        config.gradient_accumulation_fusion = False
        model = gpt.Trunk(hf, config, layout)
        weights.load_weights(model, path)
        tokens, of_tokens = packed(hf.vocab_size)
        lengths = torch.tensor(LENGTHS)
        cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        rows = torch.arange(int(cu[-1]) - len(LENGTHS))
        positions = torch.cat([torch.arange(n - 1) for n in LENGTHS])
        cu_rows = cu - torch.arange(len(cu))
        batch = TeacherSequences(torch.cat(tokens), cu, cu_rows, positions)
        whole = build_micro_batch(batch, range(3), WantedRows.all(batch), 4 * cp, 2 * cp)
        m = share(whole, cp, layout.cp_rank)
        hidden = gpt.packed_forward(
            model, m.tokens, m.position_ids, m.cu_seqlens, m.max_seqlen, m.pieces
        )
        picked = gpt.pick_rows(hidden, m.rows, layout)
        logits = picked.double() @ model.head_weight.double().T  # of this rank's columns
        start = model.vocab_shard(hf.vocab_size).start
        logits[:, max(0, hf.vocab_size - start) :] = -1e9
        norm = logits.logsumexp(-1)
        shards = [torch.empty_like(norm) for _ in range(tp)]
        dist.all_gather(shards, norm.detach(), group=layout.groups.tp)
        all_norm = torch.stack(shards).logsumexp(0)
        weight = torch.cat([w[:-1] for w in of_tokens])[m.row_ids]
        # d log p(y) = 1[y] − p, of these columns.
        share_of = (norm.detach() - all_norm).exp()
        columns = m.targets - start
        here = (columns >= 0) & (columns < logits.shape[1])
        own = logits.gather(1, columns.where(here, 0)[:, None])[:, 0].where(here, 0)
        value = (weight * (own.detach() - all_norm * (layout.tp_rank == 0))).sum()
        (weight * (own - share_of * norm)).sum().backward()
        dist.all_reduce(value)
        grads = {}
        for name, parameter in model.named_parameters():
            grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            dist.all_reduce(grad, group=layout.groups.cp)
            of_heads = "q_layernorm" in name or "k_layernorm" in name
            if of_heads or (sequence and getattr(parameter, "sequence_parallel", False)):
                dist.all_reduce(grad, group=layout.groups.tp)
            grads[parameter] = grad
        return value, dict(weights.export_weights(model, read=lambda p: grads[p])), len(rows)
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize(
    ("tp", "cp", "sequence"), [(1, 2, False), (2, 2, False), (2, 2, True), (1, 4, False)]
)
def test_a_model_over_chunks_agrees_with_dense_float64(model_dir, tp, cp, sequence):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    tokens, of_tokens = packed(model.config.vocab_size)
    expected = 0.0
    for ids, weight in zip(tokens, of_tokens, strict=True):
        log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        expected += (weight[:-1] * log_probs.gather(1, ids[1:, None])[:, 0]).sum()
    expected.backward()
    for value, gradients, _ in run_ranks(tp * cp, model_on_ranks, model_dir, tp, cp, sequence):
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        for name, parameter in model.named_parameters():
            error = (gradients[name].double() - parameter.grad).norm() / parameter.grad.norm()
            assert error < 2e-5, (name, error)


# ------------------------------------------------------------------------------------------ a step


SIZE, TOKENS = 200, 24  # of the vocabulary; of a micro-batch


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def oracle(pair):
    return dense_step(*pair, make_batch(SIZE), SIZE)


def student_of(tp=1, pp=1, cp=1, sequence=False):
    return tp, pp, sequence, 0, 1, cp


def teacher_of(tp=1, pp=1, cp=1, sequence=False):
    return tp, pp, sequence, 1, cp


LAYOUTS = {  # world size, student, teacher
    "CP2 | CP2": (2, student_of(cp=2), teacher_of(cp=2)),
    "CP2 | CP1": (2, student_of(cp=2), teacher_of(pp=2)),
    "TP2 | CP2": (2, student_of(tp=2), teacher_of(cp=2)),
    "TP2 CP2 | CP4": (4, student_of(tp=2, cp=2), teacher_of(cp=4)),
    "TP2 CP2 SP | TP2 CP2 SP": (4, student_of(2, 1, 2, True), teacher_of(2, 1, 2, True)),
    "PP2 CP2 | TP2 CP2": (4, student_of(pp=2, cp=2), teacher_of(tp=2, cp=2)),
    "CP2 DP2 | PP2 CP2": (4, student_of(cp=2), teacher_of(pp=2, cp=2)),
    "CP4 | TP4": (4, student_of(cp=4), teacher_of(tp=4)),
}


@pytest.mark.parametrize(
    ("name", "replay"),
    [(n, r) for n in LAYOUTS for r in (False, True) if not (r and "PP2 CP2 |" in n)],  # one stage
)
def test_a_step_agrees_with_dense_float64(pair, oracle, name, replay):
    """Loss, gradients and norm; the kept rows are the oracle's on every layout."""
    world_size, student, teacher = LAYOUTS[name]
    step = partial(step_on_ranks, replay=replay, micro_batch_tokens=TOKENS)
    results = run_ranks(world_size, step, *pair, student, teacher, make_batch(SIZE), SIZE)
    for result in results:
        assert_agrees(result, oracle)
        # What is exported, and sent to engines, is the same everywhere.
        for name, tensor in results[0]["weights"].items():
            assert torch.equal(result["weights"][name], tensor), name


@pytest.mark.parametrize("replay", [False, True])
def test_weights_of_shared_sequences_agree_with_dense_float64(pair, replay):
    loss = {"kind": "reverse_kl", "weights": "discrepancy", "gamma": 3.0}
    batch = make_batch(SIZE)
    expected = dense_step(*pair, batch, SIZE, loss=loss)
    step = partial(step_on_ranks, loss=loss, replay=replay, micro_batch_tokens=TOKENS)
    layout = student_of(cp=2), teacher_of(cp=2)
    for result in run_ranks(2, step, *pair, *layout, batch, SIZE):
        assert_agrees(result, expected)


@pytest.mark.parametrize("replay", [False, True])
def test_invalid_tokens_and_references_among_shared_sequences(pair, replay):
    """Rows are not all positions, and the loss of a shared micro-batch has two sources."""
    batch = replace(with_invalid_tokens(make_batch(SIZE)), references=torch.arange(12) % 4 < 2)
    expected = dense_step(*pair, batch, SIZE)
    step = partial(step_on_ranks, replay=replay, micro_batch_tokens=TOKENS)
    layout = student_of(cp=2), teacher_of(cp=2)
    losses = dense.divergence(*(z.detach() for z in row_logits(*pair, batch, SIZE)[:2]))
    theirs = expected["mask"] & batch.references[batch.row_sequences()]
    added = (losses[theirs].sum() / expected["mask"].sum()).item()
    for result in run_ranks(2, step, *pair, *layout, batch, SIZE):
        assert_agrees(result, expected)
        assert result["metrics"]["loss_of_references"] == pytest.approx(added, rel=1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("replay", [False, True])
def test_recomputation_changes_nothing(pair, oracle, recompute, replay):
    step = partial(step_on_ranks, recompute=recompute, replay=replay, micro_batch_tokens=TOKENS)
    layout = student_of(tp=2, cp=2, sequence=True), teacher_of(cp=2)
    for result in run_ranks(4, step, *pair, *layout, make_batch(SIZE), SIZE):
        assert_agrees(result, oracle)


# ------------------------------------------------------------------------------------------ a plan


SIZES = Qwen3Config(
    vocab_size=512, max_position_embeddings=512, num_hidden_layers=2, hidden_size=64,
    intermediate_size=192, num_attention_heads=8, num_key_value_heads=4, head_dim=16,
    tie_word_embeddings=True,
)  # fmt: skip
LONG = 64  # tokens of a sequence: the CPU has a mask of its square, which CUDA has not


def saved_on_ranks(cp, recompute, dtype):
    """(bytes that autograd keeps of this rank's chunks, the most that a forward pass has alive)."""
    from megatron.core import parallel_state

    from megatron_taopd.models import gpt
    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.layout import student_layout
    from megatron_taopd.parallel.memory import peak_memory

    platform.emulate_cuda()
    try:
        layout = student_layout(1, 1, cp=cp)
        trunk = gpt.Trunk(SIZES, gpt.transformer_config(SIZES, layout, dtype, recompute), layout)
        chunks = Chunks(torch.tensor([LONG]), cp)
        own = chunks.of(layout.cp_rank) if cp > 1 else torch.arange(LONG)
        pieces = chunks.pieces(layout.cp_rank) if cp > 1 else None
        given = trunk, torch.zeros_like(own), own, torch.tensor([0, LONG]).int(), LONG, pieces
        known = {p.untyped_storage().data_ptr() for p in (*trunk.parameters(), *trunk.buffers())}
        saved = {}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in known:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            gpt.packed_forward(*given).sum()
        kept = sum(storage.nbytes() for storage in saved.values())
        peaks = []
        for _ in range(5):  # gloo's threads let go of what they have sent at their leisure
            with torch.no_grad(), peak_memory() as memory:
                gpt.packed_forward(*given)
            peaks.append(memory.peak)
        return kept, min(peaks)
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activations_fall_as_the_ranks_that_share_them(recompute, dtype):
    """Within 15 %; and so are those that are planned, and what a forward pass has alive."""
    model = Architecture.of(SIZES)
    (whole, _), *_ = run_ranks(
        1, saved_on_ranks, 1, memory.recomputed(recompute, Grid(cp=2)), dtype
    )
    for cp in (2, 4):
        grid, tokens = Grid(cp=cp), LONG // cp
        planned = memory.stage_activation_bytes(
            model, grid, 0, tokens, dtype.itemsize, memory.recomputed(recompute, grid), cuda=False
        )
        forward = memory.forward_bytes(model, grid, tokens, dtype.itemsize, cp)
        for kept, alive in run_ranks(cp, saved_on_ranks, cp, recompute, dtype):
            print(f"CP{cp} {recompute} {dtype}: {kept * cp / whole:.3f}, {planned / kept - 1:+.1%}")
            assert kept == pytest.approx(whole / cp, rel=0.15)
            assert planned == pytest.approx(kept, rel=0.15)
            print(f"  forward {forward / alive - 1:+.1%}")
            assert forward == pytest.approx(alive, rel=0.15)


@pytest.mark.parametrize(("prompt", "response", "cp"), [(6, 10, 2), (1024, 31744, 8), (9, 100, 4)])
def test_rows_are_counted_by_rank(prompt, response, cp):
    """Against the chunk of each position; of a long response the most is near an equal part."""
    length = prompt + response - 1
    positions = torch.arange(prompt - 1, length)
    chunk = positions // -(-length // (2 * cp))
    counts = torch.minimum(chunk, 2 * cp - 1 - chunk).bincount(minlength=cp).tolist()
    assert rows_by_rank(length, prompt - 1, cp) == counts
    if prompt == 1024:
        assert max(counts) <= 1.15 * response / cp


@pytest.mark.parametrize("trained", [1.0, 0.75, 0.4])
def test_planned_moves_of_kept_rows_are_those_of_the_placements(tmp_path, trained):
    """DP2 × CP4, by the routes that a step computes; at 40 % a cut sequence fits a rank."""
    from megatron_taopd.data.batching import Placement
    from megatron_taopd.parallel.exchange import Routes

    case = dict(
        student=dict(tp=1, pp=1, cp=4), sequences=4, prompt=6, response=42, trained=trained,
        micro_batch_tokens=96,
    )  # fmt: skip
    setup, *_ = make_setup(tmp_path, 8, case)
    batch = made_up(setup)
    kept = kept_rows(setup, batch)
    layout = SimpleNamespace(dp=2, cp=4, data_ranks=8, data_rank=0, cp_rank=0, tp=1, sequence=False)
    scorers, trainers = (
        Placement(a.lengths, a.owner, a.shared, a.cp)
        for a in (assign(batch, w, layout, 96) for w in (WantedRows.all(batch), kept))
    )
    routes = Routes.between(batch.num_rows, scorers.runs(batch), trainers.runs(batch))
    ids = kept.known_ids
    run = torch.searchsorted(routes.first, ids, right=True) - 1
    leaves = routes.source[run] != routes.destination[run]
    row = teacher_row(setup) + 8
    for rank in range(8):
        found = {c.op: c for c in step_collectives(setup, rank) if c.phase == "training"}
        if trained == 1.0:
            assert "all_to_all" not in found
            continue
        sent = int((leaves & (routes.source[run] == rank)).sum())
        assert found["all_to_all"].bytes == sent * row
        told = links.all_reduce_bytes(8 * len(routes.first), 8)
        assert found["all_reduce"].bytes == told
    assert bool(leaves.any()) == (trained < 1)
    assert bool(trainers.shared.any()) == (trained > 0.5)
