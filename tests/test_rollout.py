import ast
import copy
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from support.ranks import run_ranks
from torch.nn.functional import log_softmax, softmax
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_taopd.data.vocab_map import Vocabulary
from megatron_taopd.rollout import kv_cache
from megatron_taopd.rollout.draws import DrawTokens, gumbel_noise, noise_key
from megatron_taopd.rollout.engine import Sampling
from megatron_taopd.rollout.local import LocalEngine

ROOT = Path(__file__).parent.parent
V = 96
EOS = 1
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [20, 21], [30, 31, 32, 33]]


@cache
def tiny_model(seed=0, tied=True):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,  # peaked enough that a wrong context changes the tokens
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


def tiny_engine(seed=0, model=None, **kwargs):
    return LocalEngine(copy.deepcopy(model or tiny_model()), seed=seed, **kwargs)


def generate(engine, prompts=PROMPTS, indices=None, step=3, **sampling):
    indices = list(range(len(prompts))) if indices is None else indices
    return engine.generate(
        prompts, indices, step, Sampling(**{"max_new_tokens": 12, "samples": 2, **sampling})
    )


def responses(batch):
    split = batch.response_tokens().split(batch.response_lengths.tolist())
    return [tokens.tolist() for tokens in split]


@torch.no_grad()
def teacher_forced(model, batch):
    """[R, V] logits of every response row, each sequence run alone, without padding or cache."""
    rows = []
    for i in range(batch.num_sequences):
        logits = model(batch.sequence(i)[None]).logits[0].float()
        rows.append(logits[batch.prompt_lengths[i] - 1 : -1])
    return torch.cat(rows)


