"""Tiny models of mlx-lm, sizes pairwise different where the architecture allows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlx_lm.models import llama, qwen3_moe

__all__ = ["MODELS"]


def _llama() -> Any:
    return llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=24, num_hidden_layers=2, intermediate_size=40, num_attention_heads=6,
            num_key_value_heads=3, head_dim=6, rms_norm_eps=1e-5, vocab_size=50, tie_word_embeddings=False,
        )
    )  # fmt: skip


def _qwen3_moe() -> Any:
    return qwen3_moe.Model(
        qwen3_moe.ModelArgs(
            model_type="qwen3_moe", hidden_size=20, num_hidden_layers=2, intermediate_size=36, num_attention_heads=4,
            num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-5, vocab_size=50, tie_word_embeddings=False,
            num_experts=5, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=14,
            rope_theta=10000.0, max_position_embeddings=64, norm_topk_prob=True,
        )
    )  # fmt: skip


MODELS: Mapping[str, Callable[[], Any]] = {"llama": _llama, "qwen3_moe": _qwen3_moe}
