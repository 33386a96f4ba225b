"""`rollout.speculative`: who is asked for it, and where it is refused."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from support.observed import TINY, observe

from megatron_taopd.config import load
from megatron_taopd.plan.colocated import sized
from megatron_taopd.rollout import opening


def tiny(*overrides: str):
    return load(TINY, ["run.dir=runs/none", "rollout.engine=sglang", *overrides])


def test_the_runs_own_servers_are_asked_for_it():
    config = tiny("rollout.speculative={algorithm: NGRAM, num_draft_tokens: 8}")
    for asked, expected in (
        (config, ["--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "8"]),
        (tiny(), []),
    ):
        with mock.patch.object(opening, "begin_servers") as begin:
            opening.begin_rollout_servers(asked)
        assert begin.call_args.kwargs["args"] == expected


def test_drafts_are_refused_without_cuda(tmp_path):
    """In a line, before a server is started: they would not be verified by sampling there."""
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    options = [
        "rollout.engine=sglang",
        "rollout.speculative={algorithm: NGRAM, num_draft_tokens: 8}",
    ]
    seen = observe([f"run.dir={tmp_path}/run", *options])
    assert (seen.status, seen.records) == (2, [])
    assert "rollout.speculative: {'algorithm': 'NGRAM'" in seen.printed
    assert "needs CUDA, which this machine has not" in seen.printed
    assert not (Path(tmp_path) / "run" / "servers").exists()


def test_the_memory_of_a_draft_model_is_not_guessed():
    draft = "rollout.speculative={algorithm: STANDALONE, draft_model_path: owner/draft}"
    config = tiny(draft, "rollout.servers.gpus=[0]", "student.parallel.tp=1")
    with pytest.raises(ValueError, match=r"rollout.servers.max_total_tokens: null .* draft model"):
        sized(config, local_ranks=1, device_bytes=80 << 30)
    given = tiny(draft, "rollout.servers.gpus=[0]", "rollout.servers.max_total_tokens=9000")
    assert sized(given, local_ranks=1, device_bytes=80 << 30) == given
