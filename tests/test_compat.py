"""Private parts of torch, Megatron and SGLang: an upgrade fails here first."""

import ast
import asyncio
import importlib
import inspect
import json
import logging
import re
import subprocess
import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import megatron.core
import pytest
import torch
import torch.distributed as dist
from support.patience import patience
from support.ranks import run_ranks
from torch.autograd.profiler import profile
from torch.multiprocessing import reductions

from megatron_taopd.formats.megatron import MegatronCheckpoint
from megatron_taopd.formats.unpickle import ALLOWED, BACKEND, check_pickles
from megatron_taopd.parallel import platform
from megatron_taopd.parallel.compat import torch_internals
from megatron_taopd.serving import identity
from megatron_taopd.serving.server import server_environment

STUDENT = "examples/tiny_pair/student"


# torch


def count_in_the_store():
    torch_internals.default_store().add("compat", 1)
    dist.barrier()
    return torch_internals.default_store().add("compat", 0)


def test_the_store_of_the_default_group_is_shared():
    assert run_ranks(2, count_in_the_store) == [2, 2]


def ask_for_cuda():
    """What tensors say of their device that are asked for on CUDA, on a rank without it."""
    platform.emulate_cuda()
    asked = [
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device=torch.device("cuda", 0)),
        torch.empty_like(torch.ones(1, device="meta"), device=torch.cuda.current_device()),
        torch.ones(1).to("cuda", torch.float64),
        torch.ones(1).to(device="cuda:1"),
        torch.nn.Linear(1, 1).to("cuda").weight,
    ]
    with torch.device("meta"):
        others = [torch.empty(2), torch.nn.Linear(1, 1).weight, torch.tensor(1.0)]
    return [t.device.type for t in asked], [t.device.type for t in others], torch.ones(1).type()


def test_cuda_is_the_cpu_where_there_is_none_and_no_other_device_is():
    [(asked, others, name)] = run_ranks(1, ask_for_cuda)
    assert (asked, others, name) == (["cpu"] * 6, ["meta"] * 3, "torch.cuda.FloatTensor")


def test_all_that_megatron_makes_on_a_device_is_answered():
    made = set()
    for folder in (
        "distributed",
        "optimizer",
        "pipeline_parallel",
        "tensor_parallel",
        "transformer",
    ):
        for file in Path(megatron.core.__path__[0], folder).rglob("*.py"):
            for call in ast.walk(ast.parse(file.read_text())):
                if isinstance(call, ast.Call) and any(k.arg == "device" for k in call.keywords):
                    made |= set(re.findall(r"^torch\.(\w+)$", ast.unparse(call.func)))
    assert {"tensor", "zeros", "empty"} <= made
    assert made <= {*platform._CONSTRUCTORS}


def test_allocations_have_addresses():
    with profile(profile_memory=True) as profiler:
        kept = torch.empty(1000, dtype=torch.uint8)
        del kept
    changes = torch_internals.allocations(profiler, "cpu")
    [taken] = [(address, size) for address, size in changes if size >= 1000]
    assert (taken[0], -taken[1]) in changes[changes.index(taken) :]


def test_the_device_has_its_place_in_a_handle(monkeypatch):
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    monkeypatch.setattr(torch_internals, "reduce_tensor", lambda _: (list, tuple(names)))
    rebuild, arguments = torch_internals.ipc_handle(torch.zeros(2), "GPU-1")
    assert rebuild is list and arguments[names.index("storage_device")] == "GPU-1"
    assert sorted([*arguments, "storage_device"]) == sorted([*names, "GPU-1"])


def broadcast_alone():
    backend = torch_internals.bare_backend(
        dist.HashStore(), "compat", 1, "127.0.0.1", torch.device("cpu"), 60.0
    )
    options = dist.BroadcastOptions()
    options.rootRank, options.timeout = 0, timedelta(seconds=60)
    work = backend.broadcast([torch.ones(3)], options)
    work.wait()
    return work.is_completed(), backend.size(), len(dist.distributed_c10d._world.pg_map)


def test_a_bare_backend_is_in_no_table():
    """That SGLang joins it as a group of torch is in test_weight_sync.py."""
    completed, size, groups = run_ranks(1, broadcast_alone)[0]
    assert completed and size == 1 and groups == run_ranks(1, number_of_groups)[0]


