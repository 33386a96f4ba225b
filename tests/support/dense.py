"""The oracle: every formula of the paper, slow and obvious, in float64 on one process.

Nothing here is sharded, chunked, vectorised or clever. Logits are [R, vocabulary] tensors of any
float type; `size` is the common vocabulary, columns from there on do not exist. Results are float64
and differentiable where that makes sense. `in_float32` has the same formulas in float32, for their
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import ROUND_CEILING, Decimal

import torch
from torch import Tensor

_dtype = torch.float64


@contextmanager
def in_float32() -> Iterator[None]:
    """Probabilities and divergences are in float32: what rounding makes of the plain formulas."""
    global _dtype
    _dtype = torch.float32
    try:
        yield
    finally:
        _dtype = torch.float64


def log_probs(logits: Tensor, size: int | None = None) -> Tensor:
    """[R, size] log p over the common vocabulary at temperature 1."""
    return torch.log_softmax(logits.to(_dtype)[:, :size], dim=-1)


def expectation(p: Tensor, f: Tensor) -> Tensor:
    """Σ_v p(v) f(v) with 0·f = 0, also when f is infinite. Zero gradient through the zero terms."""
    return (p * f.masked_fill(p == 0, 0)).sum(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[R] KL(p ‖ q) in nats; +inf where p has mass that q lacks."""
    p = log_p.exp()
    gone = p == 0
    # Filled before the subtraction: −inf − −inf is nan, and so is its gradient.
    return expectation(p, log_p.masked_fill(gone, 0) - log_q.masked_fill(gone, 0))


def entropy(logits: Tensor, size: int | None = None) -> Tensor:
    """[R] H in nats."""
    log_p = log_probs(logits, size)
    return -expectation(log_p.exp(), log_p)


def topk_ids(logits: Tensor, k: int, size: int | None = None) -> list[list[int]]:
    """The k ids of highest logit of each row, highest first, equal logits by lowest id."""
    rows = logits[:, :size].tolist()
    return [sorted(range(len(z)), key=lambda v: (-z[v], v))[:k] for z in rows]


def disagreement(student: Tensor, teacher: Tensor, k: int, size: int | None = None) -> Tensor:
    """[R] D (Eq. 3, 9): KL(teacher ‖ student), both restricted to U = S_S ∪ S_T, renormalised."""
    top_s, top_t = topk_ids(student, k, size), topk_ids(teacher, k, size)
    values = []
    for row, (ids_s, ids_t) in enumerate(zip(top_s, top_t, strict=True)):
        union = sorted({*ids_s, *ids_t})
        log_p_t = log_probs(teacher[row : row + 1, union])
        log_p_s = log_probs(student[row : row + 1, union])
        values.append(kl(log_p_t, log_p_s)[0])
    return torch.stack(values) if values else student.new_zeros(0, dtype=torch.float64)


def compatibility(student: Tensor, teacher: Tensor, k: int, size: int | None = None) -> Tensor:
    """[R] C (Eq. 4, 10): true teacher mass on the student's top-K ids."""
    p_t = log_probs(teacher, size).exp()
    top = torch.tensor(topk_ids(student, k, size), dtype=torch.int64).view(len(student), k)
    return p_t.gather(1, top).sum(1)


def topk_overlap(student: Tensor, teacher: Tensor, k: int, size: int | None = None) -> Tensor:
    """[R] |S_S ∩ S_T| / K: the share of the student's top-K ids that are among the teacher's."""
    both = zip(topk_ids(student, k, size), topk_ids(teacher, k, size), strict=True)
    return torch.tensor([sum(v in t for v in s) / k for s, t in both], dtype=torch.float64)


def compatibility_bound(student: Tensor, teacher: Tensor, k: int, size: int | None = None):
    """[R] Ĉ (Eq. 17): teacher mass on the ids in both top-K sets, a lower bound of C."""
    p_t = log_probs(teacher, size).exp()
    both = zip(topk_ids(student, k, size), topk_ids(teacher, k, size), strict=True)
    sums = [p_t[r, sorted({*s} & {*t})].sum() for r, (s, t) in enumerate(both)]
    return torch.stack(sums) if sums else p_t.new_zeros(0)