def test_the_batch_lists_every_prompt_with_its_samples_in_order():
    batch = generate(tiny_engine(), indices=[70, 71, 72, 73, 74])
    assert batch.prompts.tolist() == [70, 70, 71, 71, 72, 72, 73, 73, 74, 74]
    for i in range(10):
        prompt = PROMPTS[i // 2]
        assert batch.sequence(i)[: batch.prompt_lengths[i]].tolist() == prompt
    assert batch.num_rows == len(batch.log_probs) == sum(map(len, responses(batch)))
    assert (batch.weight_versions == 0).all()


def test_recorded_log_probs_are_of_the_full_distribution_at_temperature_1():
    batch = generate(tiny_engine(), temperature=0.7, top_p=0.8, top_k=20, samples=4)
    log_probs = log_softmax(teacher_forced(tiny_model(), batch), dim=-1)
    expected = log_probs.gather(1, batch.response_tokens()[:, None]).squeeze(1)
    torch.testing.assert_close(batch.log_probs, expected, atol=1e-5, rtol=0)


ENDS = (EOS, 7, 30, 50, 70)  # so many that lengths are mixed


class Noisy(LogitsProcessor):
    """Makes the argmax of transformers' `generate` the engine's draw."""

    def __init__(self, keys, temperature):
        self.keys, self.temperature, self.position, self.log_probs = keys, temperature, 0, []

    def __call__(self, input_ids, logits):
        noise = gumbel_noise(self.keys, torch.tensor([self.position]), logits.shape[1])
        scores = logits / self.temperature + noise
        self.position += 1
        self.log_probs.append(log_softmax(logits, dim=1).gather(1, scores.argmax(1)[:, None]))
        return scores


def generated_by_transformers(prompt, keys, longest, temperature):
    """[(tokens, log-probabilities)] of samples that start, run and end in one batch."""
    noisy = Noisy(torch.tensor(keys), temperature)
    tokens = copy.deepcopy(tiny_model()).generate(
        torch.tensor([prompt] * len(keys)),
        generation_config=GenerationConfig(
            max_new_tokens=longest, do_sample=False, eos_token_id=[*ENDS], pad_token_id=0
        ),
        logits_processor=LogitsProcessorList([noisy]),
    )[:, len(prompt) :]
    found = []
    for row, log_probs in zip(tokens.tolist(), torch.cat(noisy.log_probs, 1), strict=True):
        length = next((i + 1 for i, token in enumerate(row) if token in ENDS), len(row))
        found.append((row[:length], log_probs[:length]))
    return found


@pytest.mark.parametrize("room", [1, 64])
@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_samples_are_those_of_transformers_own_loop(monkeypatch, batch_size, room):
    """Whoever else is in the batch, whenever they enter and leave, and however often it moves."""
    monkeypatch.setattr(kv_cache, "CACHE_ROOM", room)
    engine = tiny_engine(seed=5, batch_size=batch_size, eos_token_ids=ENDS)
    batch = generate(engine, samples=6, max_new_tokens=40, temperature=0.8)
    split = batch.log_probs.split(batch.response_lengths.tolist())
    ours = iter(zip(responses(batch), split, strict=True))
    for i, prompt in enumerate(PROMPTS):
        keys = [noise_key(5, 3, i, sample) for sample in range(6)]
        for tokens, log_probs in generated_by_transformers(prompt, keys, 40, 0.8):
            found, found_log_probs = next(ours)
            assert found == tokens
            torch.testing.assert_close(found_log_probs, log_probs, atol=1e-5, rtol=0)
    lengths = batch.response_lengths.tolist()
    assert len({*lengths}) > 15 and 0 < batch.truncated.sum() < 10


def test_rows_that_are_finished_leave_and_others_take_their_places(monkeypatch):
    """A pass is over a token of each row that goes on, and over each prompt once."""
    passes, caches = [], []
    begin = kv_cache.ColumnCache.begin

    def counted(self, lengths, prompts, places):
        caches.append(self)
        passes.append((len(lengths), 0 if places is None else len(places), prompts))
        begin(self, lengths, prompts, places)

    monkeypatch.setattr(kv_cache.ColumnCache, "begin", counted)
    engine = tiny_engine(batch_size=4, eos_token_ids=ENDS)
    batch = generate(engine, samples=3, max_new_tokens=40, temperature=0.8)
    entered = [entering for _, entering, _ in passes]
    assert sum(entered) == batch.num_sequences == 15
    # The first token of a response is drawn in the pass over its prompt.
    assert sum(rows for rows, _, _ in passes) == batch.num_rows - 15
    before_the_last = entered[: max(i for i, n in enumerate(entered) if n) + 1]
    full = [rows + entering for rows, entering, _ in passes[: len(before_the_last)]]
    assert set(full) == {4} and len(before_the_last) > 3
    # Longest prompts first: that of 7 tokens three times, and one of the three of 4 tokens.
    assert entered[0] == 4 and passes[0][2].sum(dim=1).tolist() == [7, 4]
    [cache] = {id(cache): cache for cache in caches}.values()
    assert cache.capacity == 4 and cache.columns <= 7 + 40 + kv_cache.CACHE_ROOM
    assert cache.rows == 0


def test_greedy_takes_the_most_likely_token_every_time():
    batch = generate(tiny_engine(), temperature=0.0)
    logits = teacher_forced(tiny_model(), batch)
    assert torch.equal(batch.response_tokens(), logits.argmax(dim=-1))


def on_rank(prompts, indices, samples):
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    engine = tiny_engine(rank=rank, world_size=world_size)
    return generate(engine, prompts, indices, samples=samples)


def assert_same(batch, expected):
    for name in ("tokens", "cu_seqlens", "prompt_lengths", "truncated", "prompts"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    torch.testing.assert_close(batch.log_probs, expected.log_probs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_samples_do_not_depend_on_the_batch(batch_size):
    assert_same(generate(tiny_engine(batch_size=batch_size)), generate(tiny_engine(batch_size=4)))


@pytest.mark.parametrize("prompts, samples", [(5, 2), (5, 1), (1, 1)])
def test_samples_do_not_depend_on_the_ranks(prompts, samples):
    """Even and uneven shares, and fewer samples than ranks; both ranks hold the whole batch."""
    arguments = (PROMPTS[:prompts], list(range(prompts)), samples)
    expected = generate(tiny_engine(), *arguments[:2], samples=samples)
    for batch in run_ranks(2, on_rank, *arguments):
        assert_same(batch, expected)


def test_a_sample_depends_on_seed_step_prompt_and_number_alone():
    alone = generate(tiny_engine(), [PROMPTS[3]], [3], samples=2)
    assert responses(alone) == responses(generate(tiny_engine(), samples=2))[6:8]
    assert responses(alone)[0] != responses(alone)[1]
    for changed in (
        generate(tiny_engine(seed=1), [PROMPTS[3]], [3]),
        generate(tiny_engine(), [PROMPTS[3]], [3], step=4),
        generate(tiny_engine(), [PROMPTS[3]], [4]),
    ):
        assert responses(changed) != responses(alone)


def test_a_prompt_that_comes_twice_in_a_step_gets_different_samples():
    batch = generate(tiny_engine(), [PROMPTS[0], PROMPTS[0]], [8, 8], samples=1)
    once = generate(tiny_engine(), [PROMPTS[0]], [8], samples=2)
    assert responses(batch) == responses(once)
    assert responses(batch)[0] != responses(batch)[1]


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    generate(tiny_engine())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("eos, extra", [(EOS, ()), ([EOS, 40], ()), (EOS, (40, 41)), (None, (7,))])
def test_a_response_ends_with_its_first_stop_token(eos, extra):
    model = copy.deepcopy(tiny_model())
    model.generation_config.eos_token_id = eos
    model.config.eos_token_id = eos
    batch = generate(LocalEngine(model), samples=20, max_new_tokens=30, stop_token_ids=extra)
    stops = {*extra} | ({eos} if isinstance(eos, int) else set(eos or ()))
    assert {True, False} == set(batch.truncated.tolist())
    for response, truncated in zip(responses(batch), batch.truncated.tolist(), strict=True):
        assert not stops.intersection(response[:-1])
        assert (response[-1] not in stops) == truncated
        assert len(response) == 30 or not truncated


def test_an_engine_ends_where_it_is_told_or_where_either_configuration_says():
    model = copy.deepcopy(tiny_model())
    model.generation_config.eos_token_id, model.config.eos_token_id = [40, EOS], 41
    assert LocalEngine(copy.deepcopy(model)).eos_token_ids == {EOS, 40, 41}
    batch = generate(LocalEngine(model, eos_token_ids=(7,)), samples=20, max_new_tokens=30)
    assert {True, False} == set(batch.truncated.tolist())
    for response, truncated in zip(responses(batch), batch.truncated.tolist(), strict=True):
        assert (7 in response) != truncated and 7 not in response[:-1]


def test_every_engine_is_told_where_responses_end():
    """Left to themselves, engines read it from different files."""
    seen = []
    for folder in ("megatron_taopd", "tools", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text())):
                if isinstance(call, ast.Call) and re.match(
                    r"LocalEngine(\.from_hf)?$", ast.unparse(call.func)
                ):
                    seen.append((path.name, "eos_token_ids" in [k.arg for k in call.keywords]))
    assert len(seen) >= 6 and all(passed for _, passed in seen), seen


def test_a_bank_and_the_doctor_end_responses_at_both_configurations(tmp_path):
    """The doctor ends them at the run's stop ids, too."""
    from megatron_taopd.diagnostics.engines import local_engine

    student = tmp_path / "student"
    shutil.copytree(ROOT / "examples" / "tiny_pair" / "student", student)
    (student / "generation_config.json").write_text('{"eos_token_id": 9}')
    with local_engine(Vocabulary.from_pretrained(student), 64, student=student, seed=0) as engine:
        assert engine.eos_token_ids == {1, 9}
    overrides = [f"student.path={student}", "rollout.stop_token_ids=[7]"]
    assert run_ranks(1, doctors_ends, overrides) == [{1, 7, 9}]
    assert run_ranks(1, runs_ends, [*overrides, f"run.dir={tmp_path}/run"]) == [({1, 9}, {7})]


def doctors_ends(overrides):
    from megatron_taopd.config import load
    from megatron_taopd.data.texts import vocabularies
    from megatron_taopd.parallel import platform
    from megatron_taopd.preflight import agreement

    platform.initialize()
    config = load(ROOT / "examples" / "tiny_pair.yaml", overrides)
    engine = agreement._engine(config, vocabularies(config)[0])
    return set(engine.eos_token_ids)


def runs_ends(overrides):
    """Of the engine that a run builds, and of its sampling."""
    from megatron.core import parallel_state

    from megatron_taopd.build import build
    from megatron_taopd.config import load
    from megatron_taopd.parallel import platform

    platform.initialize()
    alone = ["student.parallel.tp=1", "teacher.parallel.pp=1", "log.tensorboard=false"]
    config = load(ROOT / "examples" / "tiny_pair.yaml", [*overrides, *alone])
    try:
        run = build(config, lambda: None)
        sampling = run.rollouts.sampling
        return set(run.engine.eos_token_ids), set(sampling.stop_token_ids)
    finally:
        parallel_state.destroy_model_parallel()


def test_without_stop_tokens_every_response_runs_to_the_limit():
    model = copy.deepcopy(tiny_model())
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    batch = generate(LocalEngine(model))
    assert batch.response_lengths.unique().tolist() == [12]
    assert batch.truncated.all()


def test_a_models_own_generation_settings_are_not_used():
    """generate() would fill in what its caller leaves open, here a penalty on repeated tokens."""
    model = copy.deepcopy(tiny_model())
    model.generation_config = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, eos_token_id=EOS, temperature=0.1, top_k=2
    )
    assert_same(generate(LocalEngine(model)), generate(tiny_engine()))


def test_tokens_beyond_the_common_vocabulary_are_never_drawn_nor_counted():
    model = tiny_model()
    batch = generate(tiny_engine(vocab_size=10), [[5, 6]], samples=50)
    assert batch.response_tokens().max() < 10
    log_probs = log_softmax(teacher_forced(model, batch)[:, :10], dim=-1)
    expected = log_probs.gather(1, batch.response_tokens()[:, None]).squeeze(1)
    torch.testing.assert_close(batch.log_probs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_updated_weights_generate_as_the_model_they_came_from(tied):
    source = tiny_model(seed=1, tied=tied)
    engine = tiny_engine(model=tiny_model(seed=0, tied=tied))
    before = generate(engine)
    engine.update_weights(iter(source.named_parameters()), version=7)
    after = generate(engine)
    assert (after.weight_versions == 7).all()
    assert_same(after, generate(tiny_engine(model=source)))
    assert responses(after) != responses(before)


def test_a_tied_head_may_be_sent_under_either_name_or_both():
    source = tiny_model(seed=1)
    tensors = dict(source.named_parameters(remove_duplicate=False))
    assert {"lm_head.weight", "model.embed_tokens.weight"} < tensors.keys()
    for left_out in ("lm_head.weight", "model.embed_tokens.weight", None):
        engine = tiny_engine()
        engine.update_weights([(n, t) for n, t in tensors.items() if n != left_out], version=1)
        assert_same(generate(engine), generate(tiny_engine(model=source)))


def test_an_incomplete_or_foreign_update_is_refused_by_name():
    tensors = dict(tiny_model(seed=1).named_parameters())
    with pytest.raises(ValueError, match=r"model.layers.9.mlp.weight: .* no such weight"):
        tiny_engine().update_weights([("model.layers.9.mlp.weight", torch.ones(1))], version=1)
    with pytest.raises(ValueError, match=r"model.norm.weight: shape \[5\]; .* has \[32\]"):
        tiny_engine().update_weights([("model.norm.weight", torch.ones(5))], version=1)
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"model.norm.weight: missing .* with 0 others"):
        tiny_engine().update_weights(tensors.items(), version=1)


@pytest.mark.parametrize(
    "warp",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 2.0, "top_p": 0.9}],
)
def test_draws_follow_the_warped_distribution(warp):
    """40,000 draws from one distribution, against an own statement of temperature/top-k/top-p."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -3.0])
    draws = 40_000
    keys = torch.tensor([noise_key(0, 0, prompt, 0) for prompt in range(draws)])
    draw = DrawTokens(Sampling(max_new_tokens=1, **warp))
    start = torch.zeros(draws, dtype=torch.int64)
    drawn, log_probs = draw(logits.expand(draws, -1).clone(), keys, start)

    expected = softmax(logits.double() / warp.get("temperature", 1.0), dim=0)
    kept = expected.clone()  # sorted from the most to the least likely
    kept[warp.get("top_k", 6) :] = 0
    kept[expected.cumsum(0) - expected >= warp.get("top_p", 1.0)] = 0
    expected = kept / kept.sum()
    counts = torch.bincount(drawn, minlength=6).double()
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    chi_square = ((counts - draws * expected) ** 2 / (draws * expected))[live].sum()
    assert chi_square < 25  # p < 2e-4 at 5 degrees of freedom; fixed keys, so never by chance
    torch.testing.assert_close(log_probs, log_softmax(logits, dim=0)[drawn])


def test_noise_is_standard_gumbel_and_independent_between_positions_and_sequences():
    keys = torch.tensor([noise_key(0, 0, prompt, 0) for prompt in range(64)])
    noise = torch.stack([gumbel_noise(keys, torch.tensor([p]), 1000) for p in range(8)])
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.02)
    uniform = (-(-noise).exp()).exp()
    deviation = (uniform.flatten().sort().values - torch.linspace(0, 1, noise.numel())).abs().max()
    assert deviation < 1.63 / noise.numel() ** 0.5  # Kolmogorov–Smirnov at 1 %
    for dim in (0, 1):  # neighbours in position, in sequence
        a, b = (
            noise.narrow(dim, 0, noise.shape[dim] - 1),
            noise.narrow(dim, 1, noise.shape[dim] - 1),
        )
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.01


def test_noise_of_a_sequence_is_its_own_whatever_the_batch():
    keys = torch.tensor([noise_key(0, 0, prompt, 0) for prompt in range(40)])
    positions = torch.arange(40) % 7
    whole = gumbel_noise(keys, positions, 20_000)  # several blocks
    alone = gumbel_noise(keys[17:18], torch.tensor([3]), 20_000)
    assert torch.equal(whole[17:18], alone)


def test_a_checkpoint_directory_is_loaded(tmp_path):
    model = tiny_model(seed=1)
    model.save_pretrained(tmp_path)
    engine = LocalEngine.from_hf(tmp_path, torch.float32, "cpu", seed=0)
    assert_same(generate(engine), generate(tiny_engine(model=model)))
    engine.close()
