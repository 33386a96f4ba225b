"""Speculative decoding by a run's own rollout servers: `rollout.speculative`, by SGLang's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_taopd.config.schema import RolloutSection
from megatron_taopd.formats.hub import is_model

# Those that draw each token from the student all the same, and report its log-probability.
ALGORITHMS = ("NGRAM", "EAGLE", "EAGLE3", "STANDALONE")
MATCH_TYPES = ("BFS", "PROB")
_COUNTS = ("num_steps", "eagle_topk", "num_draft_tokens")  # of EAGLE and STANDALONE: all or none
_OF_NGRAM = (
    "ngram_min_bfs_breadth", "ngram_max_bfs_breadth", "ngram_max_trie_depth", "ngram_capacity",
    "ngram_match_type",
)  # fmt: skip
_OF_A_DRAFT = ("draft_model_path", "draft_model_revision", "num_steps", "eagle_topk")
_WORDS = ("draft_model_path", "draft_model_revision", "ngram_match_type")
KNOWN = ("algorithm", *_OF_A_DRAFT, "num_draft_tokens", *_OF_NGRAM)
_KEY = "rollout.speculative"


def server_args(speculative: Mapping[str, Any] | None) -> list[str]:
    """Return the arguments of `sglang.launch_server` that ask for it; none of null."""
    given = (speculative or {}).items()
    return [
        word
        for name, value in given
        for word in (f"--speculative-{name.replace('_', '-')}", str(value))
    ]


def check_speculative(rollout: RolloutSection) -> None:
    """Refuse what the run's servers would not take, or would take and answer wrongly.

    Raises:
        ValueError: one line with the key, its value and what would be right.
    """
    given = rollout.speculative
    if given is None:
        return
    if rollout.engine != "sglang":
        raise ValueError(
            f"{_KEY}: {given} with rollout.engine {rollout.engine}, which has no speculative "
            "decoding; take the engine sglang, or leave it out"
        )
    if rollout.servers.urls:
        raise ValueError(
            f"{_KEY}: {given} with rollout.servers.urls, whose servers the run does not start; "
            "start them with it, and leave it out here"
        )
    for name in given:
        if name not in KNOWN:
            raise ValueError(f"{_KEY}.{name}: unknown key; known here: {', '.join(KNOWN)}")
    algorithm = given.get("algorithm")
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"{_KEY}.algorithm: {algorithm!r}; one of {', '.join(ALGORITHMS)} is needed"
        )
    for name in given.keys() - {"algorithm", *_WORDS}:
        if not isinstance(value := given[name], int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{_KEY}.{name}: {value!r}; a whole number from 1 on is needed")
    others = _OF_A_DRAFT if algorithm == "NGRAM" else _OF_NGRAM
    for name in others:
        if name in given:
            raise ValueError(
                f"{_KEY}.{name}: {given[name]!r} is not for the algorithm {algorithm}; leave it out"
            )
    if algorithm == "NGRAM":
        _check_ngram(given)
    else:
        _check_draft(rollout, given)


def _check_ngram(given: Mapping[str, Any]) -> None:
    match = given.get("ngram_match_type", MATCH_TYPES[0])
    if match not in MATCH_TYPES:
        raise ValueError(
            f"{_KEY}.ngram_match_type: {match!r}; it has to be {' or '.join(MATCH_TYPES)}"
        )
    least, most = given.get("ngram_min_bfs_breadth", 1), given.get("ngram_max_bfs_breadth", 10)
    if least > most:
        raise ValueError(
            f"{_KEY}.ngram_min_bfs_breadth: {least} is more than ngram_max_bfs_breadth {most}"
        )


def _check_draft(rollout: RolloutSection, given: Mapping[str, Any]) -> None:
    algorithm, path = given["algorithm"], given.get("draft_model_path")
    if not isinstance(path, str):
        raise ValueError(f"{_KEY}.draft_model_path: {path}; the algorithm {algorithm} needs one")
    if not Path(path).is_dir() and not is_model(path):
        raise ValueError(
            f"{_KEY}.draft_model_path: {path}: no such directory; give one, or OWNER/NAME on the "
            "hub"
        )
    counts = [name for name in _COUNTS if name in given]
    if counts and len(counts) < len(_COUNTS):
        raise ValueError(
            f"{_KEY}.{counts[0]}: {given[counts[0]]} without all of {', '.join(_COUNTS)}; SGLang "
            "takes all three or chooses them"
        )
    if counts and given["eagle_topk"] == 1 and given["num_draft_tokens"] != given["num_steps"] + 1:
        raise ValueError(
            f"{_KEY}.num_draft_tokens: {given['num_draft_tokens']} with eagle_topk 1, a chain of "
            f"num_steps + 1 = {given['num_steps'] + 1}; give that"
        )
    if (transport := rollout.sync.transport) != "distributed":
        raise ValueError(
            f"rollout.sync.transport: {transport} with {_KEY}.draft_model_path: SGLang would load "
            "the student's weights into the draft model, too; it has to be distributed"
        )
    if rollout.sync.release_memory:
        raise ValueError(
            f"rollout.sync.release_memory: true with {_KEY}.draft_model_path, whose weights nobody "
            "would send again; one of them has to be off"
        )
