"""What was measured, as tables, beside its targets, and for the models in full."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from rich.box import SIMPLE
from rich.table import Table

from benchmarks.step.pairs import LAYERS, RATIO
from megatron_taopd.formats.hf_map import padded_vocab_size


def extrapolate(measured: dict) -> dict:
    """Seconds per token of a Qwen3-4B and a Qwen3-14B in full, from a layer's and a row's."""
    setup = measured["setup"]
    layer = {key: median(values) for key, values in measured["layer_seconds"].items()}
    all_rows = measured["heads"][0]
    costs = {
        "teacher": LAYERS["teacher"] * layer["teacher forward"],
        "forward": LAYERS["student"] * layer["student forward"],
        "backward": LAYERS["student"] * layer["student backward"],
        "score": median(all_rows["seconds"]["score"]) / all_rows["rows"],
        "loss": median(all_rows["seconds"]["loss"]) / all_rows["rows"],
    }
    # Matrices alone, at one operation a second.
    vocab = padded_vocab_size(151936)
    trunk = {
        "student": 2 * LAYERS["student"] * 2560 * (2 * 4096 + 2 * 1024 + 3 * 9728),
        "teacher": 2 * LAYERS["teacher"] * 5120 * (2 * 5120 + 2 * 1024 + 3 * 17408),
    }
    operations = {
        "teacher": trunk["teacher"],
        "forward": trunk["student"],
        "backward": 2 * trunk["student"],
        "score": 2 * vocab * (2560 + 5120),
        "loss": 2 * vocab * (3 * 2560 + 5120),
    }
    shares = {"cut": setup["cut"], "rows_per_token": setup["rows_per_token"]}
    return {
        "layer_seconds": layer,
        "costs": costs,
        **shares,
        "arms": extrapolated_arms(costs, **shares),
        "by_operations": extrapolated_arms(operations, **shares),
    }


def extrapolated_arms(costs: dict[str, float], cut: float, rows_per_token: float) -> list[dict]:
    """Return the costs of each arm by phase, for one token that is rolled out and `rows_per_token`
    rows."""
    run = {"none": costs["forward"] + costs["backward"]}
    run["full"] = run["none"] + costs["forward"]
    loss = rows_per_token * costs["loss"]
    scoring = costs["forward"] + rows_per_token * costs["score"]
    rows = [
        {"name": "full OPD", "recompute": r, "scoring": 0.0, "training": run[r] + loss} for r in run
    ]
    for schedule, recompute, trained in (
        ("two_pass", "none", run["none"]),
        ("two_pass", "full", run["full"]),
        ("replay", "full", run["none"]),
    ):
        rows.append(
            {
                "name": f"TA-OPD {100 * RATIO:g} %, {schedule}",
                "recompute": recompute,
                "scoring": scoring,
                "training": cut * trained + RATIO * loss,
            }
        )
    for row in rows:
        row["teacher"] = costs["teacher"]
        row["step"] = row["teacher"] + row["scoring"] + row["training"]
    return rows


REPLAY = f"TA-OPD {100 * RATIO:g} %, replay"


def medians(row: dict) -> dict[str, float]:
    return {phase: median(times) for phase, times in row["seconds"].items()}


def step_seconds(row: dict) -> float:
    return row["step"] if "step" in row else sum(medians(row).values())


def against_full(rows: list[dict], row: dict) -> dict[str, float]:
    """The step's time over full OPD's: with the same recomputation, and in its best form."""
    full = {r["recompute"]: step_seconds(r) for r in rows if r["name"] == "full OPD"}
    own = step_seconds(row)
    return {"÷ same": own / full[row["recompute"]], "÷ best": own / min(full.values())}


def step_memory(measured: dict, row: dict) -> int:
    """Peak of the whole step above the weights: what phases leave for later ones, gradients."""
    memory, schedule = measured["memory"], row["schedule"]
    kept = memory["kept_outputs"] if schedule == "replay" else 0
    scoring = 0 if schedule == "single_pass" else memory[schedule]
    rows = memory["teacher_rows"]
    training = rows + kept + row["training_temporaries"]
    return memory["gradients"] + max(memory["teacher"], rows + scoring, training)


def named(rows: list[dict], name: str, recompute: str = "full") -> dict:
    return next(r for r in rows if r["name"] == name and r["recompute"] == recompute)


def targets(measured: dict) -> Iterator[tuple[str, str, float, float]]:
    """(what, ≤ or ≥, limit, measured)."""
    rows, pair = measured["arms"], measured["setup"]["pair"]
    what, limit, timed = f"{REPLAY}: step", 0.9, rows
    if pair == "slice":
        what, limit, timed = f"{REPLAY}, 4B/14B: step", 0.95, measured["extrapolation"]["arms"]
    ratios = against_full(timed, named(timed, REPLAY))
    yield f"{what} ÷ full OPD's, same recomputation", "≤", limit, ratios["÷ same"]
    yield f"{what} ÷ full OPD's, best form", "≤", limit, ratios["÷ best"]
    all_rows, kept = measured["heads"]
    for form in ("unchunked", "chunked"):
        what = f"head temporaries of the loss: kept rows ÷ all rows, {form}"
        yield what, "≤", 0.15, kept["chunked"] / all_rows[form]
    if pair != "slice":
        cut = max(
            (row for row in measured["concentration"] if row["mass_of_best"] >= 0.9),
            key=lambda row: row["concentrate"],
        )
        what = f"concentrate {cut['concentrate']:g}: response tokens trained"
        yield f"{what}, {cut['mass_of_best']:.0%} of the kept mass", "≤", 0.6, cut["trained_share"]
        full, auto = measured["horizon"][:2]
        what = f"horizon {auto['length']} of {full['length']}: rollout to training"
        ratio = step_seconds(auto) / step_seconds(full)
        yield f"{what}, {auto['mass']:.0%} of the mass", "≤", 0.65, ratio
    for peer in measured.get("trl", ()):
        ours = named(rows, "full OPD", peer["recompute"])
        what = f"full OPD, recompute {peer['recompute']}"
        yield f"{what}: time of TRL's ÷ ours", "≥", 1.5, step_seconds(peer) / step_seconds(ours)
        ratio = step_memory(measured, ours) / peer["peak"]
        yield f"{what}: peak above the weights, ours ÷ TRL's", "≤", 0.5, ratio


def tables(measured: dict) -> Iterator[Table]:
    setup = measured["setup"]
    rows = [
        {
            "scoring": 0.0,
            **row,
            **medians(row),
            "step": step_seconds(row),
            **against_full(measured["arms"], row),
            "FLOP": row["flops/of_full_opd"],
            "tok/s": round(setup["tokens"] / step_seconds(row)),
            "trained": row["tokens_trained"] / setup["tokens"],
            "MB train": round(row["training_temporaries"] / 1e6),
            "MB step": round(step_memory(measured, row) / 1e6),
        }
        for row in measured["arms"]
    ]
    yield table_of(
        f"{setup['pair']}: {setup['sequences']} sequences, {setup['tokens']:,} tokens, "
        f"{setup['rows']:,} rows, {setup['micro_batches']} micro-batches, {setup['layout']}, "
        f"{setup['precision']}, {setup['threads']} threads, median of {setup['repeats']}",
        rows,
        *("name", "recompute", "teacher", "scoring", "training", "step", "÷ same", "÷ best"),
        *("FLOP", "tok/s", "trained", "mass_retained", "MB train", "MB step"),
    )
    yield table_of(
        f"concentrate, at {100 * RATIO:g} %",
        measured["concentration"],
        *("concentrate", "trained_share", "mass_of_best", "mass_retained"),
    )
    heads = [
        {"rows": head["rows"], **{f"MB {k}": head[k] / 1e6 for k in ("unchunked", "chunked")}}
        | medians(head)
        for head in measured["heads"]
    ]
    title = f"heads alone, chunks of {setup['chunk_rows']} rows; memory of the loss, seconds"
    yield table_of(title, heads, "rows", "MB unchunked", "MB chunked", "loss", "score")
    if "horizon" in measured:
        full = step_seconds(measured["horizon"][0])
        rows = [
            row | medians(row) | {"all": step_seconds(row), "÷ none": step_seconds(row) / full}
            for row in measured["horizon"]
        ]
        phases = ("rollout", "teacher", "scoring", "training", "all", "÷ none")
        title = f"rollout.horizon, with {REPLAY}; seconds"
        yield table_of(title, rows, "name", "length", "rows", "kept_rows", "mass", *phases)
    if "trl" in measured:
        rows = [
            row | medians(row) | {"MB step": round(row["peak"] / 1e6)} for row in measured["trl"]
        ]
        title = "TRL's DistillationTrainer: teacher, loss and backward pass"
        yield table_of(title, rows, "name", "sequences_at_a_time", "step", "MB step", "loss")
    if "extrapolation" in measured:
        yield from extrapolation_tables(measured["extrapolation"])
    if "agreement" in measured:
        rows = [{"": name, "loss, gradient": x} for name, x in measured["agreement"].items()]
        yield table_of("relative difference", rows, "", "loss, gradient")
    rows = [
        {
            "": what,
            "limit": f"{sign} {limit:g}",
            "measured": value,
            "is": "met" if (value <= limit if sign == "≤" else value >= limit) else "missed",
        }
        for what, sign, limit, value in targets(measured)
    ]
    yield table_of("targets", rows, "", "limit", "measured", "is")


def extrapolation_tables(figures: dict) -> Iterator[Table]:
    layer, costs = figures["layer_seconds"], figures["costs"]
    rows = [
        {"": f"{symbol}: {what}", "layers": layers, "each": 1e6 * each, "all": 1e6 * costs[name]}
        for symbol, what, layers, each, name in (
            ("t", "teacher forward", LAYERS["teacher"], layer["teacher forward"], "teacher"),
            ("f", "student forward", LAYERS["student"], layer["student forward"], "forward"),
            ("b", "student backward", LAYERS["student"], layer["student backward"], "backward"),
            ("s", "both heads, scores", 1, costs["score"], "score"),
            ("l", "both heads, loss", 1, costs["loss"], "loss"),
        )
    ]
    yield table_of("4B and 14B: µs per token, of heads per row", rows, "", "layers", "each", "all")
    pairs = zip(figures["arms"], figures["by_operations"], strict=True)
    phases = ("teacher", "scoring", "training", "step")
    rows = [
        row
        | {phase: 1e6 * row[phase] for phase in phases}
        | against_full(figures["arms"], row)
        | {"FLOP": against_full(figures["by_operations"], counted)["÷ same"]}
        for row, counted in pairs
    ]
    table = table_of(
        "4B and 14B: µs per token", rows, "name", "recompute", *phases, "÷ same", "÷ best", "FLOP"
    )
    cut, share = figures["cut"], figures["rows_per_token"]
    table.caption = (
        f"c = {cut:g} of the tokens trained, r = {share:g} rows per token, ρ = {RATIO:g}. Teacher: "
        "t. Scoring: f + r·s. Training: c·(f + b) + ρ·r·l; two_pass with recomputation c·(2f + b) "
        "+ ρ·r·l. Full OPD: no scoring, c = ρ = 1."
    )
    yield table


def table_of(title: str, rows: list[dict], *columns: str) -> Table:
    table = Table(box=SIMPLE, title=title)
    for name in columns:
        text = isinstance(rows[0][name], str)
        header = name.replace("mass_retained", "mass").replace("_", " ")
        table.add_column(header, justify="left" if text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row[name]) for name in columns))
    return table


def cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
