"""Tiny models of transformers, one for each architecture whose names are known, and what is adapted of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers
from peft import LoraConfig

__all__ = ["CASES", "Case"]

_SIZES = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A model and a LoRA on it.

    Attributes:
        right: whether llama.cpp's converter gives the change that was trained.
        experts: whether the experts' projections are adapted too.
        logits: whether the model is run.
    """

    name: str
    model_type: str
    targets: list[str] = field(default_factory=lambda: _LLAMA)
    sizes: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    outtype: str = "f32"
    right: bool = True
    experts: bool = False
    logits: bool = False

    def config(self) -> Any:
        return transformers.AutoConfig.for_model(self.model_type, **{**_SIZES, **self.sizes})

    @property
    def lora(self) -> LoraConfig:
        numbers = {"r": 3, "lora_alpha": 6, "target_modules": list(self.targets), "init_lora_weights": False}
        return LoraConfig(**{**numbers, **self.more})


_MOE = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 14,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
_GPT2 = {"n_embd": 24, "n_head": 4, "n_layer": 1, "n_positions": 64, "n_inner": 36, "n_ctx": 64}

CASES = [
    Case("llama", "llama", [*_LLAMA, "lm_head", "embed_tokens"], {"head_dim": 8}, logits=True),
    Case("llama_f16", "llama", ["q_proj", "down_proj"], outtype="f16"),
    Case("llama_bf16", "llama", ["k_proj", "up_proj"], outtype="bf16"),
    Case("llama_q8_0", "llama", ["q_proj", "down_proj"], {"hidden_size": 64, "intermediate_size": 96}, {"r": 32}, "q8_0"),
    Case("rslora", "llama", more={"use_rslora": True}, right=False),
    Case("patterns", "llama", more={"rank_pattern": {"q_proj": 5, "down_proj": 1}, "alpha_pattern": {"k_proj": 3, "up_proj": 0.7}}, right=False),
    Case("rslora_patterns", "llama", more={"use_rslora": True, "rank_pattern": {"k_proj": 5}, "alpha_pattern": {"v_proj": 3}}, right=False, logits=True),
    Case("mistral", "mistral"),
    Case("mixtral", "mixtral", _QKVO, {"num_local_experts": 3, "num_experts_per_tok": 2}, experts=True, logits=True),
    Case("granite", "granite"),
    Case("smollm3", "smollm3"),
    Case("olmo", "olmo"),
    Case("qwen2", "qwen2", logits=True),
    Case("qwen3", "qwen3", sizes={"head_dim": 8}),
    Case("qwen2_moe", "qwen2_moe", [*_QKVO, "shared_expert_gate"], {**_MOE, "shared_expert_intermediate_size": 10}, experts=True),
    Case("qwen3_moe", "qwen3_moe", _QKVO, {**_MOE, "head_dim": 8}, experts=True),
    Case("gemma", "gemma", sizes={"head_dim": 8, "tie_word_embeddings": True}),
    Case("gemma2", "gemma2", sizes={"head_dim": 8, "tie_word_embeddings": True}),
    Case("gemma3_text", "gemma3_text", sizes={"head_dim": 8, "tie_word_embeddings": True}),
    Case("olmo2", "olmo2"),
    Case("cohere", "cohere", sizes={"tie_word_embeddings": True}),
    Case("seed_oss", "seed_oss", sizes={"head_dim": 8}),
    Case("phi3", "phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], logits=True),
    Case("starcoder2", "starcoder2", [*_QKVO, "c_fc", "c_proj"]),
    Case("phi", "phi", ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head"], {"num_key_value_heads": 4, "hidden_size": 32}),
    Case("gpt2", "gpt2", ["c_attn", "c_proj", "c_fc"], _GPT2, right=False),  # it turns the factors with the weights
]  # fmt: skip
