"""The kinds of files that prompts are read from, by the ends of their names."""

from __future__ import annotations

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".arrow")
KNOWN = ".jsonl, .json (also .gz) and .parquet"  # in words; .arrow is in directories of `datasets`
