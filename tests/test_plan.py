"""The plan against what is there: models, buffers and optimizers built on ranks, autograd's own
saved tensors, and the package's own functions."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from support.commands import run_python
from support.families import CONFIGS, save_random
from support.published import BILLIONS, MODELS
from support.ranks import run_ranks
from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_taopd import config as configuration
from megatron_taopd.cli import plan as command
from megatron_taopd.formats.hf import load_config
from megatron_taopd.parallel.vocab import logits_bytes, rows_within
from megatron_taopd.plan import links, memory, shapes, time
from megatron_taopd.plan.cluster import CLUSTERS, load_cluster
from megatron_taopd.plan.colocated import sized
from megatron_taopd.plan.propose import grids, proposals
from megatron_taopd.plan.results import Plan, as_json
from megatron_taopd.plan.setup import Setup
from megatron_taopd.plan.shapes import Architecture, Grid

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------- weights, buffers, optimizer


def built(path, parallel, dtype):
    """Of the student on this rank after one step, in bytes: parameters, gradient buffer, optimizer
    states."""
    from support.step import OPTIMIZER

    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.layout import student_layout

    platform.emulate_cuda()
    layout = student_layout(**parallel)
    student = Student(path, layout, dtype, "none", OPTIMIZER, 10, 200)
    student.model.zero_grad_buffer()
    student.step()
    states = [
        tensor
        for optimizer in student.optimizer.chained_optimizers
        for state in optimizer.optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    ]
    for optimizer in student.optimizer.chained_optimizers:
        for group in optimizer.shard_fp32_from_float16_groups:
            states += group
    buffers = student.model.buffers + student.model.expert_parallel_buffers
    return (
        layout.pp_rank,
        layout.dp_rank,
        sum(p.numel() * p.element_size() for p in student.trunk.parameters()),
        sum(b.param_data.nbytes for b in buffers),
        sum(b.grad_data.nbytes for b in buffers),
        sum(tensor.nbytes for tensor in states),
    )


LAYOUTS = {
    "tp1": (1, dict(tp=1, pp=1)),
    "tp2": (2, dict(tp=2, pp=1)),
    "pp2": (2, dict(tp=1, pp=2)),
    "dp2": (2, dict(tp=1, pp=1)),
    "tp2-pp2": (4, dict(tp=2, pp=2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_gradients_and_optimizer_states_are_exact(tmp_path, layout, family, dtype):
    assert_exact(tmp_path, *LAYOUTS[layout], family, dtype)


def assert_exact(tmp_path, world_size, parallel, family, dtype):
    save_random(CONFIGS[family], tmp_path)
    model = Architecture.of(CONFIGS[family])
    grid = Grid(**parallel, dp=world_size // (parallel["tp"] * parallel["pp"]))
    measured = run_ranks(world_size, built, str(tmp_path), parallel, dtype)
    for stage, dp_rank, weights, weight_buffer, gradient_buffer, states in measured:
        buffers = shapes.student_buffers(model, grid, stage)
        owned = shapes.optimizer_elements(buffers, grid.dp, dp_rank)
        assert weights == shapes.parameter_elements(model, grid, stage) * dtype.itemsize
        assert weight_buffer == shapes.buffer_elements(buffers) * dtype.itemsize
        assert gradient_buffer == shapes.buffer_elements(buffers) * 4
        assert states == shapes.optimizer_bytes(owned, dtype.itemsize)


EXPERT_LAYOUTS = {
    "ep2-dp2": dict(tp=1, pp=1, ep=2),
    "tp2-ep2": dict(tp=2, pp=1, sequence=True, ep=2),
    "pp2-ep2": dict(tp=1, pp=2, ep=2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_experts_lie_in_buffers_of_their_own(tmp_path, layout, dtype):
    assert_exact(tmp_path, 4, EXPERT_LAYOUTS[layout], "qwen3_moe", dtype)


def teacher_built(path, parallel, dtype, columns):
    """(stage, parameter bytes, bytes of the head with these columns) of a teacher."""
    from megatron_taopd.models import weights
    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.layout import forward_layout, student_layout
    from megatron_taopd.teacher.megatron import MegatronTeacher

    platform.emulate_cuda()
    student_layout(1, 1)  # which seeds Megatron
    layout = forward_layout(**parallel)
    teacher = MegatronTeacher(path, layout, dtype, 64)
    head = weights.load_head(path, torch.arange(columns), dtype)
    return (
        layout.pp_rank,
        sum(p.numel() * p.element_size() for p in teacher.trunk.parameters()),
        head.nbytes,
    )


@pytest.mark.parametrize(
    ("family", "parallel"),
    [
        ("qwen2", dict(tp=2, pp=1)),
        ("qwen2-tied", dict(tp=1, pp=2)),
        ("qwen3_moe", dict(tp=1, pp=1, ep=2)),
        ("qwen3_moe", dict(tp=2, pp=1, sequence=True)),
        ("qwen3_moe", dict(tp=1, pp=2)),
    ],
)
def test_a_teachers_trunk_and_head_are_exact(tmp_path, family, parallel):
    save_random(CONFIGS[family], tmp_path)
    model = Architecture.of(CONFIGS[family])
    grid = Grid(dp=2 // (parallel["tp"] * parallel["pp"]), **parallel)
    for stage, weights, head in run_ranks(
        2, teacher_built, str(tmp_path), parallel, torch.bfloat16, 128
    ):
        assert weights == 2 * shapes.parameter_elements(model, grid, stage, head=False)
        assert head == 2 * 128 * model.hidden


# ----------------------------------------------------------------------------------- activations

SIZES = dict(vocab_size=512, max_position_embeddings=512, num_hidden_layers=2)
SHAPES = {
    "grouped": Qwen3Config(
        **SIZES, hidden_size=64, intermediate_size=192, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, tie_word_embeddings=True,
    ),
    "own keys, wide heads": Qwen3Config(
        **SIZES, hidden_size=48, intermediate_size=96, num_attention_heads=8,
        num_key_value_heads=8, head_dim=32, tie_word_embeddings=False,
    ),
    "no norm of queries": Qwen2Config(
        **SIZES, hidden_size=128, intermediate_size=512, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "one key head for two ranks": Qwen3Config(
        **SIZES, hidden_size=64, intermediate_size=192, num_attention_heads=8,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    ),
}  # fmt: skip


EXPERTS = Qwen3MoeConfig(
    **SIZES, hidden_size=64, intermediate_size=192, num_attention_heads=8, num_key_value_heads=4,
    head_dim=16, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=64,
)  # fmt: skip


def saved_bytes(config, parallel, recompute, lengths, dtype):
    """What autograd keeps of one packed micro-batch: its saved tensors' storages, each once, but
    not the parameters'."""
    from megatron_taopd.models import gpt
    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.layout import student_layout

    platform.emulate_cuda()
    layout = student_layout(**parallel)
    trunk = gpt.Trunk(config, gpt.transformer_config(config, layout, dtype, recompute), layout)
    own = {p.untyped_storage().data_ptr() for p in (*trunk.parameters(), *trunk.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gpt.packed_forward(
            trunk, torch.zeros_like(positions), positions, cu_seqlens, max(lengths)
        ).sum()
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        *product(SHAPES, ("TP(1)", "TP(2)", "TP(2)-SP")),
        *product(["experts"], ("TP(1)", "TP(2)-SP")),  # which a student of experts has with TP
    ],
)
def test_activations_are_within_15_percent(shape, layout, recompute):
    config, lengths = SHAPES.get(shape, EXPERTS), [70, 40, 18]
    tp, sequence = (2 if "2" in layout else 1), "SP" in layout
    model, grid = Architecture.of(config), Grid(tp=tp, sequence=sequence)
    for dtype in (torch.float32, torch.bfloat16):
        (measured, *_) = run_ranks(
            tp, saved_bytes, config, dict(tp=tp, pp=1, sequence=sequence), recompute, lengths, dtype
        )
        planned = memory.stage_activation_bytes(
            model, grid, 0, sum(lengths), dtype.itemsize, recompute, cuda=False
        )
        print(f"{shape} {layout} {recompute} {dtype}: {planned / measured - 1:+.1%}")
        assert planned == pytest.approx(measured, rel=0.15)


