"""Teachers on a real SGLang server, against transformers, a Megatron teacher and dense float64."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future
from functools import partial
from math import nan
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support import dense
from support.families import SIZES, save_random
from support.ranks import run_ranks
from support.served_teacher import ServedTeacher
from support.sglang_server import serve
from support.shards import SIZE, columns, make_logits, shard_of
from support.step import (
    OPTIMIZER,
    assert_gradients,
    dense_gradients,
    dense_step,
    gather_gradients,
    make_batch,
    row_logits,
    whole_mask,
)
from transformers import AutoModelForCausalLM, GraniteConfig

from megatron_taopd.models import weights
from megatron_taopd.parallel.vocab import score_topk
from megatron_taopd.serving.client import Elsewhere, Replicas
from megatron_taopd.serving.hidden_states import HOOK_ARGS, KEY, pack, unpack
from megatron_taopd.serving.model import ServedModel
from megatron_taopd.teacher import sglang as module
from megatron_taopd.teacher.sglang import SGLangTeacher, SGLangTopkTeacher, student_ids_of
from megatron_taopd.teacher.topk import TopkRows
from megatron_taopd.types import TeacherSequences, WantedRows

STUDENT, TEACHER = "examples/tiny_pair/student", "examples/tiny_pair/teacher"
VOCABULARY, HIDDEN = 1152, 128
MODEL = ServedModel.of(TEACHER, 116)
K, REPORTED = 5, 12
BATCH = make_batch(VOCABULARY)
FIELDS = ("disagreement", "compatibility", "student_entropy", "teacher_entropy")
OF_A_STEP = (*FIELDS, "teacher_log_prob")


# Scores and losses from a teacher's top-K


def report(teacher, n, size=SIZE):
    """What a teacher of these logits reports: its top n of all columns that are not nan."""
    log_probs = teacher.double().nan_to_num(nan=-torch.inf).log_softmax(1)
    top = log_probs.topk(n)
    return top.indices.masked_fill(top.indices >= size, -1), top.values.float()


def overlap(student, ids, log_probs):
    """|S_S ∩ S_T| / K of each row, S_T being the K likeliest reported ids that both models have."""
    shares = []
    for own, row, log_p in zip(dense.topk_ids(student, K, SIZE), ids, log_probs, strict=True):
        common = [(-p, v) for v, p in zip(row.tolist(), log_p.tolist(), strict=True) if v >= 0]
        shares.append(len({*own} & {v for _, v in sorted(common)[:K]}) / K)
    return shares


def topk_scores_on_rank(bounds, cases, k):
    """Scores of logits: the head is the identity."""
    shard = shard_of(bounds)
    weight = columns(torch.eye(bounds[-1]), shard).t()
    return [
        score_topk(student.nan_to_num(0), weight, ids, log_probs, k, shard, 5)
        for student, (ids, log_probs) in cases
    ]


@pytest.mark.parametrize("bounds", [[0, 96], [0, 48, 96], [0, 91, 96], [0, 0, 96]])
@pytest.mark.parametrize("n", [5, 11, 40, 90])
def test_topk_scores_match_the_oracle(bounds, n):
    logits = [make_logits(kind) for kind in ("flat", "plain", "peaked", "tied")]
    foreign = make_logits("plain", seed=2)
    foreign[1][:, SIZE:] = 4.0  # of the teacher alone, and likely
    logits.append(foreign)
    cases = [(student, report(teacher, n)) for student, teacher in logits]
    by_rank = run_ranks(len(bounds) - 1, topk_scores_on_rank, bounds, cases, K)
    for results in by_rank:
        for scores, first, (student, reported) in zip(results, by_rank[0], cases, strict=True):
            wanted = dense.topk_scores(student, *reported, K, SIZE)
            for field, want in zip(FIELDS, wanted, strict=True):
                got = getattr(scores, field)
                assert torch.equal(got, getattr(first, field))
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6, msg=field)
            assert scores.topk_overlap.tolist() == pytest.approx(overlap(student, *reported))


@pytest.mark.parametrize("kind", ["flat", "plain", "peaked"])
def test_topk_scores_are_bounds_that_close(kind):
    student, teacher = make_logits(kind)
    exact = (
        dense.disagreement(student, teacher, K, SIZE),
        dense.compatibility(student, teacher, K, SIZE),
        dense.entropy(student, SIZE),
        dense.entropy(teacher, SIZE),
    )
    last = None
    for n in (5, 8, 16, 32, SIZE):
        [scores] = topk_scores_on_rank_0(student, report(teacher, n))
        bounds = [getattr(scores, field).double() for field in FIELDS]
        for bound, value in zip(bounds, exact, strict=True):
            assert (bound <= value + 1e-5).all()
        if n == K:  # Eq. 17
            want = dense.compatibility_bound(student, teacher, K, SIZE)
            torch.testing.assert_close(bounds[1], want, rtol=1e-5, atol=1e-6)
        if last:
            assert all((b >= a - 1e-5).all() for a, b in zip(last, bounds, strict=True))
        last = bounds
    for bound, value in zip(last, exact, strict=True):
        torch.testing.assert_close(bound, value, rtol=1e-5, atol=2e-6)


def topk_scores_on_rank_0(student, reported):
    shard = shard_of([0, 96], rank=0)
    return [score_topk(student.nan_to_num(0), torch.eye(96), *reported, K, shard, 5)]


def test_a_student_that_is_sure_of_what_the_teacher_does_not_report_disagrees():
    student, teacher = torch.zeros(1, 96), torch.zeros(1, 96)
    student[0, 7], teacher[0, 20:25] = 12.0, torch.linspace(12.0, 13.0, 5)
    [scores] = topk_scores_on_rank_0(student, report(teacher, 5))
    exact = dense.disagreement(student, teacher, K, SIZE)
    assert exact - 0.1 < scores.disagreement <= exact and exact > 8
    assert scores.compatibility == 0


def test_topk_scores_of_nothing():
    shard = shard_of([0, 96], rank=0)
    weight, no_ids, no_rows = torch.eye(96), torch.zeros(0, 8).long(), torch.zeros(0, 8)
    assert (
        len(score_topk(torch.zeros(0, 96), weight, no_ids, no_rows, 5, shard, 4).compatibility) == 0
    )
    reported = torch.full((1, 8), -1), torch.full((1, 8), -3.0)
    scores = score_topk(torch.zeros(1, 96), weight, *reported, 5, shard, 4)
    assert scores.disagreement == 0 and scores.compatibility == 0
    with pytest.raises(ValueError, match="k is 9: the teacher reports 8"):
        score_topk(torch.zeros(1, 96), weight, *reported, 9, shard, 4)


def test_rows_travel_as_they_are():
    rows = TopkRows(torch.tensor([[5, -1]]), torch.tensor([[-0.5, -torch.inf]]), torch.ones(1))
    packed = rows.pack()
    assert packed.shape == (1, 5)
    for name, value in vars(TopkRows.unpack(packed)).items():
        assert torch.equal(value, getattr(rows, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_hidden_states_are_packed_without_loss(rows, dtype):
    hidden = torch.randn(2 * rows, 6).to(dtype)[rows:]
    packed = json.loads(json.dumps(pack(hidden)))
    assert torch.equal(unpack(packed), hidden) and unpack(packed).dtype == dtype


# A server


@pytest.fixture(scope="module")
def server():
    # With the prefix cache: what a request's own key is for.
    args = [arg for arg in HOOK_ARGS if arg != "--disable-radix-cache"]
    args.append("--enable-return-hidden-states")
    with serve(TEACHER, context_length=124, mem_fraction=0.2, args=args) as server:
        yield server


@pytest.fixture
def replicas(server):
    with Replicas([server.url], MODEL, fixed_weights=True) as replicas:
        yield replicas


@pytest.fixture(scope="module")
def transformers_rows():
    """[R, D] last hidden states, and [R, V] log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    hidden, log_probs = [], []
    for i in range(BATCH.num_sequences):
        rows = BATCH.row_positions[slice(*BATCH.cu_rows[i : i + 2].tolist())]
        with torch.no_grad():
            output = model(BATCH.sequence(i)[None], output_hidden_states=True)
        hidden.append(output.hidden_states[-1][0, rows])
        log_probs.append(output.logits[0, rows].log_softmax(1))
    return torch.cat(hidden), torch.cat(log_probs)