def topk_scores(student: Tensor, ids: Tensor, log_probs: Tensor, k: int, size: int):
    """(D, C, H_S, H_T) [R] each, as far as a teacher that reports ids [R, n] and their log p tells:
    the least D that is possible with the unknown ids of U as one, Ĉ, and H of reported | rest."""
    rows = []
    for r, own in enumerate(topk_ids(student, k, size)):
        reported = log_probs[r].double().exp().tolist()
        p = {v: m for v, m in zip(ids[r].tolist(), reported, strict=True) if 0 <= v < size}
        rest = 1 - sum(reported)
        whole = sum(p.values()) + rest
        q = log_probs_of(student[r], list(range(size))).exp().tolist()
        union = {*own, *sorted(p, key=lambda v: (-p[v], v))[:k]}
        known = sorted(union & {*p})
        unknown = [v for v in union if v not in p]
        c = sum(p[v] for v in own if v in p) / whole

        def d(a, p=p, q=q, known=known, unknown=unknown):
            masses = torch.tensor([[p[v] for v in known] + [a], [q[v] for v in known] + [0]])
            masses[1, -1] = sum(q[v] for v in unknown)
            log_p, log_q = (masses.double() / masses.double().sum(1, keepdim=True)).log()
            return kl(log_p, log_q).item()

        low, high = 0.0, min(len(unknown) * min(reported), max(rest, 1e-6))
        for _ in range(100 if unknown else 0):  # D is convex in the mass of the unknown ids
            third = (high - low) / 3
            low, high = (low + third, high) if d(low + third) > d(high - third) else (
                low, high - third
            )  # fmt: skip
        shares = torch.tensor([*p.values(), max(rest, 0)]).double() / whole
        rows.append((d(low), c, entropy(student[r : r + 1], size).item(),
                     entropy(shares[None].log()).item()))  # fmt: skip
    return tuple(torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))


def divergence(
    student: Tensor,
    teacher: Tensor,
    kind: str = "reverse_kl",
    size: int | None = None,
    beta: float = 0.5,
    alpha: float = 0.1,
) -> Tensor:
    """[R] the full-vocabulary losses (Eq. 6 and its alternatives), in nats."""
    log_s, log_t = log_probs(student, size), log_probs(teacher, size)
    if kind == "reverse_kl":
        return kl(log_s, log_t)
    if kind == "forward_kl":
        return kl(log_t, log_s)
    if kind == "jsd":  # β KL(p_T ‖ m) + (1−β) KL(p_S ‖ m) with m = β p_T + (1−β) p_S
        log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log(1 - beta))
        return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)
    if kind == "skewed_reverse_kl":  # KL(p_S ‖ α p_S + (1−α) p_T)
        log_m = torch.logaddexp(log_s + math.log(alpha), log_t + math.log(1 - alpha))
        return kl(log_s, log_m)
    raise AssertionError(kind)


def topk_divergence(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    kind: str,
    size: int,
    absent: tuple[int, ...] = (),
    beta: float = 0.5,
    alpha: float = 0.1,
) -> Tensor:
    """[R] the divergence over the ids that a teacher reports [R, K] and all others together."""
    values = []
    for z, row_ids, row_log_probs in zip(student, ids.tolist(), log_probs.to(_dtype), strict=True):
        common = [v for v in range(size) if v not in absent]
        p = dict(zip(common, log_probs_of(z, common).exp(), strict=True))
        known = [i for i, v in enumerate(row_ids) if v in p]
        rest = [p[v] for v in common if v not in row_ids]
        events = [p[row_ids[i]] for i in known] + [torch.stack(rest).sum()]
        tail = (1 - row_log_probs.exp().sum()).clamp(min=1e-6)
        targets = torch.cat([row_log_probs[known].exp(), tail[None]])
        pair = torch.stack(events)[None].log(), targets[None].log()
        values.append(divergence(*pair, kind, None, beta, alpha)[0])
    return torch.stack(values)


