"""HF checkpoint → Megatron trunk → HF: bit-identical, and the same logits as transformers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import CONFIGS, SIZES, save_random
from support.ranks import RankError, run_ranks
from transformers import AutoModelForCausalLM, Qwen3Config

from megatron_taopd.parallel.packing import pack


@pytest.fixture(scope="session")
def hf_dirs(tmp_path_factory):
    """A random tiny checkpoint of each family."""
    root = tmp_path_factory.mktemp("hf")
    for name, config in CONFIGS.items():
        save_random(config, root / name)
    return {name: str(root / name) for name in CONFIGS}


def trunk_on_ranks(hf_dir, tp, pp, sequence, lengths, ep=1):
    """On every rank: packed logits of the last stage (None elsewhere), and the exported tensors.

    Under expert parallelism data-parallel ranks run the lengths rotated.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_taopd.formats import hf as hf_checkpoint
    from megatron_taopd.models import gpt, weights
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform

    platform.emulate_cuda()
    try:
        layout = layouts.student_layout(tp, pp, sequence, ep=ep)
        hf = hf_checkpoint.load_config(hf_dir)
        config = gpt.transformer_config(hf, layout, torch.float32)
        # In training, Megatron refuses tensor-parallel experts without sequence parallelism.
        model = gpt.Trunk(hf, config, layout).eval()
        weights.load_weights(model, hf_dir)
        rotated = lengths[layout.dp_rank :] + lengths[: layout.dp_rank]
        tokens, positions, cu_seqlens = packed(rotated, hf.vocab_size)

        def forward_step(_, model):
            hidden = gpt.packed_forward(model, tokens, positions, cu_seqlens, max(lengths))

            def logits(hidden, non_loss_data=True):
                rows = gpt.pick_rows(hidden, torch.arange(len(tokens)), layout)
                return rows @ model.head_weight.T

            return hidden, logits

        with torch.no_grad():
            outputs = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=None,
                model=model,
                num_microbatches=1,
                seq_length=len(tokens),
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        exported = exports(model)
        return (outputs[0] if outputs else None), exported, str(layout)
    finally:
        parallel_state.destroy_model_parallel()


def exports(model):
    """The exported tensors, the same however many parameters travel together."""
    from unittest import mock

    from megatron_taopd.models import weights
    from megatron_taopd.parallel import packing

    together = list(weights.export_weights(model))
    for limit in (1, 20_000):  # each parameter alone, and some
        with mock.patch.object(packing, "EXPORT_BYTES", limit):
            for (name, tensor), (other, expected) in zip(
                weights.export_weights(model), together, strict=True
            ):
                assert name == other and torch.equal(tensor, expected), name
    return dict(together)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (10, [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7)]),
        (1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7)]),
        (99, [(0, 3), (3, 6), (6, 7)]),
    ],
)
def test_parameters_of_a_stage_travel_together(limit, expected):
    """By hand: 20 is more than is let together, and so is 4 + 6 + 1."""
    sizes, stages = [4, 6, 1, 20, 3, 7, 2], [0, 0, 0, 1, 1, 1, 2]
    assert list(pack(sizes, stages, limit)) == expected
    assert list(pack([], [], limit)) == []


def packed(lengths, vocab_size):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab_size, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return tokens, positions, cu_seqlens


def transformers_logits(hf_dir, lengths):
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    tokens, _, _ = packed(lengths, model.config.vocab_size)
    with torch.no_grad():
        return torch.cat([model(input_ids=t[None]).logits[0] for t in tokens.split(lengths)])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("tp", "pp", "sequence"),
    [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False), (2, 2, True), (4, 1, False)],
)
def test_logits_and_round_trip(hf_dirs, family, tp, pp, sequence):
    """Invariant 7, with packed sequences of unequal length on the Megatron side."""
    assert_agrees_with_transformers(hf_dirs[family], tp, pp, sequence)


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_parallel_ranks_that_share_a_key_value_head(tmp_path, sequence):
    save_random(Qwen3Config(**SIZES | {"num_key_value_heads": 2}, head_dim=16), tmp_path)
    assert_agrees_with_transformers(str(tmp_path), 4, 1, sequence)


def assert_agrees_with_transformers(hf_dir, tp, pp, sequence):
    lengths = [9, 4, 11]
    results = run_ranks(tp * pp, trunk_on_ranks, hf_dir, tp, pp, sequence, lengths)
    assert results[0][2] == f"TP({tp})-PP({pp})-DP(1)" + ("-SP" if sequence else "")

    shards = [logits for logits, _, _ in results if logits is not None]
    expected = transformers_logits(hf_dir, lengths)
    logits = torch.cat(shards, dim=-1)[:, : expected.shape[-1]]
    assert (logits - expected).abs().max() < 1e-4

    assert_exports([exported for _, exported, _ in results], hf_dir)


def assert_exports(exports, hf_dir):
    original = load_file(f"{hf_dir}/model.safetensors")
    for exported in exports:
        assert exported.keys() == original.keys()
        for name, tensor in original.items():
            assert torch.equal(exported[name], tensor), name