@pytest.mark.parametrize("packs", [True, False])
def test_hidden_states_are_those_that_the_head_takes(replicas, transformers_rows, packs):
    teacher = SGLangTeacher(replicas, MODEL, HIDDEN, torch.float32)
    assert teacher.packs
    teacher.packs = packs
    for _ in range(2):  # the second time, all of it could be in the prefix cache
        part = teacher.read(BATCH)
        assert part.holders.tolist() == [[0]] * BATCH.num_sequences
        torch.testing.assert_close(part.held.rows, transformers_rows[0], rtol=0, atol=1e-5)
    assert teacher.metrics()["teacher/tokens_per_second"] > 0


@pytest.mark.parametrize("packs", [True, False])
def test_a_cached_prefix_is_noticed(replicas, packs):
    teacher = SGLangTeacher(replicas, MODEL, HIDDEN, torch.float32)
    teacher.packs, request = packs, teacher.request
    teacher.request = lambda *args: request(*args) | {"extra_key": None}
    with pytest.raises(RuntimeError, match=r"http://.*of \d+ × 128 were expected, .* has 1 × 128"):
        for _ in range(2):
            teacher.read(BATCH)


def test_top_ids_and_sampled_tokens(replicas, transformers_rows):
    _, log_probs = transformers_rows
    shifted = (torch.arange(VOCABULARY) + 1) % VOCABULARY
    shifted[7] = -1  # a teacher whose ids are others, and one of which the student lacks
    for student_ids in (None, student_ids_of(shifted, VOCABULARY)):
        teacher = SGLangTopkTeacher(replicas, MODEL, REPORTED, student_ids)
        rows = TopkRows.unpack(teacher.read(BATCH).held.rows)
        top = log_probs.topk(REPORTED)
        ids = top.indices
        if student_ids is not None:
            ids = (ids - 1).where(ids > 0, VOCABULARY - 1)
            ids = ids.masked_fill(ids == 7, -1)
        assert torch.equal(rows.ids, ids)
        torch.testing.assert_close(rows.log_probs, top.values, rtol=0, atol=2e-5)
        sampled = log_probs.gather(1, BATCH.response_tokens()[:, None])[:, 0]
        torch.testing.assert_close(rows.token_log_probs, sampled, rtol=0, atol=2e-5)
        metrics = teacher.metrics()
        assert metrics["teacher/topk_bound"] == 1
        assert metrics["teacher/topk_mass"] == pytest.approx(top.values.exp().sum(1).mean().item())


