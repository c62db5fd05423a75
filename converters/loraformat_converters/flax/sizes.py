"""The sizes of a model's tensors, in words of the tables, by its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraformat.naming.decoders import text_config

__all__ = ["Sizes"]

_KEYS = {
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv": "num_key_value_heads",
    "head": "head_dim",
    "inner": "intermediate_size",
    "vocabulary": "vocab_size",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the words mean in one model.

    >>> Sizes({"hidden_size": 12, "num_attention_heads": 4}).of("2 kv hidden head")
    (2, 4, 12, 3)
    """

    config: Mapping[str, Any]

    def of(self, words: str) -> tuple[int, ...] | None:
        """The sizes; None where one of them is not known."""
        found = [int(word) if word.isdecimal() else self.one(word) for word in words.split()]
        known = tuple(n for n in found if n is not None)
        return known if known and len(known) == len(found) else None

    def one(self, word: str) -> int | None:
        """One size. transformers: as many keys as heads, and hidden_size / heads a head, unless it is said otherwise."""
        value = text_config(self.config).get(_KEYS[word])
        if value is None and word == "kv":
            return self.one("heads")
        if value is None and word == "head":
            hidden, heads = self.one("hidden"), self.one("heads")
            return hidden // heads if hidden and heads else None
        return value if type(value) is int and 0 < value < 2**31 else None