def log_probs_of(z: Tensor, ids: list[int]) -> Tensor:
    """[len(ids)] log p of one row, over these ids alone."""
    return torch.log_softmax(z.to(_dtype)[ids], dim=0)


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return below + (above - below) * (place - math.floor(place))


def robust_normalize(
    values: Tensor, low: float = 0.05, high: float = 0.95, degenerate: float = 0.0
) -> Tensor:
    """[R] Norm (Eq. 11): clip((z − Q05) / (Q95 − Q05 + ε), 0, 1) over the whole batch."""
    z = values.double().tolist()
    if not z:
        return values.double()
    q_low, q_high = quantile(z, low), quantile(z, high)
    if q_high - q_low < 1e-6:
        return torch.full((len(z),), degenerate, dtype=torch.float64)
    scaled = [min(max((x - q_low) / (q_high - q_low + 1e-8), 0.0), 1.0) for x in z]
    return torch.tensor(scaled, dtype=torch.float64)


def selector_scores(
    name: str, D: Tensor, C: Tensor, H: Tensor, lengths: list[int] | None = None
) -> Tensor:
    """[R] the score of each selector (Eq. 12–16) that ranks rows; −inf never to be kept.

    lengths: of the responses, whose rows are end to end; None: they are one.
    """
    places = [(i, n) for n in lengths or [len(D)] for i in range(n)]
    if name == "prefix":
        return torch.tensor([-i for i, _ in places], dtype=torch.float64)
    if name == "prefix_share":
        return torch.tensor([-(i + 0.5) / n for i, n in places], dtype=torch.float64)
    d, h = robust_normalize(D), robust_normalize(H)
    c = robust_normalize(C, degenerate=1.0)
    learnable, incompatible = d * c, d * (1 - c)
    if name.startswith("q3"):
        inside = {
            "q3": d, "q3_high_c": c, "q3_high_dl": learnable,
            "q3_low_dl": -learnable, "q3_high_di": incompatible,
        }[name]  # fmt: skip
        median_h, median_d = quantile(H.double().tolist(), 0.5), quantile(D.double().tolist(), 0.5)
        q3 = (H.double() < median_h) & (D.double() > median_d)
        return inside.masked_fill(~q3, -math.inf)
    return {
        "entropy": h,
        "divergence": d,
        "compatibility": c,
        "tip": h + d - h * d,
        "teachability": learnable,
        "teachability_entropy": h + learnable - h * learnable,
    }[name]


def discrepancy_weights(log_s: Tensor, log_t: Tensor, lengths: list[int], gamma: float) -> Tensor:
    """[R] IW-OPD's w_t = 1 + γ(1 − Σ_{k<t} d_k / Σ_k d_k), d = |log p_T(y) − log p_S(y)| [R].

    The rows of responses of these lengths are end to end; a token that a model lacks has d = 0.
    """
    weights, pairs = [], iter(zip(log_s.tolist(), log_t.tolist(), strict=True))
    for length in lengths:
        response = [next(pairs) for _ in range(length)]
        d = [abs(s - t) if math.isfinite(s) and math.isfinite(t) else 0.0 for s, t in response]
        for t in range(length):
            before = sum(d[:t]) / sum(d) if sum(d) else 0.0
            weights.append(1 + gamma * (1 - before))
    return torch.tensor(weights, dtype=torch.float64)


def budget(ratio: float, num_rows: int) -> int:
    """⌈ρ|I|⌉ with ρ as the decimal a person wrote: .07 × 100 is 7."""
    exact = Decimal(str(ratio)) * num_rows
    return int(exact.to_integral_value(rounding=ROUND_CEILING))


def select(scores: Tensor, ratio: float) -> Tensor:
    """[R] bool: the ⌈ρ|I|⌉ highest scores, ties by earlier row, −inf never."""
    ranked = sorted(range(len(scores)), key=lambda r: (-scores[r].item(), r))
    ranked = [r for r in ranked if scores[r] > -math.inf]
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[ranked[: budget(ratio, len(scores))]] = True
    return mask
