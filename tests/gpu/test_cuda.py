"""What only a GPU can tell: kernels that the CPU path does not take, and NCCL."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import dense
from support.pushing import engine_that_pushes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TINY = Path(__file__).parents[2] / "examples" / "tiny_pair.yaml"
TEACHER = TINY.parent / "tiny_pair" / "teacher"
MIB = 1 << 20


def test_varlen_attention_agrees_with_segment_by_segment():
    from megatron_taopd.models.attention import PackedAttention

    lengths = [5, 64, 1, 130]
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(sum(lengths), heads, 64, device="cuda", generator=generator).bfloat16()
        for heads in (8, 2, 2)
    )
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    quarter = torch.ones(
        sum(lengths), 1, 64, device="cuda"
    ).bfloat16()  # turns, which round nothing
    packing = SimpleNamespace(
        cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths), lengths=lengths, key_lengths=lengths, keys=None,
        rotation=(0 * quarter, quarter),
    )  # fmt: skip
    attention = PackedAttention(SimpleNamespace(kv_channels=64))
    flash = attention(query, key, value, packed_seq_params=packing)
    wide = attention(query.float(), key.float(), value.float(), packed_seq_params=packing)
    torch.testing.assert_close(flash.float(), wide, rtol=2e-2, atol=2e-2)


def test_bf16_heads_score_and_lose_like_float64_fed_the_same_hidden_states():
    from megatron_taopd.parallel.vocab import VocabShard, linear_divergence, score_sampled

    size, rows, generator = 4096, 64, torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    hidden_s, weight_s = draw(rows, 256), draw(size, 256) / 8
    hidden_t, weight_t = draw(rows, 512), draw(size, 512) / 8
    z_s, z_t = hidden_s.double() @ weight_s.double().T, hidden_t.double() @ weight_t.double().T
    shard = VocabShard(0, size, None, size)
    tensors = [t.cuda() for t in (hidden_s, weight_s, hidden_t, weight_t)]
    tokens = torch.randint(size, (rows,), generator=generator)
    scores = score_sampled(*tensors, tokens.cuda(), 16, shard, chunk_rows=24)
    sampled = dense.log_probs(z_t).gather(1, tokens[:, None])[:, 0]
    for ours, expected in (
        (scores.disagreement, dense.disagreement(z_s, z_t, 16)),
        (scores.compatibility, dense.compatibility(z_s, z_t, 16)),
        (scores.student_entropy, dense.entropy(z_s)),
        (scores.teacher_log_prob, sampled),
    ):
        torch.testing.assert_close(ours.double().cpu(), expected, rtol=1e-3, atol=1e-4)
    loss = linear_divergence(*tensors, shard, "reverse_kl", chunk_rows=24)
    expected = dense.divergence(z_s, z_t, "reverse_kl")
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 11])
@pytest.mark.parametrize("size", [389, 384, 100])
def test_matmuls_add_to_fp32_in_place(size, rows):
    """`addmm` of bf16 with an fp32 `out` that is its own input, which only CUDA has."""
    from megatron_taopd.parallel.vocab.projection import HeadGradients
    from megatron_taopd.parallel.vocab.shard import VocabShard

    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    hidden, weight, shard = draw(rows, 24), draw(448, 24), VocabShard(0, 448, None, size)
    weight[size:] = torch.nan
    main_grad = torch.ones(448, 24, device="cuda")
    grads = HeadGradients(hidden, weight, shard, (True, True), main_grad)
    logits_grad = draw(rows, shard.padded_width)
    logits_grad[:, size:] = 0
    grads.add(logits_grad, slice(0, rows))
    wide, columns = logits_grad[:, :size].double(), slice(size)
    expected = wide @ weight[columns].double()
    torch.testing.assert_close(grads.hidden.double(), expected, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(
        main_grad[columns].double(), 1 + wide.t() @ hidden.double(), rtol=1e-5, atol=1e-5
    )
    assert (main_grad[size:] == 1).all()


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "skewed_reverse_kl"])
def test_scores_and_losses_are_those_of_the_cpu(kind):
    """The same call on both devices, ids without probability and absent ids included."""
    from megatron_taopd import VocabShard, divergence, score_rows, topk_divergence

    size, rows = 9000, 20
    logits = torch.randn(2, rows, size + 24, generator=torch.Generator().manual_seed(0)) * 3
    logits[1] += logits[0] + 5
    logits[:, 3, 100:4000] = -torch.inf
    report = logits[1, :, :size].log_softmax(1).topk(16, dim=1)
    results = []
    for device in ("cpu", "cuda"):
        shard = VocabShard(0, size + 24, None, size, torch.tensor([1, 5000], device=device))
        student, teacher = logits.to(device)
        student.requires_grad_()
        ids, log_probs = report.indices.to(device), report.values.to(device)
        losses = (
            divergence(student, teacher, shard, kind),
            topk_divergence(student, ids, log_probs, shard, kind),
        )
        sum(loss.sum() for loss in losses).backward()
        scores = score_rows(student.detach(), teacher, 16, shard, return_ids=True)
        assert scores.teacher_log_prob is None
        known = [value for value in vars(scores).values() if value is not None]
        tensors = [*losses, student.grad, *known]
        results.append([t.detach().cpu() for t in tensors])
    for on_cpu, on_cuda in zip(*results, strict=True):
        torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_short_run_with_nccl(tmp_path, precision):
    from megatron_taopd.train import main

    one_rank = [f"{model}.parallel={{tp: 1, pp: 1}}" for model in ("student", "teacher")]
    status = main(
        [
            str(TINY),
            *one_rank,
            f"run.dir={tmp_path}/run",
            f"train.precision={precision}",
            "train.steps=3",
            "eval.limit=16",
        ]
    )
    assert status == 0
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------ memory


@pytest.fixture
def layout():
    from megatron.core import parallel_state

    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.layout import forward_layout, student_layout

    platform.initialize()
    student_layout(1, 1)  # has the random states that Megatron's layers ask for
    yield forward_layout(1, 1)
    parallel_state.destroy_model_parallel()


def sequences():
    from megatron_taopd.rollout.engine import make_rollout_batch

    generator = torch.Generator().manual_seed(0)
    prompts, responses = torch.randint(3, 1000, (2, 4, 12), generator=generator).unbind()
    zeros = [torch.zeros(12)] * 4
    versions = [torch.zeros(12, dtype=torch.int64)] * 4
    return make_rollout_batch(
        prompts.tolist(), range(4), list(responses), zeros, [True] * 4, versions
    )


def test_offloaded_weights_travel_from_pinned_memory_on_a_stream_of_their_own(layout):
    """Neither does the host wait for them, nor they for what the device computes meanwhile."""
    from megatron_taopd.teacher.megatron import MegatronTeacher

    teacher = MegatronTeacher(TEACHER, layout, torch.bfloat16, 128, offload=True)
    parameters = list(teacher.trunk.parameters())
    assert all(host.is_pinned() for host in teacher.host)
    assert not any(parameter.is_cuda for parameter in parameters)
    computing = torch.cuda.current_stream()
    assert teacher.copies != computing
    with teacher.resident():  # the first one allocates
        torch.cuda.synchronize()
    torch.cuda._sleep(1 << 30)  # cycles, half a second or so
    with teacher.resident():
        assert not computing.query()  # the host is here before the device is done
        torch.cuda.synchronize()
        torch.cuda._sleep(1 << 30)
        with torch.cuda.stream(teacher.copies):
            parameters[0].data.copy_(teacher.host[0], non_blocking=True)
        teacher.copies.synchronize()
        assert not computing.query()  # copied while the device was busy with something else
        assert all(parameter.is_cuda for parameter in parameters)
        assert all(torch.equal(p.cpu(), h) for p, h in zip(parameters, teacher.host, strict=True))
    assert not any(parameter.is_cuda for parameter in parameters)


def test_an_offloaded_teacher_reads_the_same_and_leaves_the_device(layout):
    from megatron_taopd.teacher.megatron import MegatronTeacher

    stays, goes = (
        MegatronTeacher(TEACHER, layout, torch.bfloat16, 128, offload=offload)
        for offload in (False, True)
    )
    expected = stays.read(sequences()).held.rows
    weights = sum(host.nbytes for host in goes.host)
    for _ in range(2):  # cuBLAS allocates its workspace on the first use
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        with goes.resident():
            rows = goes.read(sequences()).held.rows
            assert torch.cuda.memory_allocated() - before[0] >= weights
        assert torch.equal(rows, expected)
        del rows
    assert torch.cuda.memory_allocated() == before[0]
    assert torch.cuda.memory_reserved() <= before[1]
    assert goes.fingerprint() == stays.fingerprint()


@pytest.mark.parametrize("releases", [True, False])
def test_servers_take_their_memory_when_the_cache_is_empty(layout, releases):
    seen = []
    engine = engine_that_pushes(lambda: seen.append(torch.cuda.memory_reserved()), releases)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    temporary = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
    del temporary
    assert torch.cuda.memory_reserved() >= before + 256 * MIB  # torch keeps it
    engine.update_weights([], version=1)
    [held] = seen
    assert (held <= before) if releases else (held >= before + 256 * MIB)


def test_a_memory_snapshot_has_allocations_with_their_lines_and_the_spans(tmp_path):
    from torch.profiler import record_function

    from megatron_taopd.config.schema import ProfileSection
    from megatron_taopd.monitoring.profiling import StepProfiler

    profiler = StepProfiler(ProfileSection(steps=(2,), kind="memory"), tmp_path, 0)
    for step in (1, 2, 3):
        with profiler.step(step), record_function("scoring"):
            tensor = torch.empty((31 + step) * MIB, dtype=torch.uint8, device="cuda")
            del tensor
    [file] = tmp_path.iterdir()
    assert file.name == "step_2_rank_0.pickle"
    snapshot = pickle.loads(file.read_bytes())
    allocated = [
        entry
        for entry in snapshot["device_traces"][torch.cuda.current_device()]
        if entry["action"] == "alloc"
    ]
    assert [entry["size"] for entry in allocated] == [33 * MIB]
    assert any(frame["filename"] == __file__ for frame in allocated[0]["frames"])
    stages = [e["stage"] for e in snapshot["external_annotations"] if e["name"] == "scoring"]
    assert stages == ["START", "END"]


@pytest.mark.parametrize("kind", ["torch", "nsys"])
def test_a_profiled_step_names_its_spans_and_kernels(tmp_path, kind):
    import json

    from torch.profiler import record_function

    from megatron_taopd.config.schema import ProfileSection
    from megatron_taopd.monitoring.profiling import StepProfiler

    profiler = StepProfiler(ProfileSection(steps=(1,), kind=kind), tmp_path, 0)
    x = torch.randn(64, 64, device="cuda")
    with profiler.step(1):
        with record_function("scoring"):
            x @ x
        torch.cuda.synchronize()
    if kind == "nsys":  # which writes a file of its own, from outside
        assert not list(tmp_path.iterdir())
        return
    events = json.loads((tmp_path / "step_1_rank_0.json").read_text())["traceEvents"]
    categories = {event.get("cat") for event in events if event.get("name") == "scoring"}
    assert "user_annotation" in categories
    assert any(event.get("cat") == "kernel" for event in events)
