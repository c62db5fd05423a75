"""Architectures that llama.cpp and transformers both have: what each calls the modules, and whose q and k are permuted.

Data, as the converter of llama.cpp has it (conversion/*.py and gguf 0.19.0 tensor_mapping.py; a test compares with files
that the converter itself wrote). An architecture whose tensors the converter changes in another way, such as one that
reorders a fused query-key-value, is not in the table: names alone would give a wrong adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraformat.naming.decoders import Decoder, model_type, text_config

__all__ = ["Architecture", "by_config", "by_gguf", "named", "tied"]


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        name: ``general.architecture``.
        permuted: whether the rows of q and k are reordered for the rotary embedding of ggml.
    """

    name: str
    decoder: Decoder
    permuted: bool = False


_ENDS = {"model.embed_tokens": "token_embd", "lm_head": "output"}
_QKV = {f"self_attn.{leaf}_proj": f"attn_{leaf}" for leaf in "qkv"}
_ATTENTION = {**_QKV, "self_attn.o_proj": "attn_output"}
_LLAMA = {**_ATTENTION, **{f"mlp.{leaf}_proj": f"ffn_{leaf}" for leaf in ("gate", "up", "down")}}
_FUSED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PHI = {**_QKV, "self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}
_STARCODER2 = {**_ATTENTION, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
_GPT2 = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
_QWEN_MOE = {**_ATTENTION, "mlp.gate": "ffn_gate_inp"}
_QWEN2_MOE = {
    **_QWEN_MOE,
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.shared_expert.{leaf}_proj": f"ffn_{leaf}_shexp" for leaf in ("gate", "up", "down")},
}
_MIXTRAL = {**_ATTENTION, "block_sparse_moe.gate": "ffn_gate_inp", "mlp.gate": "ffn_gate_inp"}

_QWEN_EXPERTS = {f"mlp.experts.{{e}}.{leaf}_proj": f"ffn_{leaf}_exps" for leaf in ("gate", "up", "down")}
_MIXTRAL_EXPERTS = {
    f"block_sparse_moe.experts.{{e}}.{leaf}": f"ffn_{name}_exps"
    for leaf, name in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
}
_STACKED = {"mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "mlp.experts.down_proj": ("ffn_down_exps",)}


def _one(name: str, modules: Mapping[str, str], *, permuted: bool = False, **more: Any) -> Architecture:
    named: dict[str, Any] = {"blocks": ("model.layers.{n}.", "blk.{n}."), "ends": _ENDS, **more}
    return Architecture(name, Decoder(f"table: gguf {name}", modules=modules, **named), permuted)


_TABLE: Mapping[str, Architecture] = {
    "llama": _one("llama", _LLAMA, permuted=True),
    "mistral": _one("llama", _LLAMA, permuted=True),
    "mixtral": _one("llama", _MIXTRAL, experts=_MIXTRAL_EXPERTS, stacked=_STACKED, permuted=True),
    "granite": _one("granite", _LLAMA, permuted=True),
    "smollm3": _one("smollm3", _LLAMA, permuted=True),
    "olmo": _one("olmo", _LLAMA, permuted=True),
    "qwen2": _one("qwen2", _LLAMA),
    "qwen3": _one("qwen3", _LLAMA),
    "qwen2_moe": _one("qwen2moe", _QWEN2_MOE, experts=_QWEN_EXPERTS, stacked=_STACKED),
    "qwen3_moe": _one("qwen3moe", _QWEN_MOE, experts=_QWEN_EXPERTS, stacked=_STACKED),
    "gemma": _one("gemma", _LLAMA),
    "gemma2": _one("gemma2", _LLAMA),
    "gemma3_text": _one("gemma3", _LLAMA, ends={}),  # its embedding is cut to the tokens that exist
    "olmo2": _one("olmo2", _LLAMA),
    "cohere": _one("command-r", _LLAMA),
    "seed_oss": _one("seed_oss", _LLAMA),
    "phi3": _one("phi3", _FUSED),
    "starcoder2": _one("starcoder2", _STARCODER2),
    "phi": _one("phi2", _PHI),
    "gpt2": _one(
        "gpt2",
        _GPT2,
        blocks=("transformer.h.{n}.", "blk.{n}."),
        ends={"transformer.wte": "token_embd", "lm_head": "output"},
        transposed=frozenset(_GPT2),
    ),
}
"""``model_type`` of a config.json → the architecture."""


def by_config(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture of a model with this config.json, or None."""
    return _TABLE.get(model_type(config) or "")


def by_gguf(name: str, *, experts: bool) -> Architecture | None:
    """The architecture of that name in GGUF, with experts or without; None of none.

    llama.cpp has one for several of transformers, but those of one kind have the same names (Mistral is a ``llama``).
    """
    found = [item for item in _TABLE.values() if item.name == name]
    return next((item for item in found if bool(item.decoder.experts) == experts), found[0] if found else None)


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the model's head is known to be its embedding.

    llama.cpp then multiplies by the tensor whose lora_a lies the other way for looking up, and stops at an assertion
    (xllamacpp 2026.10.11549, measured). A config.json without the key is of a model of the kind that is not tied.
    """
    return bool(text_config(config).get("tie_word_embeddings"))


def named(config: Mapping[str, Any]) -> str | None:
    """``general.architecture`` of a model with this config.json, or None."""
    found = by_config(config)
    return found.name if found is not None else None