@pytest.mark.parametrize("form", [SGLangTeacher, SGLangTopkTeacher])
def test_rows_of_a_teacher_with_its_own_tokens(replicas, transformers_rows, form):
    """Rows that skip tokens, as where a token is spelled out; and a sequence without any."""
    teacher = form(replicas, MODEL, *((HIDDEN, torch.float32) if form is SGLangTeacher else (8,)))
    picked = [0, 1, BATCH.num_sequences - 1]
    keep = [BATCH.rows_of(torch.tensor([i]))[::2] for i in picked]
    keep[1] = keep[1][:0]
    sequences = [BATCH.sequence(i) for i in picked]
    starts = [torch.tensor([0, *map(len, parts)]).cumsum(0) for parts in (sequences, keep)]
    rows = torch.cat(keep)
    teacher_inputs = TeacherSequences(torch.cat(sequences), *starts, BATCH.row_positions[rows])
    got = teacher.read(teacher_inputs).held.rows
    if form is SGLangTeacher:
        torch.testing.assert_close(got, transformers_rows[0][rows], rtol=0, atol=1e-5)
    else:
        assert torch.equal(TopkRows.unpack(got).ids, transformers_rows[1][rows].topk(8).indices)


def test_what_no_server_takes(replicas):
    teacher = SGLangTeacher(replicas, MODEL, HIDDEN, torch.float32)
    sequences = TeacherSequences(
        torch.zeros(117).long(), torch.tensor([0, 117]), torch.tensor([0, 1]), torch.tensor([3])
    )
    with pytest.raises(ValueError, match=r"sequence 0 of the teacher has 117 tokens; .* 116"):
        teacher.read(sequences)
    with pytest.raises(ValueError, match=r"teacher.topk: 1153 must be within 1 … 1152"):
        SGLangTopkTeacher(replicas, MODEL, 1153)
    with pytest.raises(RuntimeError, match="2 × 64 were expected, the answer has 2 × 128"):
        SGLangTeacher(replicas, MODEL, 64, torch.float32)


def test_the_fingerprint_is_stable(replicas):
    teachers = [SGLangTopkTeacher(replicas, MODEL, n) for n in (4, 8)]
    assert len({teacher.fingerprint() for teacher in teachers for _ in range(2)}) == 1


