"""Reference responses of a data set: what the student might have written, in its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Reference(NamedTuple):
    """A response as it stands in a file.

    Attributes:
        excluded: [start, end) of characters of its text that are not trained on, in any order.
    """

    text: str
    excluded: tuple[tuple[int, int], ...] = ()


class ReferenceReader:
    """Tokenises references as the student writes its responses: their text, and what ends it.

    Args:
        tokenizer: of the student.
        end: the id that ends a response.
    """

    def __init__(self, tokenizer: Any, end: int):
        self.tokenizer, self.end = tokenizer, end

    def __call__(self, references: Sequence[Reference]) -> list[tuple[list[int], list[bool]]]:
        """Return the token ids of each, and which of them are valid: no character is excluded.

        Special tokens that a text spells stay text. The end is always valid.

        Raises:
            ValueError: something is excluded, and the tokenizer cannot say where its tokens stand.
        """
        masked = any(reference.excluded for reference in references)
        if masked and not self.tokenizer.is_fast:
            raise ValueError(
                f"data.excluded_column: the tokenizer {self.tokenizer.name_or_path} does not say "
                "where its tokens stand in a text; a fast one is needed"
            )
        encoded = self.tokenizer(
            [reference.text for reference in references],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=masked,
        )
        places = encoded["offset_mapping"] if masked else [None] * len(references)
        return [
            ([*ids, self.end], [*_valid(reference, ids, own), True])
            for reference, ids, own in zip(references, encoded["input_ids"], places, strict=True)
        ]


def _valid(
    reference: Reference, ids: Sequence[int], places: Sequence[tuple[int, int]] | None
) -> list[bool]:
    """Tell of which tokens no character is excluded; places: [start, end) of each."""
    if not reference.excluded or places is None:
        return [True] * len(ids)
    excluded = np.zeros(len(reference.text) + 1, dtype=np.int64)
    for start, end in reference.excluded:
        excluded[start:end] = 1
    before = np.concatenate([[0], excluded.cumsum()])  # excluded characters before each place
    starts, ends = np.array(places, dtype=np.int64).reshape(-1, 2).T
    # A token without characters of its own, a byte of one say, goes with the one where it stands.
    return (before[np.maximum(ends, starts + 1)] == before[starts]).tolist()


def as_spans(value: Any, text: str) -> tuple[tuple[int, int], ...]:
    """Read what `data.excluded_column` says of a text; None: nothing is excluded.

    Raises:
        ValueError: it is no list of [start, end) within the text.
    """
    spans = [] if value is None else value
    fits = isinstance(spans, list) and all(
        isinstance(span, list | tuple)
        and len(span) == 2
        and all(isinstance(place, int) and not isinstance(place, bool) for place in span)
        and 0 <= span[0] < span[1] <= len(text)
        for span in spans
    )
    if not fits:
        raise ValueError(
            f"{str(value)[:40]}; a list of [start, end] is needed, in characters of the response, "
            f"which has {len(text)}"
        )
    return tuple((start, end) for start, end in spans)
