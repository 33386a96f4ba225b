"""The model that every server of a pool has to serve, and what it can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig

# SGLang cuts a response off, without a word, two tokens before its context or its KV cache ends,
# and takes no prompt within the last seven: both must be this much longer than any sequence.
CONTEXT_MARGIN = 7
# Keys that tell two models of one family apart.
SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")


class ServedModel(NamedTuple):
    """Describes the model that every replica has to serve.

    Attributes:
        path: its Hugging Face directory or name.
        sizes: the SIZES of its configuration.
        longest: tokens of the longest sequence that will be asked for, prompt and response.
    """

    path: str
    sizes: dict[str, Any]
    longest: int

    @classmethod
    def of(cls, path: str | Path, longest: int) -> ServedModel:
        """Read the sizes from a model's config.json."""
        return cls(str(path), sizes_of(path), longest)

    @property
    def vocab_size(self) -> int:
        return self.sizes["vocab_size"]

    def check(
        self, name: str, ids: Sequence[int], max_new_tokens: int, top_logprobs: int = 0
    ) -> None:
        """Refuse what a server would die of, or answer with something else than was asked for.

        Args:
            name: of the prompt, for the error.
            ids: its token ids.

        Raises:
            ValueError: the prompt is empty, has ids outside the vocabulary or is too long, or more
                log-probabilities are asked for than there are tokens.
        """
        if not len(ids):
            raise ValueError(f"{name} is empty: a server needs at least one token")
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(
                f"{name} has the token id {bad}; the model has 0 … {self.vocab_size - 1}"
            )
        if len(ids) + max_new_tokens > self.longest:
            raise ValueError(
                f"{name} has {len(ids)} tokens; with {max_new_tokens} new ones that is over the "
                f"servers' {self.longest}"
            )
        if top_logprobs > self.vocab_size:
            raise ValueError(
                f"{name}: top_logprobs {top_logprobs} is over the vocabulary of {self.vocab_size}"
            )


def sizes_of(path: str | Path) -> dict[str, Any]:
    """Return the SIZES of a Hugging Face directory or name."""
    config = AutoConfig.from_pretrained(path)
    text = config.get_text_config()
    return {key: getattr(text, key, None) for key in SIZES} | {"model_type": config.model_type}