EXPERT_LAYOUTS = [  # (tp, pp, sequence, ep)
    (1, 1, False, 2),
    (1, 1, False, 4),
    (2, 1, False, 2),
    (2, 1, True, 2),
    (1, 2, False, 2),
]


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe-unnormalised"])
@pytest.mark.parametrize(("tp", "pp", "sequence", "ep"), EXPERT_LAYOUTS)
def test_logits_of_experts_on_several_ranks(hf_dirs, family, tp, pp, sequence, ep):
    """Every data-parallel rank runs other sequences."""
    lengths = [9, 4, 11, 6][: 3 + (ep > 3)]
    world_size = tp * pp * ep
    results = run_ranks(world_size, trunk_on_ranks, hf_dirs[family], tp, pp, sequence, lengths, ep)
    assert results[0][2] == f"TP({tp})-PP({pp})-DP({ep})-EP({ep})" + ("-SP" if sequence else "")
    shards = [logits for logits, _, _ in results if logits is not None]
    for dp_rank in range(ep):
        rotated = lengths[dp_rank:] + lengths[:dp_rank]
        expected = transformers_logits(hf_dirs[family], rotated)
        own = torch.cat(shards[dp_rank * tp : (dp_rank + 1) * tp], dim=-1)
        assert (own[:, : expected.shape[-1]] - expected).abs().max() < 1e-4
    assert_exports([exported for _, exported, _ in results], hf_dirs[family])


def layouts_on_ranks(ep):
    from megatron_taopd.parallel import layout as layouts

    refusals = []
    for make in layouts.student_layout, layouts.forward_layout:
        with pytest.raises(ValueError) as caught:
            make(2, 1, ep=ep)
        refusals.append(str(caught.value))
    return refusals


def test_expert_parallelism_divides_data_parallelism():
    for refusals in run_ranks(4, layouts_on_ranks, 4):
        for refusal in refusals:
            assert "ep 4 does not divide the data-parallel size 2" in refusal


def test_rope_as_transformers_4_wrote_it(hf_dirs, tmp_path):
    """rope_theta and rope_scaling beside each other, instead of rope_parameters."""
    import json
    import shutil

    shutil.copytree(hf_dirs["llama"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(config))

    lengths = [90, 7]
    ((logits, _, _),) = run_ranks(1, trunk_on_ranks, str(tmp_path), 1, 1, False, lengths)
    expected = transformers_logits(hf_dirs["llama"], lengths)
    assert (logits[:, : expected.shape[-1]] - expected).abs().max() < 1e-4


def save_from_ranks(hf_dir, out, max_file_bytes):
    from megatron.core import parallel_state

    from megatron_taopd.formats import hf as hf_checkpoint
    from megatron_taopd.models import gpt, weights
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform

    platform.emulate_cuda()
    try:
        layout = layouts.student_layout(1, 2)
        hf = hf_checkpoint.load_config(hf_dir)
        model = gpt.Trunk(hf, gpt.transformer_config(hf, layout, torch.float32), layout)
        weights.load_weights(model, hf_dir)
        weights.save_hf(weights.export_weights(model), hf_dir, out, torch.float32, max_file_bytes)
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("max_file_bytes", [10**9, 20_000])
def test_saved_directory_loads_in_transformers(hf_dirs, tmp_path, max_file_bytes):
    out = tmp_path / "out"
    run_ranks(2, save_from_ranks, hf_dirs["qwen2"], str(out), max_file_bytes)
    assert (out / "model.safetensors.index.json").exists() == (max_file_bytes < 10**9)
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    for name, tensor in load_file(f"{hf_dirs['qwen2']}/model.safetensors").items():
        assert torch.equal(saved[name], tensor), name
    assert not list(tmp_path.glob("*.incomplete"))


def damage_truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_drop(path):
    from safetensors.torch import save_file

    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors")


def damage_extra(path):
    from safetensors.torch import save_file

    tensors = load_file(path / "model.safetensors") | {"model.layers.9.bias": torch.zeros(3)}
    save_file(tensors, path / "model.safetensors")


def damage_shape(path):
    from safetensors.torch import save_file

    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(31)
    save_file(tensors, path / "model.safetensors")


def damage_index(path):
    (path / "model.safetensors").unlink()
    index = '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'
    (path / "model.safetensors.index.json").write_text(index)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "damaged safetensors"),
        (damage_drop, "model.layers.1.mlp.up_proj.weight"),
        (damage_extra, "model.layers.9.bias"),
        (damage_shape, r"model.norm.weight is \[31\] where config.json asks for \[32\]"),
        (damage_index, "names model-00001-of-00002.safetensors, which is not there"),
    ],
)
def test_bad_checkpoints_are_refused(hf_dirs, tmp_path, damage, message):
    import shutil

    path = tmp_path / "bad"
    shutil.copytree(hf_dirs["qwen3"], path)
    damage(path)
    with pytest.raises(RankError, match=message):
        run_ranks(1, trunk_on_ranks, str(path), 1, 1, False, [4])


def rows_on_rank(directory, name, wanted):
    from megatron_taopd.formats.hf import HFCheckpoint

    return [HFCheckpoint(directory).rows(name, ids) for ids in wanted]


def test_rows_of_a_matrix_come_in_the_order_asked_for(tmp_path):
    """Runs, single rows, backwards; zeros where none is asked for."""
    matrix = torch.randn(20, 3).bfloat16()
    save_file({"w": matrix}, tmp_path / "model.safetensors")
    wanted = [[], [-1, -1], [*range(20)], [5, 6, 7, -1, 0, 19, 18, 17, -1, 2], [3]]
    wanted = [torch.tensor(ids, dtype=torch.int64) for ids in wanted]
    (found,) = run_ranks(1, rows_on_rank, tmp_path, "w", wanted)
    for ids, rows in zip(wanted, found, strict=True):
        assert torch.equal(rows, matrix[ids].masked_fill((ids < 0)[:, None], 0))
    with pytest.raises(RankError, match="tensor v is missing"):
        run_ranks(1, rows_on_rank, tmp_path, "v", wanted)
