"""Architectures that llama.cpp and transformers both have: what each calls the modules, and whose q and k are permuted.

Data, as the converter of llama.cpp has it (conversion/*.py and gguf 0.19.0 tensor_mapping.py; a test compares with files
that the converter itself wrote). An architecture whose tensors the converter changes in another way, such as one that
reorders a fused query-key-value, is not in the table: names alone would give a wrong adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Architecture", "by_config", "by_gguf", "named", "text_config"]

_BLOCK = "model.layers.{n}."
_ATTENTION = {
    f"self_attn.{leaf}_proj": f"attn_{name}" for leaf, name in (*zip("qkv", "qkv", strict=True), ("o", "output"))
}
_GATED = {f"mlp.{leaf}_proj": f"ffn_{leaf}" for leaf in ("gate", "up", "down")}
_ENDS = {"model.embed_tokens": "token_embd", "lm_head": "output"}
_LLAMA = {**_ATTENTION, **_GATED}
_FUSED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROUTED = {**_ATTENTION, "mlp.gate": "ffn_gate_inp"}
_SHARED = {f"mlp.shared_expert.{leaf}_proj": f"ffn_{leaf}_shexp" for leaf in ("gate", "up", "down")}
_GPT2 = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
_GPT2_ENDS = {"transformer.wte": "token_embd", "lm_head": "output"}


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures under the names of transformers.

    Attributes:
        name: ``general.architecture``.
        block: the torch path of block n; in GGUF it is ``blk.n.``.
        modules: torch path within a block → name within ``blk.n.``; both stand before ``.weight``.
        ends: the same of what stands in no block.
        experts: projection of one expert → stacked tensor within ``blk.n.``: ``mlp.experts.{e}.gate_proj``.
        stacked: parameter with all experts → (stacked tensor, which of how many equal shares of its rows).
        permuted: whether the rows of q and k are reordered for the rotary embedding of ggml.
        transposed: modules whose torch weight lies [in, out] (Conv1D).
    """

    name: str
    modules: Mapping[str, str]
    block: str = _BLOCK
    ends: Mapping[str, str] = field(default_factory=lambda: _ENDS)
    experts: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, tuple[tuple[str, int, int], ...]] = field(default_factory=dict)
    permuted: bool = False
    transposed: frozenset[str] = frozenset()


_EXPERTS = {f"mlp.experts.{{e}}.{leaf}_proj": f"ffn_{leaf}_exps" for leaf in ("gate", "up", "down")}
_STACKED = {
    "mlp.experts.gate_up_proj": (("ffn_gate_exps", 0, 2), ("ffn_up_exps", 1, 2)),
    "mlp.experts.down_proj": (("ffn_down_exps", 0, 1),),
}
_MIXTRAL = {
    f"block_sparse_moe.experts.{{e}}.{leaf}": f"ffn_{name}_exps"
    for leaf, name in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
}

_TABLE: Mapping[str, Architecture] = {
    "llama": Architecture("llama", _LLAMA, permuted=True),
    "mistral": Architecture("llama", _LLAMA, permuted=True),
    "mixtral": Architecture("llama", {**_ATTENTION, "block_sparse_moe.gate": "ffn_gate_inp", "mlp.gate": "ffn_gate_inp"}, experts=_MIXTRAL, stacked=_STACKED, permuted=True),
    "granite": Architecture("granite", _LLAMA, permuted=True),
    "smollm3": Architecture("smollm3", _LLAMA, permuted=True),
    "olmo": Architecture("olmo", _LLAMA, permuted=True),
    "qwen2": Architecture("qwen2", _LLAMA),
    "qwen3": Architecture("qwen3", _LLAMA),
    "qwen2_moe": Architecture("qwen2moe", {**_ROUTED, **_SHARED, "mlp.shared_expert_gate": "ffn_gate_inp_shexp"}, experts=_EXPERTS, stacked=_STACKED),
    "qwen3_moe": Architecture("qwen3moe", _ROUTED, experts=_EXPERTS, stacked=_STACKED),
    "gemma": Architecture("gemma", _LLAMA),
    "gemma2": Architecture("gemma2", _LLAMA),
    "gemma3_text": Architecture("gemma3", _LLAMA, ends={}),  # its embedding is cut to the tokens that exist
    "olmo2": Architecture("olmo2", _LLAMA),
    "cohere": Architecture("command-r", _LLAMA),
    "seed_oss": Architecture("seed_oss", _LLAMA),
    "phi3": Architecture("phi3", _FUSED),
    "starcoder2": Architecture("starcoder2", {**_ATTENTION, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}),
    "phi": Architecture("phi2", {**{p: n for p, n in _ATTENTION.items() if "o_proj" not in p}, "self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}),
    "gpt2": Architecture("gpt2", _GPT2, "transformer.h.{n}.", _GPT2_ENDS, transposed=frozenset(_GPT2)),
}  # fmt: skip
"""``model_type`` of a config.json → the architecture."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a model's config.json that is of the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def by_config(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture of a model with this config.json, or None."""
    return _TABLE.get(str(text_config(config).get("model_type")))


def by_gguf(name: str) -> Architecture | None:
    """The architecture of that name in GGUF, where transformers has one set of names for it."""
    found = [item for item in _TABLE.values() if item.name == name and not item.experts]
    return found[0] if found and all(item.modules == found[0].modules for item in found) else None


def named(config: Mapping[str, Any]) -> str | None:
    """``general.architecture`` of a model with this config.json, or None."""
    found = by_config(config)
    return found.name if found is not None else None
