"""Whether a server serves the model that it should, with the weights of the other servers.

A server's own description is compared with the model's configuration. That leaves the weights:
servers of one model are asked for the log-probabilities of the same few tokens, which have to agree
within rounding.

What SGLang documents nowhere is read here and in `hidden_states`: the words with which it refuses a
request (`vocab_size`), and how it reports log-probabilities (`reports_raw`). `tests/test_compat.py`
fails first if a new version changes them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megatron_taopd.serving.model import CONTEXT_MARGIN, ServedModel, sizes_of

PROBES, PROBE_TOKENS = 4, 32
# Nats: mean |Δ log p| that kernels, batches and layouts may make between servers of one model.
SAME_MODEL = {"float32": 1e-3}
SAME_MODEL_NARROW = 0.05
BIAS_RANGE = re.compile(r"keys in \[0, (\d+)\]")  # of the refusal in `vocab_size`

Ask = Callable[[dict], Awaitable[Any]]  # the answer of one server to a /generate request


def check_description(
    url: str, info: Mapping[str, Any], vocab: int | None, model: ServedModel, fixed_weights: bool
) -> None:
    """Compare a server's description of its model with the one that it should serve.

    Args:
        info: its /model_info.
        vocab: the size of its vocabulary; None: unknown.
        fixed_weights: it is to be used with the weights that it has.

    Raises:
        ValueError: it serves another model, none that generates, or random weights.
    """
    path = info["model_path"]
    found = {"model_type": info.get("model_type"), "vocab_size": vocab}
    found = {key: value for key, value in found.items() if value is not None}
    # A path of this machine tells all; where it means nothing here, its name has to do.
    if (Path(path) / "config.json").is_file():
        found |= sizes_of(path)
    elif Path(path).name != Path(model.path).name:
        found |= {"path": path}
    wrong = {k: v for k, v in found.items() if v != model.sizes.get(k)}
    if not info.get("is_generation", True):
        raise ValueError(f"{url} embeds, it does not generate ({path})")
    if fixed_weights and info.get("load_format") == "dummy":
        raise ValueError(f"{url} has random weights (--load-format dummy)")
    if wrong:
        wanted = {k: model.sizes.get(k, model.path) for k in wrong}
        raise ValueError(
            f"{url} serves another model ({path}): found {_listed(wrong)}, expected "
            f"{_listed(wanted)} ({model.path})"
        )


def check_length(url: str, server: Mapping[str, Any], model: ServedModel) -> None:
    """Compare the longest sequence that a server takes with the run's.

    Args:
        server: its /server_info.

    Raises:
        ValueError: the run has longer ones.
    """
    longest = server.get("max_req_input_len", model.longest + 1) - 1
    if longest < model.longest:
        raise ValueError(
            f"{url} takes sequences of {longest} tokens, the run has some of {model.longest}: "
            "start it with --context-length and --max-total-tokens of "
            f"{model.longest + CONTEXT_MARGIN} or more"
        )


def remarks(server: Mapping[str, Any], dtype: str | None) -> list[str]:
    """List what makes a server of the right model answer otherwise than its weights would.

    Args:
        server: its /server_info.
        dtype: of the run, as SGLang names it; None: any.
    """
    found = []
    if dtype is not None and (other := server.get("dtype", "auto")) not in ("auto", dtype):
        found.append(f"computes in {other}, the run in {dtype}")
    if quantization := server.get("quantization"):
        found.append(f"has quantised weights ({quantization})")
    if (cache := server.get("kv_cache_dtype", "auto")) not in ("auto", server.get("dtype")):
        found.append(f"keeps keys and values in {cache}")
    if server.get("enable_lora") or server.get("lora_paths"):
        found.append("takes LoRA adapters, of which requests here name none")
    if (overrides := server.get("json_model_override_args") or "{}") != "{}":
        found.append(f"overrides config.json: {overrides}")
    return found


def path_remarks(path: str, model: ServedModel) -> list[str]:
    """List what is to be said of a server with fixed weights that it loaded from `path`."""
    if os.path.realpath(path) == os.path.realpath(model.path):
        return []
    return [f"serves {path}, which has the sizes of {model.path}"]


async def vocab_size(ask: Ask) -> int | None:
    """Ask a server for the size of its vocabulary; None if it does not say.

    No endpoint of SGLang tells it. The refusal of a bias on a token outside of it does, since
    version 0.5.
    """
    sampling = {"max_new_tokens": 0, "logit_bias": {"-1": 0.0}}
    with suppress(RuntimeError):
        try:
            await ask({"input_ids": [0], "sampling_params": sampling})
        except RuntimeError as error:
            if match := BIAS_RANGE.search(str(error)):
                return int(match.group(1)) + 1
    return None


async def reports_raw(ask: Ask) -> bool:
    """Ask whether log-probabilities of output tokens are those at temperature 1.

    No endpoint of SGLang tells how SGLANG_RETURN_ORIGINAL_LOGPROB was set. Raw log-probabilities
    are as far apart at another temperature.

    Raises:
        RuntimeError: the server refuses.
    """
    spreads = []
    for temperature in (1.0, 4.0):
        request = {
            "input_ids": [0],
            "sampling_params": {"max_new_tokens": 1, "temperature": temperature},
            "return_logprob": True,
            "top_logprobs_num": 8,
        }
        top = (await ask(request))["meta_info"]["output_top_logprobs"][0]
        spreads.append(top[0][0] - top[-1][0])
    return spreads[1] > spreads[0] / 2


def probe_tokens(model: ServedModel) -> list[list[int]]:
    """Return a few sequences of random tokens, the same in every run."""
    shape = PROBES, min(PROBE_TOKENS, model.longest - 1)
    return np.random.default_rng(0).integers(model.vocab_size, size=shape).tolist()


async def probe_log_probs(post: Callable, replica: Any, model: ServedModel) -> np.ndarray:
    """Ask a server for the log-probabilities of `probe_tokens`: [n] float64, all but each first.

    Args:
        post: `await post(replica, path, request)`.

    Raises:
        RuntimeError: the server refuses or does not answer.
    """
    request = {
        "input_ids": probe_tokens(model),
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answers = await post(replica, "/generate", request)
    rows = [answer["meta_info"]["input_token_logprobs"][1:] for answer in answers]
    return np.array([lp for row in rows for lp, *_ in row], dtype=np.float64)  # null is nan


def agreed(replicas: Sequence[Any], log_probs: Sequence[np.ndarray]) -> tuple[Any, np.ndarray]:
    """Return the replica that is closest to most of them, and what it says.

    Args:
        replicas: with `url` and `dtype`.
        log_probs: [n] of each of them, as `probe_log_probs` has them.

    Raises:
        ValueError: one is further from that than rounding explains, or says no numbers.
    """
    table = np.stack(log_probs)
    for replica, row in zip(replicas, table, strict=True):
        if not np.isfinite(row).all():
            raise ValueError(f"{replica.url}: log-probabilities that are not finite")
    gaps = np.abs(table[:, None] - table).mean(2)
    middle = int(np.median(gaps, axis=1).argmin())
    bound = same_model(replicas)
    if odd := [i for i, gap in enumerate(gaps[middle]) if gap > bound]:
        names = ", ".join(replicas[i].url for i in odd)
        others = len(replicas) - len(odd)
        rest = f" and {others - 1} others" if others > 1 else ""
        raise ValueError(
            f"{names}: other weights than {replicas[middle].url}{rest}: log-probabilities of the "
            f"same tokens differ by {max(gaps[middle][odd]):.3g} on average, rounding explains "
            f"{bound:g}"
        )
    return replicas[middle], log_probs[middle]


def same_model(replicas: Iterable[Any]) -> float:
    """Return the mean |Δ log p| that rounding explains between these replicas of one model."""
    return max(SAME_MODEL.get(replica.dtype, SAME_MODEL_NARROW) for replica in replicas)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