def test_the_fingerprint_sees_another_model():
    servers = Servers(answer(-4.0), answer(-4.04), RuntimeError("is being restarted"))
    teacher = stub(servers)
    first = teacher.fingerprint()
    servers.all[0].says = answer(-4.03)  # as kernels may differ
    assert teacher.fingerprint() == first
    servers.all[0].says = servers.all[1].says = answer(-4.1)
    assert teacher.fingerprint() != first
    servers.all[1].says = answer(-4.3)
    with pytest.raises(RuntimeError, match=r"url1: other weights than url0: .* by 0.2 on average"):
        teacher.fingerprint()
    with pytest.raises(RuntimeError, match=r"no server of the teacher answers: url0: .*gone"):
        stub(Servers(RuntimeError("gone"))).fingerprint()


class Busy(ServedTeacher):
    """Servers of one rank of several, which are lost when they are asked for some sequences.

    `asked` has the tokens that they were asked for, and the attempts before.
    """

    def __init__(self, servers, loses_them=()):
        super().__init__(TEACHER)
        self.loses_them, self.asked, self.ready = loses_them, [], self.all * servers

    async def complete(self, request, made, alone):
        assert not alone
        self.asked.append((request["input_ids"], made))
        if any(request["input_ids"][:4] == tokens[:4] for tokens in self.loses_them):
            self.ready = []
            raise Elsewhere(made + 1)
        return await super().complete(request, made, alone)


def form_of(form, replicas, own=None):
    if form == "topk":
        return SGLangTopkTeacher(replicas, MODEL, REPORTED, own=own)
    return SGLangTeacher(replicas, MODEL, HIDDEN, torch.float32, own)


def read_by_several(form, servers, loses_them):
    """Two reads: what this rank holds and who holds what; what it was asked for; metrics."""
    rank = dist.get_rank()
    own = Busy(servers[rank], loses_them if rank == 1 else ()) if servers[rank] else None
    teacher = form_of(form, ServedTeacher(TEACHER) if rank == 0 else None, own)
    parts = [teacher.read(BATCH) for _ in range(2)]
    held = [(part.held.ids, part.held.rows, part.holders[:, 0]) for part in parts]
    return held, own.asked if own else [], teacher.metrics()


@pytest.mark.parametrize("form", ["hidden_states", "topk"])
def test_several_ranks_ask_for_a_share_and_hold_it(form):
    """Rank 1 has two servers of three, which it loses on two of its sequences; rank 2 has none."""
    sequences = [BATCH.sequence(i).tolist() for i in range(12)]
    lost = [7, 10]
    answers = run_ranks(3, read_by_several, form, [1, 2, 0], [sequences[i] for i in lost])
    alone = form_of(form, ServedTeacher(TEACHER))
    rows = alone.read(BATCH).held.rows
    ends = BATCH.cu_seqlens[1:] - BATCH.lengths / 2
    dealt = (ends > BATCH.cu_seqlens[-1] / 3).long()
    assert set(dealt[lost].tolist()) == {1} and 0 < dealt.sum() < 12
    dealt[lost] = 0  # taken over
    for read, expected in enumerate((dealt, torch.zeros(12).long())):
        for rank, (held, _, _) in enumerate(answers):
            ids, got, holders = held[read]
            assert torch.equal(holders, expected)
            assert torch.equal(ids, BATCH.rows_of((expected == rank).nonzero()[:, 0]))
            assert torch.equal(got, rows[ids])
    (_, first, metrics), (_, second, _), _ = answers
    made = [made for _, made in first]
    assert made == [0] * (12 - int(dealt.sum()) - 2) + [1] * 2 + [0] * 12
    assert len(second) == int(dealt.sum()) + 2 and {made for _, made in second} == {0}
    if form == "topk":
        assert metrics["teacher/topk_mass"] == pytest.approx(alone.metrics()["teacher/topk_mass"])


def given_up(trouble):
    own = Busy(0)
    own.troubles = f"url{dist.get_rank()} {trouble}" if dist.get_rank() else ""
    teacher = form_of("topk", ServedTeacher(TEACHER) if dist.get_rank() == 0 else None, own)
    with pytest.raises(RuntimeError) as error:
        teacher.read(BATCH)
    return str(error.value)


