"""A checkpoint's output head: which tensor it is, and what the model makes of head · hidden.

Not every model's logits are that product. Granite, Cohere and Falcon-H1 scale it, Gemma 2 caps it,
Phi adds a bias. No table of families says so here: transformers' own modelling code is run on a few
random hidden states, with a trunk that returns them and a head of a few random columns. A factor
is found as it is and goes into the head's rows; of anything else there is no head to be had.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from megatron_taopd.formats.hf import HFCheckpoint, load_config

ROWS, COLUMNS = 8, 16
HIGHEST = 50.0  # of the random logits: a model's own, so that a cap bends them
LINEAR = 1e-5  # of the highest logit, by which a product may be off in fp32
FAR = 1e6  # a cap that bends nothing
_SUSPECTS = re.compile("logit|cap|scal|mult|bias")  # in keys of config.json


class OutputHead(NamedTuple):
    """An output projection whose logits are `scale` · (hidden · weightᵀ).

    Attributes:
        name: of the weight in the checkpoint.
        shape: (vocabulary, hidden size) of it.
        scale: a factor of all logits.
    """

    name: str
    shape: tuple[int, int]
    scale: float


def find_head(hf_dir: str | Path) -> OutputHead:
    """Return a Hugging Face directory's head; of the weights two files' headers are read.

    Raises:
        ValueError: see `head_of`; or the head is missing, quantised or of another shape than
            config.json gives it.
    """
    try:
        names, shape, scale = head_of(load_config(hf_dir))
    except ValueError as error:
        raise ValueError(f"{hf_dir}: {error}") from error
    checkpoint = HFCheckpoint(hf_dir)
    name = next((name for name in names if name in checkpoint.files), names[0])
    prefix = name.removesuffix("weight")
    if others := sorted(n for n in checkpoint.files if n.startswith(prefix) and n != name):
        raise ValueError(
            f"{hf_dir}: the output head is more than {name}, there is {others[0]}: it is quantised "
            "or has a bias"
        )
    found, dtype = checkpoint.header(name)
    if dtype is None:
        raise ValueError(f"{hf_dir}: the output head, {name}, is quantised")
    if found != shape:
        raise ValueError(
            f"{hf_dir}: the output head, {name}, is {list(found)} where config.json asks for "
            f"{list(shape)}"
        )
    return OutputHead(name, shape, scale)


def head_of(config: PretrainedConfig) -> tuple[list[str], tuple[int, int], float]:
    """Return what a model of this configuration has as its head.

    Returns:
        The names that a checkpoint may have for the weight, likeliest first; its shape
        (vocabulary, hidden size); the factor of the logits.

    Raises:
        ValueError: the logits are more than a product, or the model's code cannot be run.
    """
    named = _architecture(config)
    try:
        model = _without_weights(config)
        head = model.get_output_embeddings()
        names, shape = list(dict.fromkeys(_names(model, head.weight))), tuple(head.weight.shape)
        scale = factor_of(model)
        if shape[0] != (size := config.get_text_config().vocab_size):
            raise ValueError(f"{shape[0]} rows for a vocabulary of {size}")
    except Exception as error:  # whatever the model's code trips over
        reason = " ".join(str(error).split())
        raise ValueError(f"{named}: no output head is to be had of it ({reason})") from error
    if scale is None:
        biased = getattr(head, "bias", None) is not None
        why = "its output head has a bias" if biased else _culprit(config)
        raise ValueError(f"{named}: its logits are more than output head · hidden states: {why}")
    return names, shape, scale


def _architecture(config: PretrainedConfig) -> str:
    return (config.architectures or [config.model_type])[0]


def _without_weights(config: PretrainedConfig) -> PreTrainedModel:
    named = getattr(transformers, _architecture(config), None)
    with torch.device("meta"):
        return named._from_config(config) if named else AutoModelForCausalLM.from_config(config)


def _names(model: PreTrainedModel, weight: Tensor) -> Iterator[str]:
    """Yield checkpoints' names for this parameter: of a tied head first the embedding's."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is weight:
            yield from revert_weight_conversion(model, {name: parameter})
            yield name
            yield name.removeprefix(f"{model.base_model_prefix}.")


@torch.no_grad()
def factor_of(model: PreTrainedModel) -> float | None:
    """Return the factor by which logits are head · hidden, None if they are not; ruins the model.

    Args:
        model: with an output head; its weights are not looked at and may be on the meta device.
    """
    head, random = model.get_output_embeddings(), torch.Generator().manual_seed(0)
    weight = torch.randn(COLUMNS, head.weight.shape[1], generator=random)
    head.weight = torch.nn.Parameter(weight)
    if getattr(head, "bias", None) is not None:
        head.bias = torch.nn.Parameter(torch.randn(COLUMNS, generator=random))
    hidden = torch.randn(1, ROWS, weight.shape[1], generator=random)
    hidden *= HIGHEST / (hidden @ weight.T).abs().max()
    _trunk(model).forward = lambda *_, **__: _Returned(hidden)
    ids = torch.zeros(1, ROWS, dtype=torch.int64, device="meta")  # where the embedding is
    logits, product = model.eval()(input_ids=ids).logits.double(), (hidden @ weight.T).double()
    factor = float((logits * product).sum() / product.square().sum())
    off = (logits - factor * product).abs().max() / logits.abs().max()
    if not (off <= LINEAR and factor > 0):
        return None
    return 1.0 if isclose(factor, 1, rel_tol=LINEAR) else factor


def _trunk(model: torch.nn.Module) -> torch.nn.Module:
    """Return what is under the head; a model for images may have its whole language model there."""
    trunk = getattr(model, "base_model", model)
    if trunk is model:
        trunk = model.model if hasattr(model, "model") else model.language_model
    return _trunk(trunk) if hasattr(trunk, "lm_head") else trunk


class _Returned:
    """What a trunk returns, whatever its class is called: hidden states, and nothing else."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, _name: str) -> None:
        return None

    def __getitem__(self, key: int | str) -> Any:
        return self.last_hidden_state if key in (0, "last_hidden_state") else None


def _culprit(config: PretrainedConfig) -> str:
    """Names the key of config.json without which the logits would be a product."""
    for key, value in config.get_text_config().to_dict().items():
        if _SUSPECTS.search(key) and isinstance(value, int | float) and value:
            without = deepcopy(config)
            try:
                setattr(without.get_text_config(), key, False if value is True else FAR)
                if factor_of(_without_weights(without)) is not None:
                    return f"{key} {value:g}"
            except Exception:  # no model has such a value: it is another key
                continue
    return "its modelling code changes them"
