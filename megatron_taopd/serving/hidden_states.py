"""A forward hook for SGLang servers: the prompt's hidden states as bytes in the answer.

SGLang's own way (`return_hidden_states`) turns each number into a Python object and then into
decimal digits. This hook leaves the rows in the model's dtype, base64 in `meta_info[KEY]`, by two
things that SGLang has for such purposes: `--forward-hooks` and `customized_info`. It runs in the
server's processes, where this package must be importable (it imports nothing but torch).

    python -m sglang.launch_server ... $HOOK_ARGS
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode

import torch
from torch import Tensor

KEY = "hidden_states_b64"

# A prefill in chunks returns its last chunk only, one that finds a prefix in the cache only the
# rest; and a captured prefill runs no hook.
SERVER_ARGS = (
    *("--chunked-prefill-size", "-1"),
    "--disable-radix-cache",
    "--disable-prefill-cuda-graph",
)
HOOK_ARGS = (
    *SERVER_ARGS,
    "--forward-hooks",
    json.dumps(
        [
            {
                "name": KEY,
                "target_modules": ["logits_processor"],
                "hook_factory": f"{__name__}:make_hook",
            }
        ]
    ),
)


def make_hook(_config: dict):
    """Make the hook on SGLang's LogitsProcessor, whose inputs are normed hidden states [T, D]."""
    from sglang.srt.runtime_context import get_parallel

    answers = get_parallel().attn_tp_rank == 0  # the other ranks' outputs are dropped

    def hook(_module, inputs, output):
        _input_ids, hidden, _head, forward, *_ = inputs
        if not answers or not forward.forward_mode.is_extend():
            return
        rows = hidden[: sum(forward.extend_seq_lens_cpu)].cpu()
        packed = [pack(part) for part in rows.split(forward.extend_seq_lens_cpu)]
        output.customized_info = {**(output.customized_info or {}), KEY: packed}

    return hook


def pack(rows: Tensor) -> dict:
    """Return [n, D] as JSON can hold it, in 4/3 of its bytes."""
    data = b64encode(rows.contiguous().view(torch.uint8).numpy()).decode()
    return {"dtype": str(rows.dtype).removeprefix("torch."), "shape": list(rows.shape), "b64": data}


def unpack(packed: dict) -> Tensor:
    """Return the [n, D] that `pack` was given."""
    data = bytearray(b64decode(packed["b64"]))
    if not data:
        return torch.empty(packed["shape"], dtype=getattr(torch, packed["dtype"]))
    rows = torch.frombuffer(data, dtype=torch.uint8)
    return rows.view(getattr(torch, packed["dtype"])).view(packed["shape"])