def peak_of_forward(config, dtype, tokens):
    """The most that a forward pass without a graph has alive."""
    from megatron_taopd.models import gpt
    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.layout import student_layout
    from megatron_taopd.parallel.memory import peak_memory

    platform.emulate_cuda()
    layout = student_layout(1, 1)
    trunk = gpt.Trunk(config, gpt.transformer_config(config, layout, dtype), layout).eval()
    positions, cu_seqlens = torch.arange(tokens), torch.tensor([0, tokens], dtype=torch.int32)
    with torch.no_grad(), peak_memory() as memory:
        gpt.packed_forward(trunk, torch.zeros_like(positions), positions, cu_seqlens, tokens)
    return memory.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [*SHAPES, "experts"])
def test_forward_passes_are_within_15_percent(shape, dtype):
    config = SHAPES.get(shape, EXPERTS)
    (measured,) = run_ranks(1, peak_of_forward, config, dtype, 512)
    planned = memory.forward_bytes(Architecture.of(config), Grid(), 512, dtype.itemsize)
    print(f"forward, {shape} {dtype}: {planned / measured - 1:+.1%}")
    assert planned == pytest.approx(measured, rel=0.15)


def peak_of_training(path, setup, dtype):
    """The most that a training pass has alive beside weights, buffers, kept outputs and the
    teacher's rows; all rows are kept."""
    from support.step import OPTIMIZER

    from megatron_taopd.config.schema import LossSection
    from megatron_taopd.data import batching
    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.exchange import RowShard
    from megatron_taopd.parallel.layout import student_layout
    from megatron_taopd.parallel.memory import peak_memory
    from megatron_taopd.step.output_heads import OutputHeads
    from megatron_taopd.step.scoring import ScoredBatch, score
    from megatron_taopd.step.training import backward
    from megatron_taopd.types import RolloutBatch, WantedRows

    platform.emulate_cuda()
    layout, work, vocab = student_layout(1, 1), setup.workload, setup.student.vocab
    student = Student(path, layout, dtype, setup.recompute, OPTIMIZER, 10, vocab)
    rows = work.sequences * work.response
    batch = RolloutBatch(
        tokens=torch.arange(work.sequences * work.length) % vocab,
        cu_seqlens=torch.arange(work.sequences + 1) * work.length,
        prompt_lengths=torch.full((work.sequences,), work.prompt),
        log_probs=torch.zeros(rows),
        truncated=torch.zeros(work.sequences, dtype=torch.bool),
        prompts=torch.arange(work.sequences),
        weight_versions=torch.zeros(rows, dtype=torch.int64),
    )
    head = torch.zeros(vocab, setup.teacher.hidden, dtype=dtype)
    chunk = rows_within(setup.head_memory, vocab)
    heads = OutputHeads(student.head_weight, head, student.shard, chunk)
    held = RowShard(torch.arange(rows), torch.zeros(rows, setup.teacher.hidden, dtype=dtype))
    everything = WantedRows.all(batch)
    assigned = batching.assign(batch, everything, layout, setup.micro_batch_tokens)
    scored = ScoredBatch(batch, assigned, {0: held}, None, None, None)
    if setup.replay:
        scored = score(batch, assigned, {0: held}, student, heads, 8, keep_outputs=True)
    loss, tokens = LossSection("reverse_kl"), setup.micro_batch_tokens
    with peak_memory() as measured:
        backward(scored, everything, student, heads, loss, tokens)
    return measured.temporaries


