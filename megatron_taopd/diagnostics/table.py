"""Scored tables: one row per response position, in the bank's order, and gains between two.

A table is a parquet file. PLACE says where a row stands: the number of its prompt and sequence in
the bank, its position in a response of `length` tokens, and the token that was sampled there.
MEASURES are fp32, entropies and divergences in nats over the common vocabulary. The metadata names
what was compared.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_taopd.formats.files import file_written_aside

KS = (8, 16, 32)
PLACE = ("prompt", "sequence", "position", "length", "token")
WHOLE = (
    "student_entropy",
    "teacher_entropy",
    "forward_kl",
    "reverse_kl",
    "student_log_prob",
    "teacher_log_prob",
)
SUPPORT = ("D", "C", "overlap", "jaccard", "shared", "cbc")  # each for every K
MEASURES = (*WHOLE, *(f"{name}_{k}" for k in KS for name in SUPPORT))


def read_table(path: str | Path) -> tuple[pa.Table, dict[str, str]]:
    """Return a table that `score_bank` or `write_gain` wrote, and its metadata.

    Raises:
        ValueError: there is none, or it is another file.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; `score` makes one")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a parquet file ({' '.join(str(error).split())})") from error
    about = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    if "bank" not in about or not {*PLACE, *MEASURES} <= {*table.column_names}:
        raise ValueError(f"{path}: not a table that `score` wrote")
    return table, about


def write_gain(before: Path, after: Path, out: Path) -> dict:
    """Write the table `before` with G (Eq. 1) of every position as `gain`; what it comes to.

    G = KL(p_T ‖ p_before) − KL(p_T ‖ p_after), full vocabulary, in nats.

    Raises:
        ValueError: the tables are of different banks or teachers.
    """
    (first, about), (second, about_after) = read_table(before), read_table(after)
    for key, what in (
        ("bank", "bank"),
        ("teacher_fingerprint", "teacher"),
        ("teacher_prompt", "teacher's prompts"),
    ):
        if about[key] != about_after[key]:
            raise ValueError(
                f"{after}: its {what} ({about_after[key]}) is not that of {before} ({about[key]})"
            )
    gain = pc.subtract(first["forward_kl"], second["forward_kl"])
    about["after"] = about_after["checkpoint"]
    table = first.append_column("gain", gain).replace_schema_metadata(about)
    with file_written_aside(out) as aside:
        pq.write_table(table, aside)
    return {
        "out": str(out),
        "positions": len(table),
        "prompts": pc.count_distinct(table["prompt"]).as_py(),
        "gain": pc.mean(gain).as_py(),
        "gained": pc.mean(pc.cast(pc.greater(gain, 0), pa.float64())).as_py(),
    }
