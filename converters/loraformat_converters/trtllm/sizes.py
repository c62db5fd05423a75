"""How wide a module is on both sides, and how many experts it is of, by the ``config.json`` of its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["sides"]

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def sides(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Module → (out, in), of all experts together (experts, out, in), of those whose sizes a decoder's configuration states; empty where it states none.

    >>> sides({"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40})["attn_k"]
    (12, 24)
    """
    width, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    heads = _size(config, "num_attention_heads")
    groups = _size(config, "num_key_value_heads") or heads
    found: dict[str, tuple[int, ...]] = {}
    if width and heads:
        head = _size(config, "head_dim") or width // heads
        query, key = heads * head, groups * head
        found |= {"attn_q": (query, width), "attn_k": (key, width), "attn_v": (key, width)}
        found |= {"attn_qkv": (query + 2 * key, width), "attn_dense": (width, query)}
    if width and inner:
        found |= {"mlp_h_to_4h": (inner, width), "mlp_gate": (inner, width), "mlp_4h_to_h": (width, inner)}
        found["mlp_gate_up"] = (2 * inner, width)
    count = next((size for name in _EXPERTS if (size := _size(config, name))), 0)
    own = _size(config, "moe_intermediate_size") or inner
    if count and width and own:
        found |= {"moe_h_to_4h": (count, own, width), "moe_gate": (count, own, width)}
        found |= {"moe_4h_to_h": (count, width, own), "moe_router": (count, width)}
    return found


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