def test_no_rank_has_a_server_left():
    assert run_ranks(2, given_up, "is gone") == ["no server is left: url1 is gone"] * 2


class Servers:
    """Stands in for `Replicas` of servers with canned answers."""

    def __init__(self, *answers):
        self.all = self.live = [
            SimpleNamespace(url=f"url{i}", says=a, dtype="bfloat16") for i, a in enumerate(answers)
        ]

    async def post(self, replica, path, request):
        if isinstance(replica.says, Exception):
            raise replica.says
        return replica.says

    async def complete(self, request, made, alone):
        return self.all[0].says

    def spawn(self, coroutine):
        future = Future()
        try:
            future.set_result(self.run(coroutine))
        except Exception as error:
            future.set_exception(error)
        return future

    def run(self, coroutine):
        return asyncio.run(coroutine)


def answer(log_prob):
    return [{"meta_info": {"input_token_logprobs": [[None, 1, None], [log_prob, 2, None]]}}]


def stub(servers, form=SGLangTopkTeacher):
    teacher = form.__new__(form)
    teacher.replicas, teacher.model, teacher.group, teacher.leads = servers, MODEL, None, True
    teacher.reference = None
    return teacher


def test_servers_without_hidden_states():
    empty = {"meta_info": {}}
    with pytest.raises(RuntimeError, match=r"url0: hidden states of 2 × 128 .* has 0 × 0"):
        SGLangTeacher(Servers(empty), MODEL, HIDDEN, torch.float32)

    class Refuses(Servers):
        async def post(self, replica, path, request):
            if request["return_hidden_states"]:
                raise RuntimeError("400 exceeds the server maximum")
            return empty

    with pytest.raises(ValueError, match=r"teacher.servers: url0 returns .* --forward-hooks"):
        SGLangTeacher(Refuses(None), MODEL, HIDDEN, torch.float32)


# A teacher whose logits are more than head · hidden

GRANITE = GraniteConfig(
    **SIZES,
    logits_scaling=6.0,
    embedding_multiplier=3.0,
    tie_word_embeddings=False,
    architectures=["GraniteForCausalLM"],
)


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    """A Granite's directory, and a server of it."""
    path = tmp_path_factory.mktemp("granite") / "model"
    save_random(GRANITE, path)
    with serve(path, context_length=124, mem_fraction=0.2, args=HOOK_ARGS) as server:
        yield path, server


def test_a_factor_of_the_logits_is_in_the_head(granite):
    path, server = granite
    tokens = make_batch(GRANITE.vocab_size).sequence(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0].log_softmax(1)
    everything = TeacherSequences(
        tokens, *(torch.tensor([0, len(tokens)]),) * 2, torch.arange(len(tokens))
    )
    with Replicas([server.url], ServedModel.of(path, 116), fixed_weights=True) as replicas:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
            teacher = SGLangTeacher(replicas, replicas.model, 32, dtype)
            rows = teacher.read(everything).held.rows.float()
            head = weights.load_head(path, torch.arange(200), dtype).float()
            got = (rows @ head.T).log_softmax(1)
            torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
        # As it would be without the factor.
        plain = (rows @ model.lm_head.weight.T.detach()).log_softmax(1)
        assert (plain - expected).abs().max() > 1


def no_factor(config, tensors):
    config["logits_scaling"] = 1.0


def one_row(config, tensors):
    tensors["lm_head.weight"][17] *= 1.01


def another_seed(config, tensors):
    tensors["lm_head.weight"] = torch.randn(200, 32) * 0.2