def number_of_groups():
    return len(dist.distributed_c10d._world.pg_map)


@pytest.mark.parametrize("module", ALLOWED)
def test_what_a_checkpoint_may_name_is_there(module):
    names = vars(importlib.import_module(module))
    assert not [name for name in ALLOWED[module] if name not in names]


# Megatron


def save_as_planned(directory):
    """A tensor of which each rank has a half, and a value, as `checkpoints.writing` saves them."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_taopd.parallel.compat.megatron_internals import plan_save

    platform.emulate_cuda()
    rank, copied = dist.get_rank(), []

    def copy(tensors):
        copied.extend(own for _, own in tensors)
        return [tensor.clone() for tensor, _ in tensors]

    half = torch.arange(6.0).view(2, 3) + 10 * rank
    sharded = {"w": ShardedTensor.from_rank_offsets("w", half, (0, rank, 2)), "step": 7}
    plan, buckets, common = plan_save(sharded, Path(directory), copy)
    half.fill_(-1)  # what was copied is saved
    written = []
    for name, items in buckets:
        with open(Path(directory) / name, "wb") as stream:
            for item, data in items:
                written.append(
                    torch_internals.write_item(plan.transforms, stream, data, item, name)
                )
    results = [None, None]
    dist.all_gather_object(results, written)
    if rank == 0:
        torch.save(common, Path(directory) / "common.pt")
        (Path(directory) / "metadata.json").write_text(json.dumps(BACKEND))
        plan.finish(results)
    dist.barrier()
    return copied, common


def test_a_planned_checkpoint_is_one(tmp_path):
    answers = run_ranks(2, save_as_planned, tmp_path)
    assert answers == [([True], {"step": 7})] * 2
    checkpoint = MegatronCheckpoint(tmp_path)
    expected = torch.arange(6.0).view(2, 3)
    assert torch.equal(checkpoint.read("w"), torch.cat([expected, expected + 10]))
    for _offsets, _sizes, info in checkpoint.places["w"]:
        assert isinstance(info, torch_internals.StorageInfo)
        again = torch_internals.StorageInfo(info.relative_path, info.offset, info.length)
        assert again.length == info.length
    check_pickles(tmp_path)


def look_into_an_optimizer():
    from megatron.core import parallel_state

    from megatron_taopd.config import OptimizerSection
    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel.compat import megatron_internals as internals
    from megatron_taopd.parallel.layout import student_layout

    platform.emulate_cuda()
    try:
        layout = student_layout(1, 1)
        student = Student(STUDENT, layout, torch.bfloat16, "none", OptimizerSection(), 1, 1000)
        (distributed,) = student.optimizer.chained_optimizers
        before = len(distributed.optimizer.state)
        internals.allocate_moments(distributed)
        owned, right = {}, []
        for parameter, elements, states in internals.owned_states(distributed):
            owned[id(parameter)] = elements
            main = parameter.main_param
            right.append(
                states["param"].data_ptr() == main.data_ptr()
                and states["exp_avg"].data_ptr()
                == distributed.optimizer.state[main]["exp_avg"].data_ptr()
                and sorted(states) == ["exp_avg", "exp_avg_sq", "param"]
                and all(t.shape == (parameter.numel(),) for t in states.values())
            )
            states["param"].fill_(1 + 2**-9)
        internals.publish_masters(distributed)
        parameters = list(student.trunk.parameters())
        whole = {id(p): slice(0, p.numel()) for p in parameters}
        return before, right, owned == whole, {float(v) for p in parameters for v in p.aminmax()}
    finally:
        parallel_state.destroy_model_parallel()


def test_an_optimizer_shows_its_state_and_rounds_its_weights():
    """On one rank it owns everything; 1 + 2⁻⁹ is 1 in bf16."""
    [(before, right, whole, weights)] = run_ranks(1, look_into_an_optimizer)
    assert before == 0 and right and all(right) and whole and weights == {1.0}


def told_by_megatron(directory):
    """What its loggers let through while a student is made, saved and loaded."""
    from megatron.core import parallel_state

    from megatron_taopd.checkpoints import saving
    from megatron_taopd.config import OptimizerSection
    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel.layout import student_layout

    platform.emulate_cuda()
    platform.quiet()
    told, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("megatron").addHandler(handler)
    try:
        layout = student_layout(1, 1)
        student = Student(STUDENT, layout, torch.float32, "none", OptimizerSection(), 1, 1000)
        checkpoints = saving.Checkpoints(directory, 1, False, print)
        checkpoints.save(1, student, {})
        checkpoints.close()
        saving.load(directory, 1, student)
        logging.getLogger("megatron.core.models.gpt.gpt_model").warning("not done")
    finally:
        logging.getLogger("megatron").removeHandler(handler)
        parallel_state.destroy_model_parallel()
    return told


def test_megatron_tells_nobody_what_it_will_drop(tmp_path):
    """Which users can do nothing about; other warnings come through."""
    assert run_ranks(1, told_by_megatron, str(tmp_path)) == [["not done"]]


def test_the_trunk_ends_in_hidden_states():
    from megatron.core.models.gpt import GPTModel

    from megatron_taopd.parallel.compat.megatron_internals import HiddenStatesModel

    assert [*inspect.signature(GPTModel._postprocess).parameters][:2] == ["self", "hidden_states"]
    assert "return self._postprocess(" in inspect.getsource(GPTModel.forward)
    hidden = torch.ones(2, 1, 3)
    assert HiddenStatesModel._postprocess(None, hidden, labels=None) is hidden


def test_routers_find_the_name_that_they_ask_for():
    from megatron.core.transformer.moe import moe_utils

    from megatron_taopd.parallel.compat.megatron_internals import define_missing_names

    define_missing_names()
    assert hasattr(moe_utils, "te_general_gemm")


def test_tokens_of_experts_are_picked_without_the_host():
    """As Megatron does by masks: tokens and probabilities by expert, and where they came from."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    from megatron_taopd.parallel.compat.megatron_internals import count_routed_tokens_ahead

    count_routed_tokens_ahead()
    generator = torch.Generator().manual_seed(0)
    tokens, scores = (torch.randn(9, n, generator=generator) for n in (4, 5))
    routing_map = torch.zeros(9, 5, dtype=torch.bool).scatter(1, scores.topk(2).indices, True)
    assert routing_map.sum(0).tolist() != sorted(routing_map.sum(0).tolist())
    found, gradients = [], []
    for permute in (moe_utils.permute, token_dispatcher.permute):
        inputs = tokens.clone().requires_grad_(), scores.clone().requires_grad_()
        picked, probs, rows, *_ = permute(inputs[0], routing_map, inputs[1], num_out_tokens=18)
        (picked.sin() * probs[:, None]).sum().backward()
        found.append((picked, probs, rows))
        gradients.append([x.grad for x in inputs])
    assert found[0][2].tolist() != sorted(found[0][2].tolist())
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, gradients[0], gradients[1]))
    alone = [p(tokens, routing_map, num_out_tokens=18) for p in (moe_utils.permute, permute)]
    assert alone[0][1] is alone[1][1] is None and torch.equal(alone[0][0], alone[1][0])


