"""A teacher's SGLang servers without SGLang: what /generate answers, computed by transformers.

It stands for the transport alone. What a real server answers is held by `test_teacher_sglang.py`.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_taopd.serving.answers import Answer, as_answer
from megatron_taopd.serving.hidden_states import KEY, pack


class ServedTeacher:
    """As much of `serving.client.Replicas` as a teacher asks for; its tensors are on the host."""

    troubles = None

    def __init__(self, hf_dir: str | Path):
        self.model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
        self.live = self.ready = self.all = [
            SimpleNamespace(url="http://stand-in", tp=1, dtype="float32")
        ]
        self.remarks: list[str] = []

    def run(self, coroutine):
        with mock.patch("asyncio.to_thread", _here):
            return asyncio.run(coroutine)

    def spawn(self, coroutine) -> Future:
        future: Future = Future()
        future.set_result(self.run(coroutine))
        return future

    async def post(self, _replica, _path: str, request: dict) -> dict | list[dict]:
        ids = request["input_ids"]
        if isinstance(ids[0], list):
            return [self.answer({**request, "input_ids": each}) for each in ids]
        return self.answer(request)

    async def complete(self, request: dict, _made: int, _alone: bool) -> Answer:
        return as_answer("http://stand-in/generate", self.answer(request))

    @torch.no_grad()
    def answer(self, request: dict) -> dict:
        """The prompt's normed hidden states, and log-probabilities from `logprob_start_len` on."""
        tokens = torch.tensor(request["input_ids"])
        hidden = self.model.model(tokens[None]).last_hidden_state[0]
        first = request.get("logprob_start_len", 0)
        log_probs = self.model.lm_head(hidden).log_softmax(1)[first:-1]
        sampled = log_probs.gather(1, tokens[first + 1 :, None])[:, 0].tolist()
        tops = log_probs.topk(request.get("top_logprobs_num", 1), dim=1)
        return {
            "meta_info": {
                KEY: [pack(hidden)],
                "input_token_logprobs": [[None, 0, None], *([lp, 0, None] for lp in sampled)],
                "input_top_logprobs_shape": list(tops.values.shape),
                "input_top_logprobs_null_prefix": 1,
                "input_top_logprobs_val_flat_b64": _encoded(tops.values),
                "input_top_logprobs_idx_flat_b64": _encoded(tops.indices.int()),
            }
        }

    def close(self) -> None: ...


async def _here(function, *args):
    """Call a function in this thread: another one has no pretended device."""
    return function(*args)


def _encoded(values: Tensor) -> str:
    return b64encode(values.contiguous().numpy().tobytes()).decode()
