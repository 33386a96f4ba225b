"""D, C, entropies and top-K sets over sharded logits against the dense float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import dense
from support.ranks import run_ranks
from support.shards import (
    LAYOUTS,
    PADDED,
    SIZE,
    columns,
    make_logits,
    on_every_layout,
    relative_error,
    shard_of,
    spoil,
    tops_in_k_blocks,
)

from megatron_taopd.parallel.vocab import (
    VocabShard,
    divergence,
    score_rows,
)
from megatron_taopd.parallel.vocab.normalizers import BLOCK_COLUMNS
from megatron_taopd.parallel.vocab.reductions import top_columns_and_entropy_sums
from megatron_taopd.parallel.vocab.scores import local_candidates, merge_candidates


def oracle(student, teacher, k, size):
    return {
        "disagreement": dense.disagreement(student, teacher, k, size),
        "compatibility": dense.compatibility(student, teacher, k, size),
        "student_entropy": dense.entropy(student, size),
        "teacher_entropy": dense.entropy(teacher, size),
        "topk_overlap": dense.topk_overlap(student, teacher, k, size),
    }


def scores_on_rank(bounds, logits, k):
    """Scores of several (student, teacher) pairs: one call costs more than one pair."""
    shard = shard_of(bounds)
    return [
        score_rows(columns(student, shard), columns(teacher, shard), k, shard, return_ids=True)
        for student, teacher in logits
    ]


@on_every_layout
@pytest.mark.parametrize("k", [1, 16, SIZE])
def test_scores_match_the_oracle_on_every_layout(bounds, k):
    kinds = ("flat", "plain", "peaked", "huge", "tied", "impossible")
    logits = [make_logits(kind) for kind in kinds]
    by_rank = run_ranks(len(bounds) - 1, scores_on_rank, bounds, logits, k)
    for kind, (student, teacher), scores, *others in zip(kinds, logits, *by_rank, strict=True):
        for other in others:  # bit for bit, or the ranks would select different rows
            unasked = {name for name, value in vars(scores).items() if value is None}
            assert unasked == {"teacher_log_prob", "student_log_prob"}
            for field in vars(scores).keys() - unasked:
                assert torch.equal(getattr(scores, field), getattr(other, field)), (kind, field)

        assert scores.student_topk_ids.tolist() == dense.topk_ids(student, k, SIZE), kind
        assert scores.teacher_topk_ids.tolist() == dense.topk_ids(teacher, k, SIZE), kind
        for name, want in oracle(student, teacher, k, SIZE).items():
            assert getattr(scores, name).dtype == torch.float32
            assert relative_error(getattr(scores, name), want) <= 1e-5, (kind, name)


def test_with_the_whole_vocabulary_d_is_the_forward_kl_and_c_is_1():
    student, teacher = make_logits("plain")
    shard = VocabShard(0, PADDED, None, SIZE)
    scores = score_rows(student, teacher, SIZE, shard)
    forward_kl = divergence(student, teacher, shard, "forward_kl")
    torch.testing.assert_close(scores.disagreement, forward_kl, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scores.compatibility, torch.ones(12), rtol=0, atol=1e-6)


def test_d_is_infinite_where_the_student_excludes_what_the_teacher_wants():
    student, teacher = torch.zeros(2, 2, 8)
    student[0, 5] = -torch.inf
    teacher[:, 5] = 4.0
    scores = score_rows(student, teacher, 2, VocabShard(0, 8, None, 8))
    assert scores.disagreement[0] == torch.inf
    assert 0 < scores.disagreement[1] < torch.inf


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("whose", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("column", [0, 60])
def test_a_row_with_a_nan_has_no_scores(column, whose, sign):
    """D and the entropy of its model, on every rank; what guards a step looks at them."""
    logits = [*make_logits("plain")]
    logits[whose] = spoil(logits[whose], 3, column, sign)
    sound = (torch.arange(12) != 3).tolist()
    for (scores,) in run_ranks(4, scores_on_rank, LAYOUTS["some empty"], [logits], 4):
        own = (scores.student_entropy, scores.teacher_entropy)[whose]
        assert scores.disagreement.isfinite().tolist() == own.isfinite().tolist() == sound


@pytest.mark.parametrize("k", [0, SIZE + 1])
def test_k_beyond_the_common_vocabulary_is_refused(k):
    student, teacher = make_logits("plain")
    with pytest.raises(ValueError, match=f"k is {k}: must be within 1 … {SIZE}"):
        score_rows(student, teacher, k, VocabShard(0, PADDED, None, SIZE))


LOGITS = st.sampled_from([-torch.inf, -1e4, -2.0, -0.0, 0.0, 1.0, 1.5, 1e4])


@st.composite
def pairs_of_models(draw):
    """Logits of two models, [rows, 18] each: unrelated, identical or sure of one token."""
    rows = draw(st.lists(st.lists(LOGITS, min_size=36, max_size=36), max_size=3))
    student, teacher = torch.tensor(rows).reshape(-1, 36).split(18, dim=1)
    student, teacher = student.clone(), teacher.clone()
    student[:, 14] = teacher[:, 14] = 0.5  # some probability somewhere
    relation = draw(st.sampled_from(["unrelated", "identical", "one-hot"]))
    if relation == "one-hot":
        token = draw(st.integers(0, 14))
        teacher.fill_(-torch.inf)[:, token] = 0.0
        student[:, token] = 1.0
    return (student, student if relation == "identical" else teacher)


@given(
    models=pairs_of_models(),
    cuts=st.lists(st.integers(0, 18), max_size=4).map(sorted),
    k=st.integers(1, 15),
)
def test_any_rows_in_any_shards(models, cuts, k):
    bounds = [0, *cuts, 18]
    scores = merged(bounds, *models, k)
    assert scores.student_topk_ids.tolist() == dense.topk_ids(models[0], k, 15)
    assert scores.teacher_topk_ids.tolist() == dense.topk_ids(models[1], k, 15)
    for name, want in oracle(*models, k, 15).items():
        assert relative_error(getattr(scores, name), want) <= 1e-5, name


def merged(bounds, student, teacher, k):
    """What every rank comes to, without ranks."""
    shards = [shard_of(bounds, rank, size=15) for rank in range(len(bounds) - 1)]
    local = [
        local_candidates(s.columns(columns(student, s)), s.columns(columns(teacher, s)), k, s.start)
        for s in shards
    ]
    return merge_candidates(torch.stack(local), k, return_ids=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_the_top_k_may_lie_in_k_blocks(k, tied):
    logits = tops_in_k_blocks(k, tied)
    columns, _ = top_columns_and_entropy_sums(logits, k)
    want = dense.topk_ids(logits, k)
    assert [sorted(row) for row in columns.tolist()] == [sorted(row) for row in want]
    assert all(len({v // BLOCK_COLUMNS for v in row}) == k for row in want)


@given(
    width=st.integers(1, 700),
    k=st.integers(1, 40),
    values=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_the_top_k_of_a_row_are_found_in_its_best_blocks(width, k, values, seed):
    """Many equal logits, in rows of many blocks."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-values, values, (2, width), generator=generator).float()
    columns, _ = top_columns_and_entropy_sums(logits, k)
    want = dense.topk_ids(logits, min(k, width))
    assert [sorted(row) for row in columns.tolist()] == [sorted(row) for row in want]


# -------------------------------------------------------------------------------------- absent ids

ABSENT = torch.tensor([0, 3, 47, 48, 89])
PRESENT = [v for v in range(SIZE) if v not in ABSENT]


def absent_on_rank(bounds, logits, k):
    shard = replace(shard_of(bounds), absent=ABSENT)
    return score_rows(*(columns(z, shard) for z in logits), k, shard, return_ids=True)


@on_every_layout
def test_absent_ids_take_part_in_nothing(bounds):
    student, teacher = make_logits("plain")
    student[:, ABSENT], teacher[:, ABSENT] = 50.0, 60.0  # they would win everywhere
    scores = run_ranks(len(bounds) - 1, absent_on_rank, bounds, (student, teacher), 16)[0]
    for name, want in oracle(student[:, PRESENT], teacher[:, PRESENT], 16, None).items():
        assert relative_error(getattr(scores, name), want) <= 1e-5, name
    want = [[PRESENT[i] for i in row] for row in dense.topk_ids(student[:, PRESENT], 16)]
    assert scores.student_topk_ids.tolist() == want
    assert (student[:, ABSENT] == 50).all()  # masked in a copy