def test_the_gradient_norm_is_taken_on_the_device(monkeypatch):
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    from megatron_taopd.parallel.compat.megatron_internals import keep_norms_on_the_device

    monkeypatch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    keep_norms_on_the_device()
    assert clip_grads.l2_norm_impl is not local_multi_tensor_l2_norm
    tensors = [[torch.full((2, 2), 3.0), torch.full((4,), 4.0)]]  # of norms 6 and 8
    norm, _ = clip_grads.multi_tensor_applier(
        clip_grads.l2_norm_impl, torch.zeros(1, dtype=torch.int), tensors, False
    )
    assert norm.tolist() == [10.0]
    kernel = object()
    monkeypatch.setattr(clip_grads, "l2_norm_impl", kernel)  # TransformerEngine's, or Apex's
    keep_norms_on_the_device()
    assert clip_grads.l2_norm_impl is kernel


def test_layers_of_transformer_engine_may_accumulate_without_apex(monkeypatch):
    from megatron.core.tensor_parallel import layers

    from megatron_taopd.parallel.compat import megatron_internals

    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    assert not megatron_internals.accumulates_gradients()
    megatron_internals.let_engine_accumulate()
    source = inspect.getsource(layers.ColumnParallelLinear.__init__)
    assert "gradient_accumulation_fusion and not _grad_accum_fusion_available" in source
    assert layers._grad_accum_fusion_available


