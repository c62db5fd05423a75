"""How many rows query, key and value have in the one Linear that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["heads_of"]

_MOST = 1 << 20  # rows; what states more would only have zeros allocated


def heads_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(rows of the query, rows of the key and of the value) by litgpt's ``model_config`` or a ``config.json``."""
    heads, groups, size = (config.get(name) for name in ("n_head", "n_query_groups", "head_size"))
    if not all(isinstance(n, int) for n in (heads, groups, size)):
        heads, width = config.get("num_attention_heads"), config.get("hidden_size")
        groups, size = config.get("num_key_value_heads", heads), config.get("head_dim")
        if size is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
            size = width // heads
    if not (isinstance(heads, int) and isinstance(groups, int) and isinstance(size, int)):
        return None
    possible = min(heads, groups, size) > 0 and max(heads, groups) * size <= _MOST
    return (heads * size, groups * size) if possible else None
