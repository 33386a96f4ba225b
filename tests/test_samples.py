"""What a run keeps of single tokens, against plain numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from megatron_taopd.evaluation.in_loop import Example, wilson
from megatron_taopd.monitoring import samples
from megatron_taopd.monitoring.plane import SIDE, drawn_plane
from megatron_taopd.monitoring.samples import Answers, Samples, Snapshot, kinds_of, take
from megatron_taopd.rollout.engine import make_rollout_batch
from megatron_taopd.step.batch_scores import BatchScores, HeldRows
from megatron_taopd.step.distiller import Selection
from megatron_taopd.step.selection import SELECTORS, Choice
from megatron_taopd.types import TokenScores, WantedRows

# Of two responses: D, C, and what follows from the definitions (Q05 and Q95 of nine are .4 and 7.6
# of D = 0 … 8; of C they are .04 and .76 of C = 0 … .8).
D = [0.0, 8.0, 2.0, 6.0, 4.0, 1.0, 7.0, 3.0, 5.0]
C = [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
KEPT = [1, 2, 8]
NORMAL_D = [min(1, max(0, (d - 0.4) / 7.2)) for d in D]
NORMAL_C = [min(1, max(0, (c - 0.04) / 0.72)) for c in C]
# D above its median, 4; then C̃ of at least a half.
KINDS = "alalaaiai"


class Spelling:
    """A tokenizer whose tokens are words, put together with spaces; 0 is special."""

    def decode(self, tokens, skip_special_tokens=False):
        words = ["<s>", "one", "two", "three", "four", "five"]
        return " ".join(words[t] for t in tokens.tolist() if t or not skip_special_tokens)


def batch_of(responses):
    responses = [torch.tensor(r) for r in responses]
    log_probs = [-torch.arange(1.0, 1 + len(r)) for r in responses]
    versions = [torch.zeros(len(r)) for r in responses]
    prompts = [[0, 1]] * len(responses)
    return make_rollout_batch(
        prompts, range(len(responses)), responses, log_probs, [False] * len(responses), versions
    )


def look(selector="teachability", count=4, kept=KEPT) -> Snapshot:
    batch = batch_of([[2, 3, 0], [4, 0], [5, 5, 5, 0]])
    mask = torch.zeros(9, dtype=torch.bool)
    mask[kept] = True
    rows = TokenScores(torch.tensor(D), torch.tensor(C), torch.arange(9) / 8, torch.arange(9) / 16)
    scores = BatchScores.whole(rows, batch.cu_rows)
    choice = Choice(scores, selector, SELECTORS[selector](scores, 0), mask)
    wanted = WantedRows.known(batch, mask.nonzero()[:, 0])
    return take(7, batch, Selection(choice, wanted, {}), Spelling(), count)


def test_a_look_has_every_score_of_every_token():
    seen = look()
    assert (seen.step, seen.rows, seen.kept) == (7, 9, 3)
    first, last = seen.responses  # no token of the second was kept
    assert first.prompt == "one" and first.tokens == ["two", " three", " <s>"]
    assert last.tokens == ["five", " five", " five", " <s>"] and last.length == 4
    assert first.kept == [False, True, True] and last.kept == [False, False, False, True]
    for response, rows in ((first, slice(0, 3)), (last, slice(5, 9))):
        scores = response.scores
        assert scores["D"] == D[rows]
        assert scores["C"] == pytest.approx(C[rows])
        assert scores["d"] == pytest.approx(NORMAL_D[rows], abs=5e-3)  # three digits
        assert scores["c"] == pytest.approx(NORMAL_C[rows], abs=5e-3)
        assert response.kinds == KINDS[rows]
    assert first.scores["log_p"] == [-1, -2, -3]
    assert first.scores["student"] == [0, 0.125, 0.25]
    assert first.scores["teacher"] == [0, 0.0625, 0.125]
    products = [d * c for d, c in zip(NORMAL_D, NORMAL_C, strict=True)]
    order = sorted(range(9), key=lambda row: -products[row])
    assert first.scores["rank"] == [order.index(row) + 1 for row in range(3)]


def look_of_a_rank(selector, owner):
    """What a rank sees that holds some of the three responses; the first response is kept whole."""
    batch = batch_of([[2, 3, 0], [4, 0], [5, 5, 5, 0]])
    held = HeldRows(
        batch.cu_rows,
        torch.tensor([i for i, rank in enumerate(owner) if rank == dist.get_rank()]).long(),
        dist.group.WORLD,
    )
    mask, ids = torch.zeros(9, dtype=torch.bool), held.ids()
    mask[[0, 1, 2, 8]] = True
    of_all = (torch.tensor(D), torch.tensor(C), torch.arange(9) / 8, torch.arange(9) / 16)
    scores = BatchScores(TokenScores(*(column[ids] for column in of_all)), held)
    choice = Choice(scores, selector, SELECTORS[selector](scores, 0), mask[ids])
    wanted = WantedRows.known(batch, mask.nonzero()[:, 0])
    kept = replace(wanted, ids=ids[mask[ids]])
    return take(7, batch, Selection(choice, kept, {}), Spelling(), 4)


@pytest.mark.parametrize("selector", ["teachability", "q3_low_dl", "full"])
@pytest.mark.parametrize("owner", [[0, 1, 0], [1, 1, 1]])
def test_ranks_see_together_what_one_sees_alone(selector, owner):
    """Ties among priorities included: rank 1 holds the middle, or all of it."""
    first, other = run_ranks(2, look_of_a_rank, selector, owner)
    assert other is None
    assert first == look(selector, kept=[0, 1, 2, 8])


def test_selectors_without_priorities_give_no_rank():
    for selector in ("full", "random"):
        assert look(selector).responses[0].scores["rank"] is None


def test_kinds_are_counted_over_the_whole_batch():
    assert look().counts == {"l": (2, 1), "i": (2, 1), "a": (5, 1)}
    drawn = drawn_plane(look())
    assert drawn["quadrants"]["l"] == ("22.2 %", "33.3 %")
    assert drawn["split"] == (round(SIDE * (1 - NORMAL_D[4]), 1), SIDE / 2)
    assert drawn_plane(look(kept=[]))["quadrants"]["l"] == ("22.2 %", "none")


def test_where_nothing_varies_all_agree():
    same = torch.full((5,), 0.3)
    assert kinds_of(same, torch.ones(5), 0.3).tolist() == [2] * 5
    assert len(kinds_of(torch.zeros(0), torch.zeros(0), 0.0)) == 0
    batch = batch_of([[2, 3, 0], [4, 0]])
    scores = BatchScores.whole(TokenScores(same, same, same, same), batch.cu_rows)
    choice = Choice(scores, "full", torch.ones(5), torch.ones(5, dtype=torch.bool))
    seen = take(7, batch, Selection(choice, WantedRows.all(batch), {}), Spelling(), 4)
    assert seen.split == 0 and seen.counts == {"l": (0, 0), "i": (0, 0), "a": (5, 5)}


def test_the_plane_has_a_bounded_number_of_points(monkeypatch):
    assert len(look().points) == 9
    monkeypatch.setattr(samples, "MOST_POINTS", 2)
    points = look().points
    assert [point[3] for point in points].count(1) == 2 and len(points) == 4
    c, d, kind, kept, raw_c, raw_d, text = points[0]
    assert (c, d, kind, kept, raw_c, raw_d, text) == (1, 0, "a", 0, 0.8, 0, "two")


def test_responses_share_a_bounded_number_of_tokens(monkeypatch):
    monkeypatch.setattr(samples, "MOST_TOKENS", 4)
    first, *_ = look(count=2).responses
    assert first.tokens == ["two", " three"] and first.length == 3
    assert len(look(count=1).responses) == 1


def test_the_first_and_the_newest_look_survive_a_restart(tmp_path):
    kept, path = Samples(), tmp_path / "samples.json"
    for step in (1, 20, 40):
        kept.keep(kept.steps, replace(look(), step=step))
        kept.keep(kept.evaluations, Answers(step, [Example("p", "r", "a", "g", True)]))
    kept.write(path)
    assert Samples.read(path, before=41) == kept
    assert [each.step for each in kept.steps] == [1, 40]
    assert [each.step for each in Samples.read(path, before=40).steps] == [1]
    assert Samples.read(path, before=0) == Samples()
    assert Samples.read(tmp_path / "none.json", before=9) == Samples()
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"samples\.json: cannot be read"):
        Samples.read(path, before=9)


def by_definition(right: int, of: float) -> tuple[float, float]:
    """The shares whose own standard error the observed one is 1.96 of away, found by bisection."""

    def end(far: float) -> float:
        near = share = right / of
        for _ in range(60):
            middle = (near + far) / 2
            within = (share - middle) ** 2 <= 1.959964**2 * middle * (1 - middle) / of
            near, far = (middle, far) if within else (near, middle)
        return near

    return end(0.0), end(1.0)


@pytest.mark.parametrize("right, of", [(0, 10), (3, 10), (10, 10), (170, 1000)])
def test_an_interval_is_wilsons(right, of):
    found = wilson([1] * right + [0] * (of - right), 1)
    assert found == pytest.approx(by_definition(right, of), abs=1e-6)


def test_wilsons_interval_of_a_textbook():
    assert wilson([1] * 81 + [0] * 182, 1) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_responses_to_one_prompt_are_no_independent_ones():
    def width(per_prompt):
        low, high = wilson(per_prompt, 4)
        return high - low

    one_each = wilson([1] * 30 + [0] * 70, 1)
    assert wilson([4] * 30 + [0] * 70, 4) == pytest.approx(one_each, abs=2e-3)
    assert wilson([2] * 100, 4) == pytest.approx(by_definition(200, 400), abs=1e-6)
    assert width([2] * 100) < width([1, 3] * 50) < width([0, 4] * 50)