def test_the_norm_before_a_router_keeps_its_name():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_taopd.parallel.compat.megatron_internals import keep_norm_before_router

    layer = get_gpt_layer_local_spec(num_experts=2)
    names = layer.submodules.sharded_state_dict_keys_map
    assert names["pre_mlp_layernorm."] == "mlp.linear_fc1.layer_norm_"
    keep_norm_before_router(layer)
    assert "pre_mlp_layernorm." not in layer.submodules.sharded_state_dict_keys_map


def emulate():
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    platform.emulate_cuda()
    states = torch.equal(random._get_cuda_rng_state(), torch.get_rng_state())
    counts = token_dispatcher.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True)
    return states, counts.tolist(), torch.zeros(1, device="cuda").device.type


def test_what_stands_in_for_cuda_replaces_names_that_megatron_has():
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):
        assert callable(getattr(random, name))
    parameters = inspect.signature(token_dispatcher.maybe_move_tensor_to_cpu).parameters
    assert {"tensor", "as_numpy"} <= set(parameters)
    if not torch.cuda.is_available():
        assert run_ranks(1, emulate) == [(True, [1.0, 1.0], "cpu")]


# SGLang

ASKED = """
import inspect, json, torch
from sglang.srt.layers.logits_processor import (
    LogitsMetadata, LogitsProcessor, LogitsProcessorOutput
)
from sglang.srt.runtime_context import get_parallel
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.common import init_custom_process_group
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

try:
    SamplingParams(max_new_tokens=0, logit_bias={"-1": 0.0}).verify(1152)
except ValueError as error:
    refusal = str(error)
print(json.dumps({
    "refusal": refusal,
    "bucket": sorted(FlattenedTensorMetadata.__dataclass_fields__),
    "hook": [*inspect.signature(LogitsProcessor.forward).parameters],
    "metadata": [*LogitsMetadata.__dataclass_fields__],
    "output": [*LogitsProcessorOutput.__dataclass_fields__],
    "parallel": hasattr(type(get_parallel()), "attn_tp_rank"),
    "group": inspect.getsource(init_custom_process_group),
}))
"""


@pytest.fixture(scope="module")
def sglang():
    """What SGLang says of itself, in a process with the stand-ins for its CUDA packages."""
    if find_spec("sglang") is None:
        pytest.skip("SGLang is not installed")
    process = subprocess.run(
        [sys.executable, "-c", ASKED],
        env=server_environment("cpu", None, True),
        capture_output=True,
        text=True,
        timeout=patience(120),
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_refusal_tells_the_size_of_the_vocabulary(sglang):
    async def ask(request):
        assert request["sampling_params"]["logit_bias"] == {"-1": 0.0}
        raise RuntimeError(f"http://a/generate: 400 {sglang['refusal']}")

    assert asyncio.run(identity.vocab_size(ask)) == 1152


@pytest.mark.parametrize("raw", [True, False])
def test_raw_log_probabilities_do_not_shrink_with_the_temperature(raw):
    async def ask(request):
        temperature = 1.0 if raw else request["sampling_params"]["temperature"]
        top = [[-place / temperature, place, None] for place in range(request["top_logprobs_num"])]
        return {"meta_info": {"output_top_logprobs": [top]}}

    assert asyncio.run(identity.reports_raw(ask)) is raw


@pytest.mark.slow
def test_the_hook_finds_hidden_states_and_lengths(sglang):
    """What `serving.hidden_states.make_hook` takes from SGLang."""
    names = ["self", "input_ids", "hidden_states", "lm_head", "logits_metadata"]
    assert sglang["hook"][:5] == names and sglang["parallel"]
    assert {"forward_mode", "extend_seq_lens_cpu"} <= set(sglang["metadata"])
    assert "customized_info" in sglang["output"]


@pytest.mark.slow
def test_weights_come_as_sglang_reads_them(sglang):
    """A bucket's entries, and the prefix under which a group meets."""
    assert sglang["bucket"] == ["dtype", "end_idx", "name", "numel", "shape", "start_idx"]
    assert "store = PrefixStore(group_name, store)" in sglang["group"]