TRAINED = Qwen3Config(
    **{**SIZES, "num_hidden_layers": 4}, hidden_size=128, intermediate_size=384,
    num_attention_heads=8, num_key_value_heads=4, head_dim=16, tie_word_embeddings=True,
)  # fmt: skip
TRAINED_EXPERTS = Qwen3MoeConfig(
    **{**SIZES, "num_hidden_layers": 4}, hidden_size=128, intermediate_size=384,
    num_attention_heads=8, num_key_value_heads=4, head_dim=16, tie_word_embeddings=True,
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96,
)  # fmt: skip


@pytest.mark.parametrize("config", [TRAINED, TRAINED_EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize(
    ("recompute", "schedule", "precision"),
    [
        ("none", "two_pass", "fp32"),
        ("none", "two_pass", "bf16"),
        ("selective", "two_pass", "fp32"),
        ("full", "two_pass", "fp32"),
        ("none", "replay", "fp32"),
    ],
)
def test_a_training_pass_peaks_within_15_percent(tmp_path, config, recompute, schedule, precision):
    save_random(config, tmp_path)
    (tmp_path / "run.yaml").write_text("""
        run: {dir: run}
        student: {path: .}
        teacher: {path: .}
        data: {prompts: prompts.jsonl, max_prompt_tokens: 32}
        rollout: {prompts: 8, max_new_tokens: 96}
        selection: {ratio: 1.0}
        train: {micro_batch_tokens: 512, head_memory_mib: 4}
    """)
    keys = dict(recompute=recompute, schedule=schedule, precision=precision)
    overrides = [f"train.{key}={value}" for key, value in keys.items()]
    setup = Setup.of(configuration.load(tmp_path / "run.yaml", overrides), 1)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    (measured,) = run_ranks(1, peak_of_training, str(tmp_path), setup, dtype)
    phase = memory.phases(setup, memory.places(setup)[0], 79.0, cuda=False)["training"]
    own = ("activations", "logits", "backward of a layer")
    planned = sum(phase.get(item, 0) for item in own)
    print(f"training, {recompute} {schedule} {precision}: {planned / measured - 1:+.1%}")
    assert planned == pytest.approx(measured, rel=0.15)


# ------------------------------------------------------------------------- 64 ranks in one process


@pytest.mark.parametrize("name", MODELS)
def test_models_have_their_published_sizes(name):
    elements = Architecture.of(MODELS[name]).elements
    assert elements / 1e9 == pytest.approx(BILLIONS[name], abs=0.006)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A directory with a directory for every model, which has nothing but its config.json."""
    directory = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        config.save_pretrained(directory / name)
    return directory


def test_64_ranks_of_the_real_pair_are_exact(models):
    student, teacher = dict(tp=2, pp=4), dict(tp=4, pp=2)
    options = dict(
        world_size=64, ranks=[0, 33, 63], student=student, teacher=teacher, dtype="bfloat16"
    )
    paths = [str(models / "Qwen3-4B"), str(models / "Qwen3-14B")]
    done = run_python("tests/support/fake_ranks.py", *paths, json.dumps(options), seconds=300)
    assert done.returncode == 0, done.stderr[-3000:]
    small, large = (Architecture.of(MODELS[n]) for n in ("Qwen3-4B", "Qwen3-14B"))
    own, theirs = Grid(**student, dp=8), Grid(**teacher, dp=8)
    measured = json.loads(done.stdout.splitlines()[-1])
    assert [m["stage"] for m in measured] == [0, 2, 3]
    for rank in measured:
        buffers = shapes.student_buffers(small, own, rank["stage"])
        owned = shapes.optimizer_elements(buffers, own.dp, rank["dp_rank"])
        assert rank["buckets"] == sum(len(b.buckets) for b in buffers)
        assert rank["weights"] == 2 * shapes.parameter_elements(small, own, rank["stage"])
        assert rank["weight_buffer"] == 2 * shapes.buffer_elements(buffers)
        assert rank["gradients"] == 4 * shapes.buffer_elements(buffers)
        assert rank["states"] == shapes.optimizer_bytes(owned, 2)
        stage = rank["teacher_stage"]
        assert rank["teacher"] == 2 * shapes.parameter_elements(large, theirs, stage, head=False)


# ------------------------------------------------------------------------------- the whole of a run


@pytest.fixture
def setup_of(models, tmp_path):
    """`setup_of(keys…)`: 64 GPUs, Qwen3-14B → Qwen3-4B unless the keys say something else."""

    def make(*overrides, gpus=64, **options) -> Setup:
        file = tmp_path / "run.yaml"
        file.write_text(RUN.format(models=models))
        return Setup.of(configuration.load(file, overrides), gpus, **options)

    return make


RUN = """
run: {{dir: run}}
student: {{path: {models}/Qwen3-4B, parallel: {{tp: 2, pp: 1, sequence: true}}}}
teacher: {{path: {models}/Qwen3-14B, parallel: {{tp: 4, pp: 1, sequence: true}}}}
data: {{prompts: prompts.jsonl, max_prompt_tokens: 1024}}
rollout: {{prompts: 512, max_new_tokens: 7168, batch_size: 8}}
train: {{micro_batch_tokens: 8192, precision: bf16, recompute: full}}
"""


def items(setup, phase, rank=0):
    (place,) = [p for p in memory.places(setup) if p.rank == rank]
    return memory.phases(setup, place, 79.0)[phase]


def test_logits_are_those_of_the_head_memory(setup_of):
    setup = setup_of("train.head_memory_mib=512")
    columns = setup.student.vocab // 2
    chunk = rows_within(512 << 20, columns)
    logits = logits_bytes(7168, chunk, columns)
    assert logits <= 512 << 20
    hidden = 8192 * setup.student.hidden + 7168 * (setup.student.hidden + setup.teacher.hidden)
    assert items(setup, "scoring")["logits"] == logits + 2 * hidden


def replayed(config, parallel, dtype, tokens):
    """`kept_bytes` of a trunk."""
    from megatron_taopd.models import gpt
    from megatron_taopd.models.replay import kept_bytes
    from megatron_taopd.parallel import platform
    from megatron_taopd.parallel.layout import student_layout

    platform.emulate_cuda()
    layout = student_layout(**parallel)
    return kept_bytes(
        gpt.Trunk(config, gpt.transformer_config(config, layout, dtype), layout), tokens
    )


@pytest.mark.parametrize("sequence", [False, True])
def test_kept_outputs_are_those_of_a_replay(sequence):
    config, parallel = SHAPES["grouped"], dict(tp=2, pp=1, sequence=sequence)
    for kept in run_ranks(2, replayed, config, parallel, torch.bfloat16, 77):
        assert kept == memory.replay_bytes(
            Architecture.of(config), Grid(tp=2, sequence=sequence), 77, 2
        )


def test_all_rows_are_kept_of_a_full_selection(setup_of):
    """Whatever the ratio, as in a run."""
    assert setup_of("selection.ratio=0.3").workload.kept == 0.3
    assert setup_of("selection.ratio=0.3", "selection.selector=full").workload.kept == 1.0


def test_a_teacher_that_reads_a_context_has_more_to_read(setup_of):
    """Nobody else has: each of the 512 prompts is 2,048 tokens longer for the teacher."""
    micro = "train.micro_batch_tokens=10240"
    plain, told = setup_of(micro), setup_of(micro, "teacher.max_prompt_tokens=3072")
    assert told.longest == plain.longest + 2048
    read, without = (time.step_phases(setup, CLUSTERS["h800"]) for setup in (told, plain))
    # One sequence of 10,240 tokens instead of 8,192 in a micro-batch; attention grows faster.
    assert 1.25 < read["teacher"].seconds / without["teacher"].seconds < 1.3
    names = [name for name in without if name != "teacher"]
    assert [read[name] for name in names] == [without[name] for name in names]
    passes = [items(setup, "teacher")["forward pass"] for setup in (told, plain)]
    assert passes[0] / passes[1] == pytest.approx(10240 / 8192, rel=0.02)


def test_sequences_of_the_data_are_not_generated(setup_of):
    """They are read, scored and trained all the same."""
    cluster, data = CLUSTERS["h100"], "data.response_column=solution"
    mixed = [data, "rollout.mix={dataset: 0.25}"]
    setups = setup_of(), setup_of(*mixed), setup_of(data, "rollout.mix={dataset: 1.0}")
    plain, quarter, everything = (time.step_phases(setup, cluster) for setup in setups)
    for name in plain.keys() - {"rollout"}:
        assert plain[name] == quarter[name] == everything[name], name
    sequences = setups[0].workload.sequences
    assert [s.workload.generated for s in setups] == [sequences, sequences * 3 // 4, 0]
    fewer = replace(setups[0], workload=replace(setups[0].workload, sequences=sequences * 3 // 4))
    assert quarter["rollout"] == time.step_phases(fewer, cluster)["rollout"]
    assert quarter["rollout"].seconds < plain["rollout"].seconds
    assert everything["rollout"].seconds == 0
    of_step = [
        time.step_throughput(setup, cluster, phases)
        for setup, phases in zip(setups, (plain, quarter, everything), strict=True)
    ]
    rates = [found.get("perf/tokens_per_second_per_gpu_rollout") for found in of_step]
    expected = 3 / 4 * plain["rollout"].seconds / quarter["rollout"].seconds
    assert rates[1] / rates[0] == pytest.approx(expected) and rates[2] is None


def test_replay_falls_back_where_the_outputs_do_not_fit(setup_of):
    replay = ("train.schedule=replay", "rollout.prompts=64")
    assert "kept layer outputs" in items(setup_of(*replay), "training")
    small = setup_of(*replay, "train.replay_memory_mib=100")
    assert "kept layer outputs" not in items(small, "training")
    assert not time.is_replayed(small)


def test_an_offloaded_teacher_is_there_in_its_phase_only(setup_of):
    trunk = items(setup_of(), "training")["teacher trunk"]
    offloaded = setup_of("teacher.offload=true")
    assert items(offloaded, "teacher")["teacher trunk"] == trunk
    for phase in ("rollout", "scoring", "training", "sync"):
        assert "teacher trunk" not in items(offloaded, phase)
    # In the memory of the host: the trunk, and while a save is written, of each element that the
    # optimizer owns three fp32 numbers and the weight in bf16.
    (place,) = memory.places(offloaded)
    elements = items(offloaded, "training")["student weights"] // 2
    save = memory.host_bytes(offloaded, place)["a save"]
    assert save == pytest.approx(14 * elements / 32, rel=1e-3)  # DP 32
    assert memory.host_bytes(offloaded, place) == {"a save": save, "offloaded teacher": trunk}
    assert set(memory.host_bytes(setup_of("train.precision=fp32"), place)) == {"a save"}
    whole = memory.host_bytes(setup_of("train.precision=fp32"), place)["a save"]
    assert whole == pytest.approx(16 * elements / 32, rel=1e-3)


def test_an_average_of_the_student_is_kept_and_on_its_way_before_the_teacher_reads(
    setup_of, models
):
    """By hand: 4 bytes of each element that the optimizer owns, in every phase and in a save. On
    its way it is gathered over DP32 and put back, and exported in between; the rank's own weights
    are put aside, next to a bucket of the export, its shards and the embedding as a whole.
    """
    own = (f"teacher.path={models}/Qwen3-4B", "teacher.parallel.tp=2")
    plain = setup_of(*own)
    setup = setup_of(*own, "teacher.source=student_ema")
    (place,) = memory.places(setup)
    elements = items(setup, "training")["student weights"] // 2
    for phase in memory.phases(setup, place, 79.0):
        average = items(setup, phase)["moving average"]
        assert average == pytest.approx(4 * elements / 32, rel=1e-3)
        assert "moving average" not in items(plain, phase)
    more = [memory.host_bytes(each, place)["a save"] for each in (setup, plain)]
    assert more[0] - more[1] == average
    whole = 2 * setup.student.largest
    moved = average // 2 + whole // 2 + whole + whole
    narrow = replace(setup, micro_batch_tokens=128, workload=replace(setup.workload, sequences=32))
    assert items(narrow, "teacher")["average on its way"] == moved

    cluster = CLUSTERS["h800"]
    phases, before = time.step_phases(setup, cluster), time.step_phases(plain, cluster)
    parts = phases["sync"].parts
    expected = 2 * phases["optimizer"].parts["weights"]
    expected += parts["over TP"] + parts["over the pipeline"]
    added = phases["teacher"].seconds - before["teacher"].seconds
    assert added == pytest.approx(expected) and expected > 0
    written = [each["checkpoint"].parts["written"] for each in (phases, before)]
    assert written[0] / written[1] == pytest.approx(18 / 14)


def test_the_last_stage_has_both_heads_and_the_teachers_rows(setup_of):
    setup = setup_of("student.parallel.pp=4")
    first, last = memory.places(setup)[0], memory.places(setup)[-1]
    assert (first.stage, last.stage) == (0, 3)
    for item in ("teacher head", "teacher rows"):
        assert item not in items(setup, "scoring", first.rank)
    at_the_end = items(setup, "scoring", last.rank)
    assert at_the_end["teacher head"] == 151936 // 2 * 5120 * 2
    assert at_the_end["teacher rows"] == 512 // 8 * 7168 * 5120 * 2
    # One micro-batch is in flight there, four at the beginning.
    per_layer = memory.activation_bytes(setup.student, setup.student_grid, 8192, 2, "full")
    assert items(setup, "training", first.rank)["activations"] // per_layer == 4 * 9
    assert items(setup, "training", last.rank)["activations"] // per_layer == 9 + 2


def test_servers_take_their_share_of_the_gpus_they_are_on(setup_of):
    sglang = ("rollout.engine=sglang", "rollout.servers={replicas: 2, gpus: [0, 1]}")
    setup = setup_of(*sglang, "rollout.servers.mem_fraction=0.5")
    assert "rollout copy" not in items(setup, "training")
    assert items(setup, "training")["rollout servers"] == round(0.5 * 79 * 2**30)
    assert [(p.rank, p.count) for p in memory.places(setup)] == [(0, 2), (2, 62)]
    assert "rollout servers" not in items(setup, "training", rank=2)
    released = replace(setup, release_memory=True)
    assert "rollout servers" not in items(released, "training")
    assert "rollout servers" in items(released, "rollout")


def test_a_streaming_teacher_is_planned(setup_of):
    """Qwen3-14B at TP4 and DP16 reads 32 sequences of 7,168 rows of 5,120 bf16 numbers a rank."""
    rows, half = 32 * 7168 * 5120 * 2, 16 * 7168 * 5120 * 2  # the student's 32 ranks score 16 each
    servers = ("rollout.engine=sglang", "rollout.servers={replicas: 1, tp: 8, mem_fraction: 0.4}")
    offloaded = setup_of(*servers, "teacher.offload=true", "rollout.sync.release_memory=true")
    assert offloaded.stream
    rollout, teacher = items(offloaded, "rollout"), items(offloaded, "teacher")
    # The trunk and the rows are there while servers generate, and servers until all is read.
    assert rollout["rows read"] == teacher["rows read"] == rows
    assert rollout["teacher trunk"] == teacher["teacher trunk"] > 0
    assert rollout["rollout servers"] == teacher["rollout servers"] == round(0.4 * 79 * 2**30)
    assert "rollout servers" not in items(offloaded, "scoring")
    exchange = items(offloaded, "exchange")
    # Where they were read, where they are scored, and a 32nd on its way.
    assert (exchange["rows read"], exchange["teacher rows"]) == (rows, half)
    assert exchange["rows in transit"] == rows // 32
    assert items(offloaded, "scoring")["teacher rows"] == half
    kept = items(offloaded, "training")["kept teacher rows"]  # 10 %, at the ranks that train them
    assert kept == round(0.1 * 16 * 7168) * 5120 * 2

    for other in (
        setup_of(*servers, "teacher.offload=true", "rollout.stream=false"),
        setup_of("teacher.offload=true"),  # the engine in these processes has finished by then
    ):
        assert not other.stream
        assert not {"rows read", "teacher trunk"} & items(other, "rollout").keys()
        assert items(other, "teacher")["rows read"] == rows


def test_a_served_teacher_may_be_quantised_and_has_no_trunk_here(setup_of, models, tmp_path):
    directory = tmp_path / "Qwen3-235B-A22B-FP8"
    config = json.loads((models / "Qwen3-235B-A22B" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    keys = (f"teacher.path={directory}", "teacher.parallel={tp: 1, sequence: false}")
    served = "teacher.servers={urls: ['http://host:1'], tp: 8}"
    setup = setup_of(*keys, "teacher.engine=sglang", served)
    assert setup.teacher.elements == Architecture.of(MODELS["Qwen3-235B-A22B"]).elements
    scoring = items(setup, "scoring")
    assert "teacher trunk" not in scoring and scoring["teacher head"] == 151936 // 2 * 4096 * 2
    # Rank 0 talks to the servers and has all rows.
    assert items(setup, "exchange")["rows read"] == 512 * 7168 * 4096 * 2
    assert "rows read" not in items(setup, "exchange", rank=1)
    assert "teacher head" not in items(replace(setup, columns_only=True), "scoring")
    with pytest.raises(ValueError, match="quantised weights"):
        setup_of(*keys)


# -------------------------------------------------------------------------------------------- time


def test_wire_bytes_of_two_ranks_are_what_the_other_needs():
    assert links.gather_bytes(100, 2) == 50 and links.gather_bytes(100, 1) == 0
    plain = links.trunk_forward_bytes(10, 8, 3, 2, tp=2)
    assert plain == 3 * 2 * 160  # two all-reduces a layer, of 10 × 8 elements of 2 bytes
    backward = links.trunk_backward_bytes(10, 8, 3, 2, tp=2, sequence=True)
    assert backward == plain + 3 * 2 * 80
    assert links.hidden_state_bytes(100, 8, 2, 4, 5, 10, 2) == (10 * 2 * 16, 20 * 16)


def test_a_pipeline_is_empty_at_both_ends():
    assert time.pipeline_seconds(1.0, 1.0, 4, 8) == 8 + 3
    assert time.pipeline_seconds(1.0, 1.5, 4, 8) == 12 + 3  # the heads set the pace


def test_time_follows_the_rates(setup_of):
    setup, h800 = setup_of(), CLUSTERS["h800"]
    phases = time.step_phases(setup, h800)
    compute = setup.teacher.cost.trunk(torch.full((512,), 8191))
    assert phases["teacher"].parts["compute"] == pytest.approx(
        compute / (64 * 989e12 * h800.trunk_fraction), rel=1e-6
    )
    faster = time.step_phases(setup, replace(h800, nvlink_gb_s=800.0))
    ratio = faster["teacher"].parts["tensor parallel"] / phases["teacher"].parts["tensor parallel"]
    assert ratio == pytest.approx(0.5)
    # Servers that generate meanwhile lose an update's time, and training nothing.
    rest = time.step_seconds(phases) - phases["rollout"].seconds
    assert time.step_seconds(phases, waits=1) == max(
        phases["rollout"].seconds + phases["sync"].seconds, rest
    )
    cut = time.step_phases(setup_of(trained_share=0.5), h800)
    assert cut["training"].parts["compute"] < 0.55 * phases["training"].parts["compute"]


def test_what_nobody_waits_for(setup_of):
    """A quarter of the longest response on average: it ends after the others, and alone."""
    servers = ["rollout.engine=sglang", "rollout.servers={replicas: 8, concurrency: 64}"]
    h800, short = CLUSTERS["h800"], 7168 // 4
    setup = setup_of(*servers, response_tokens=short)
    phases = time.step_phases(setup, h800)
    parts = phases["rollout"].parts
    token = setup.student.elements * 2 / (3350e9 * h800.hbm_fraction)
    assert parts["longest response"] == pytest.approx(7168 * token - parts["decode"])
    assert parts["longest response"] > 0 and "cache again" not in parts
    rest = time.step_seconds(phases) - phases["rollout"].seconds
    for waits in (1, 2, 9):
        fair = (phases["rollout"].seconds + rest) / (waits + 1)
        busy = parts["prefill"] + parts["decode"] + phases["sync"].seconds
        assert time.step_seconds(phases, waits) == pytest.approx(max(rest, busy, fair))
    ahead = setup_of(*servers, "rollout.ahead=2", response_tokens=short)
    partial = setup_of(
        *servers, "rollout.ahead=2", "rollout.partial=true", "rollout.sync.cache=keep"
    )
    assert (ahead.waits, partial.waits, setup.waits) == (2, 4, 0)
    again = time.step_phases(ahead, h800)["rollout"].parts["cache again"]
    half = torch.full((2 * 64,), ahead.workload.prompt + short // 2)
    assert again == pytest.approx(ahead.student.cost.trunk(half) / (989e12 * h800.trunk_fraction))
    assert "cache again" not in time.step_phases(partial, h800)["rollout"].parts


# --------------------------------------------------------------------------------------- proposals


def test_proposals_fit_and_come_fastest_first(setup_of, models):
    setup, h800 = setup_of(gpus=16), CLUSTERS["h800"]
    found = proposals(setup, h800, MODELS["Qwen3-4B"], MODELS["Qwen3-14B"])
    seconds = [proposal.seconds for proposal in found]
    assert seconds == pytest.approx(sorted(seconds), abs=1e-3)
    usable = (h800.memory_gib - h800.reserve_gib) * 2**30
    for proposal in (*found[:5], *found[-5:]):
        assert proposal.peak <= usable
        # What it says can be given as keys, and gives the same plan.
        keys = [f"{key}={value}" for key, value in proposal.keys().items()]
        again = Plan.of(setup_of(*keys, gpus=16), h800)
        assert not again.problems()
        assert again.seconds == pytest.approx(proposal.seconds)


def test_grids_divide_models_and_gpus():
    found = {(g.tp, g.pp, g.dp) for g in grids(MODELS["Qwen3-14B"], 24, 8)}
    assert found >= {(1, 1, 24), (8, 1, 3), (4, 2, 3)}
    assert all(tp * pp * dp == 24 and 40 % pp == 0 for tp, pp, dp in found)
    experts = {(g.tp, g.ep) for g in grids(MODELS["Qwen3-235B-A22B"], 64, 8)}
    assert (4, 16) in experts and (8, 16) not in experts


# -------------------------------------------------------------------------------- the command line


def run_tool(models, tmp_path, *arguments):
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(models=models))
    return run_python("tools/plan.py", file, *arguments, seconds=120)


def test_tokens_per_second_and_mfu_are_those_of_the_planned_seconds(setup_of):
    """The teacher's with the exchange, training's with the optimizer, as a run measures them."""
    setup, h800 = setup_of("train.recompute=full", gpus=16), CLUSTERS["h800"]
    plan = Plan.of(setup, h800)
    seconds, perf = {name: phase.seconds for name, phase in plan.time.items()}, plan.throughput
    work, student, teacher = setup.workload, setup.student.cost, setup.teacher.cost
    lengths = torch.full((work.sequences,), work.length)
    rows, forward = work.sequences * work.response, student.trunk(lengths - 1)
    kept = round(work.kept * rows)
    operations = {
        "rollout": forward + rows * student.per_row,
        "teacher": teacher.trunk(lengths - 1),
        "scoring": forward + rows * (student.per_row + teacher.per_row),
        "training": 3 * student.trunk(lengths) + kept * (3 * student.per_row + teacher.per_row),
    }
    took = {
        "rollout": seconds["rollout"],
        "teacher": seconds["teacher"] + seconds["exchange"],
        "scoring": seconds["scoring"],
        "training": seconds["training"] + seconds["optimizer"],
    }
    for phase, count in operations.items():
        share = count / took[phase] / 16 / 989e12
        assert perf[f"perf/mfu_{phase}"] == pytest.approx(share) and share < 1
    step = plan.seconds * 16
    assert perf["perf/mfu"] == pytest.approx(sum(operations.values()) / step / 989e12)
    tokens = work.sequences * work.length
    assert perf["perf/tokens_per_second_per_gpu"] == pytest.approx(tokens / step)
    assert as_json(plan, [])["throughput"] == perf


def test_exit_status_0_and_the_same_figures_as_json(models, tmp_path):
    out = tmp_path / "plan.json"
    done = run_tool(models, tmp_path, "--gpus", "64", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fits: at most" in done.stdout and "Estimates" in done.stdout
    plan = json.loads(out.read_text())
    assert plan["fits"] and plan["peak"]["bytes"] <= plan["usable_bytes"]
    worst = max(sum(p.values()) for m in plan["memory"] for p in m["phases"].values())
    assert worst == plan["peak"]["bytes"]


def test_exit_status_1_names_rank_phase_item_and_key(models, tmp_path):
    done = run_tool(models, tmp_path, "rollout.batch_size=64", "--gpus", "8")
    assert done.returncode == 1, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert "rank 0 (and 7 like it): rollout needs" in text
    assert "largest: KV cache" in text and "change rollout.batch_size" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["student.parallel.tp=3"], "student.parallel.tp: 3 does not divide"),
        (["teacher.parallel.pp=3"], "teacher.parallel.pp: 3 does not divide the 40 layers"),
        (["student.path=nowhere"], "nowhere: no such directory"),
        (["train.micro_batch_tokens=4096"], "give at least 8192"),
        (["student.parallel.pp=2", "train.schedule=replay"], "student.parallel.pp 2"),
        (["--gpus", "7"], "does not divide --gpus 7"),
        (["--cluster", "z80"], "--cluster: z80: give h800"),
        (["--response-tokens", "9999"], "--response-tokens: 9999; the configuration allows"),
    ],
)
def test_a_mistake_is_one_line(setup_of, models, tmp_path, capsys, arguments, message):
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(models=models))
    assert command.main([str(file), "--gpus", "64", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_cluster_of_ones_own(tmp_path):
    file = tmp_path / "cluster.yaml"

    def load(**changes):
        fields = {**vars(CLUSTERS["h100"]), "name": "mine", **changes}
        file.write_text("\n".join(f"{key}: {value}" for key, value in fields.items()))
        return load_cluster(str(file))

    assert load(network_gb_s=25.0) == replace(CLUSTERS["h100"], name="mine", network_gb_s=25.0)
    for changes, message in (
        (dict(bandwidth=3), "bandwidth"),
        (dict(hbm_gb_s="fast"), "hbm_gb_s"),
        (dict(hbm_gb_s=0), "hbm_gb_s: 0.0; it has to be more than 0"),
        (dict(link_fraction=1.5), "link_fraction: 1.5; it has to be at most 1"),
        (dict(memory_gib="???"), "memory_gib"),
        (dict(name="["), "not YAML"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load(**changes)
        assert "\n" not in str(error.value)


def test_servers_on_devices_of_ranks_get_a_cache_of_the_planned_size(models, tmp_path):
    """Qwen3-4B has 8 key-value heads of 128 in 36 layers; servers get .4 or .85 of 79 GiB."""
    file, total = tmp_path / "run.yaml", 79 * 2**30
    file.write_text(RUN.format(models=models))

    def tokens_of(servers: str, device_bytes=total):
        given = ["rollout.engine=sglang", f"rollout.servers={servers}", "train.precision=bf16"]
        config = configuration.load(file, given)
        return sized(config, 8, device_bytes).rollout.servers.max_total_tokens

    weights = Architecture.of(load_config(f"{models}/Qwen3-4B")).elements * 2
    cache = 2 * 36 * 8 * 128 * 2
    assert tokens_of("{mem_fraction: 0.4}") == (0.4 * total - weights) // cache
    assert tokens_of("{}") == (0.85 * total - weights) // cache
    half = (0.4 * total - weights / 2) // (cache // 2)
    assert tokens_of("{tp: 2, gpus: [6, 7], mem_fraction: 0.4}") == half
    assert tokens_of("{gpus: [8], mem_fraction: 0.4}") is None  # a device of its own
    assert tokens_of("{urls: ['http://node:1']}") is None
    assert tokens_of("{mem_fraction: 0.4, max_total_tokens: 7}") == 7
    assert tokens_of("{mem_fraction: 0.4}", device_bytes=None) is None  # a CPU
    with pytest.raises(ValueError, match=r"rollout.servers.mem_fraction: 0.05 of 79 GiB does not"):
        tokens_of("{mem_fraction: 0.05}")


def test_what_torch_has_cached_counts_while_servers_are_there(setup_of):
    """It was emptied before the sync, whose buckets stay reserved while servers generate."""
    servers = ("rollout.engine=sglang", "rollout.servers={replicas: 1, tp: 8, mem_fraction: 0.4}")
    released = setup_of(*servers, "rollout.sync.release_memory=true", "rollout.stream=false")
    by_phase = {phase: items(released, phase) for phase in ("sync", "rollout", "teacher")}
    own = {
        phase: sum(size for item, size in found.items() if "servers" not in item and item[0] != "c")
        for phase, found in by_phase.items()
    }
    assert own["sync"] > own["rollout"]
    assert by_phase["rollout"]["cached by torch"] == own["sync"] - own["rollout"]
    assert "cached by torch" not in by_phase["sync"]
    assert "cached by torch" not in items(setup_of(*servers), "rollout")