@pytest.mark.parametrize("change", [no_factor, one_row, another_seed])
def test_a_head_that_is_not_the_servers_is_noticed(granite, tmp_path, change):
    path, server = granite
    config = json.loads((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    change(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = ServedModel.of(path, 116)
    with Replicas([server.url], model, fixed_weights=True) as replicas:
        served = rf"teacher.servers: {server.url}: .* head in {tmp_path} .* take teacher.form: topk"
        with pytest.raises(ValueError, match=served) as caught:
            SGLangTeacher(replicas, model._replace(path=str(tmp_path)), 32, torch.float32)
        assert "\n" not in str(caught.value)


class Computes(Servers):
    """Stands in for servers with a head of their own, each with its factor of the logits."""

    def __init__(self, head, *factors):
        super().__init__(*factors)
        self.head = head

    async def post(self, replica, path, request):
        tokens = torch.tensor(request["input_ids"])
        hidden = torch.randn(len(tokens), 32, generator=torch.Generator().manual_seed(0))
        log_probs = (hidden @ self.head.T * replica.says).log_softmax(1)[:-1]
        said = log_probs.gather(1, tokens[1:, None])[:, 0].tolist()
        triples = [[None, 0, None], *([lp, 0, None] for lp in said)]
        return {"meta_info": {KEY: [pack(hidden)], "input_token_logprobs": triples}}


def test_every_server_is_compared_with_our_head(tmp_path):
    save_random(GRANITE, tmp_path)
    model = ServedModel.of(tmp_path, 116)
    head = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    SGLangTeacher(Computes(head, 1 / 6, 1 / 6), model, 32, torch.float32)
    for factors, url in (((1 / 6, 1 / 6.1), "url1"), ((1, 1 / 6), "url0"), ((nan, 1), "url0")):
        with pytest.raises(ValueError, match=rf"teacher.servers: {url}: .* head in {tmp_path} "):
            SGLangTeacher(Computes(head, *factors), model, 32, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_our_head_says_and_how_far_rounding_reaches(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(module, "_BLOCK", 64)  # of 200 rows
    save_random(GRANITE, tmp_path)
    torch.manual_seed(1)
    hidden = (torch.randn(50, 32) * 4).to(dtype)
    targets = torch.randint(200, (50,))
    got, explained = module.head_log_probs(tmp_path, hidden, targets, dtype)
    head = load_file(tmp_path / "model.safetensors")["lm_head.weight"].double() / 6
    logits = hidden.double() @ head.T
    expected = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    # As a server has it: all of it in its own dtype, logits included.
    theirs = (hidden @ (head * 6).to(dtype).T / 6).float().log_softmax(1)
    theirs = theirs.gather(1, targets[:, None])[:, 0].double()
    assert (got - theirs).abs().max() <= explained
    assert explained < {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(got, expected, rtol=0, atol=explained)


def test_numbers_tell_their_dtype():
    values = torch.randn(4, 8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert module._dtype_of(values.to(dtype)) == dtype
        assert module._dtype_of(values.to(dtype).float()) == dtype


# The whole step


def step_on_ranks(form, url, loss, mask=None, student_parallel=(2, 1, False)):
    """One step with a teacher of this form: scores, mask, metrics and gradients."""
    from megatron.core import parallel_state

    from megatron_taopd.config.schema import LossSection, SelectionSection, TrainSection
    from megatron_taopd.data.vocab_map import VocabMap
    from megatron_taopd.models.student import Student
    from megatron_taopd.parallel import layout as layouts
    from megatron_taopd.parallel import platform
    from megatron_taopd.step.distiller import Distiller
    from megatron_taopd.step.guard import Guard
    from megatron_taopd.step.output_heads import open_heads
    from megatron_taopd.step.scoring import whole_scores
    from megatron_taopd.step.training import backward
    from megatron_taopd.teacher.megatron import MegatronTeacher
    from megatron_taopd.teacher.teachers import Teachers

    platform.emulate_cuda()
    teacher = None
    try:
        layout = layouts.student_layout(*student_parallel)
        student = Student(STUDENT, layout, torch.float32, "none", OPTIMIZER, 100, VOCABULARY)
        if form == "megatron":
            teacher = MegatronTeacher(TEACHER, layouts.forward_layout(1, 1), torch.float32, 60)
        else:
            leads = dist.get_rank() == 0
            replicas = Replicas([url], MODEL, fixed_weights=True) if leads else None
            own = Replicas([url], MODEL, fixed_weights=True) if form == "hidden_states" else None
            teacher = (
                SGLangTopkTeacher(replicas, MODEL, REPORTED)
                if form == "topk"
                else SGLangTeacher(replicas, MODEL, HIDDEN, torch.float32, own)
            )
        vocab_map, directory = VocabMap(torch.arange(VOCABULARY)), str(TEACHER)
        heads = open_heads(student, None if form == "topk" else directory, vocab_map, 7)
        teachers = Teachers({"teacher": teacher}, {"teacher": vocab_map})
        distiller = Distiller(
            student, teachers, heads, Guard(3, 0), SelectionSection(ratio=0.3, k=K),
            LossSection(**loss), TrainSection(micro_batch_tokens=60),
        )  # fmt: skip
        assigned = distiller.assign(BATCH)
        rows = distiller.dispatch(distiller.read(BATCH), BATCH, assigned)
        scored = distiller.score(BATCH, assigned, rows)
        if mask is None:
            kept = distiller.select(scored, 0).kept
            mask = whole_mask(kept, BATCH.num_rows)
        else:
            kept = WantedRows.known(BATCH, mask.nonzero()[:, 0])
        metrics = backward(scored, kept, student, heads, distiller.loss, 60)
        return whole_scores(scored), mask, metrics, gather_gradients(student), teacher.fingerprint()
    finally:
        if form != "megatron" and teacher is not None:
            teacher.close()
        parallel_state.destroy_model_parallel()


def test_a_step_equals_that_with_a_megatron_teacher(server):
    loss = {"kind": "reverse_kl"}
    results = run_ranks(2, step_on_ranks, "hidden_states", server.url, loss)
    [(scores, mask, metrics, gradients, _), _] = run_ranks(2, step_on_ranks, "megatron", None, loss)
    rounding = dense_step(STUDENT, TEACHER, BATCH, VOCABULARY, mask=mask)["rounding"]
    assert scores.teacher_log_prob.isfinite().all()
    for result in results:
        for field in OF_A_STEP:
            got, want = getattr(result[0], field), getattr(scores, field)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(result[1], mask)
        assert result[2]["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
        assert_gradients(result[3], gradients, rounding)
    assert results[0][4] == results[1][4]


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd", "sampled_token"])
def test_a_topk_step_agrees_with_dense_float64(server, kind):
    loss = {"kind": kind, "beta": 0.4}
    models = STUDENT, TEACHER, BATCH, VOCABULARY
    z_s, z_t, _ = row_logits(*models)
    top = z_t.log_softmax(1).topk(REPORTED)
    wanted = dense.topk_scores(z_s.detach(), top.indices, top.values, K, VOCABULARY)
    sampled = dense.log_probs(z_t).gather(1, BATCH.response_tokens()[:, None])[:, 0]
    wanted = (*wanted, sampled)
    mask = dense.select(dense.selector_scores("teachability", *wanted[:3]), 0.3)

    def dense_loss(z_s, z_t):
        if kind == "sampled_token":
            tokens = BATCH.response_tokens()[:, None]
            log_p, log_q = (z.log_softmax(1).gather(1, tokens)[:, 0] for z in (z_s, z_t))
            ratio = (log_p - BATCH.log_probs.to(log_p.dtype)).exp()
            return (ratio * (log_p - log_q).detach())[mask].mean()
        reported = top.indices[mask], top.values[mask]
        return dense.topk_divergence(z_s[mask], *reported, kind, VOCABULARY, beta=0.4).mean()

    value, *expected = dense_gradients(dense_loss, *models)
    for parallel in ((2, 1, False), (1, 1, False)) if kind == "jsd" else ((2, 1, False),):
        step = partial(step_on_ranks, student_parallel=parallel)
        for scores, kept, metrics, gradients, _ in run_ranks(2, step, "topk", server.url, loss):
            for field, want in zip(OF_A_STEP, wanted, strict=True):
                got = getattr(scores, field).double()
                torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5, msg=field)
            assert torch.equal(kept, mask)
            assert metrics["loss"] == pytest.approx(value, rel=1e-4)
            assert_gradients(gradients, *expected)


def test_a_server_in_trouble_stops_every_rank(server):
    for message, other in (run_ranks(2, trouble_on_rank_0, server.url),):
        assert message == other
        assert "1 × 128" in message[0] and "url" in message[1]


def trouble_on_rank_0(url):
    """What both ranks raise where a prefix is cached, and where no server fits."""
    leads = dist.get_rank() == 0
    replicas = Replicas([url], MODEL, fixed_weights=True) if leads else None
    messages = []
    try:
        teacher = SGLangTeacher(replicas, MODEL, HIDDEN, torch.float32)
        request = teacher.request
        teacher.request = lambda *args: request(*args) | {"extra_key": None}
        try:
            for _ in range(2):
                teacher.read(BATCH)
        except RuntimeError as error:
            messages.append(str(error))
        try:
            SGLangTeacher(replicas, MODEL, 64, torch.float32)
        except RuntimeError as error:
            messages.append(f"url {error}")
        return messages
    finally:
        if leads:
            replicas.close()
