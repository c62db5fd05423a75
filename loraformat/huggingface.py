"""How Hugging Face checkpoints store a module's ``.weight``: [out, in], but for the modules in this table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["is_embedding", "linear_spec"]

# transformers 5.23.0: every model whose modeling file builds pytorch_utils.Conv1D, whose weight is [in, out].
_CONV1D: Mapping[str, frozenset[str]] = {
    "gpt2": frozenset({"c_attn", "q_attn", "c_proj", "c_fc"}),
    "openai-gpt": frozenset({"c_attn", "c_proj", "c_fc"}),
    "imagegpt": frozenset({"c_attn", "q_attn", "c_proj", "c_fc"}),
    "clvp": frozenset({"c_proj", "c_fc"}),
    "decision_transformer": frozenset({"c_attn", "q_attn", "c_proj", "c_fc"}),
}

# transformers 5.23.0: what its models call an nn.Embedding.
_EMBEDDINGS = frozenset(
    {
        *("embed_tokens", "embed_positions", "embed_tokens_per_layer", "embed_in", "tok_embeddings", "wte", "wpe"),
        *("word_embeddings", "position_embeddings", "token_type_embeddings", "shared", "tokens_embed"),
        *("positions_embed", "position_embedding", "token_embedding", "word_embedding", "relative_attention_bias"),
        *("embedding", "embeddings", "entity_embeddings", "entity_type_embeddings", "rel_embeddings"),
    }
)


def is_embedding(name: str) -> bool:
    """Whether ``name`` is the two-axis weight of a module that looks rows up, by what such modules are called.

    >>> is_embedding("model.embed_tokens.weight"), is_embedding("gpt_neox.embed_out.weight")
    (True, False)
    """
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2] in _EMBEDDINGS


def linear_spec(config: Mapping[str, Any], name: str) -> tuple[str, str] | None:
    """(axes, evidence) of the two-axis weight ``name`` in a checkpoint with this config.json; None if it does not say.

    Only a config with a ``model_type`` is evidence, whose nested ones (text, vision, decoder) count too, or of diffusers.
    """
    types = set(_model_types(config))
    module, _, leaf = name.rpartition(".")
    if leaf != "weight":
        return None
    if not types:
        # diffusers 0.42.1 configuration_utils.py writes it beside every model, none of which has a transposed Linear.
        known = "_class_name" in config and "_diffusers_version" in config
        return ("out,in", "config: diffusers stores Linear weights as [out, in]") if known else None
    last = module.rpartition(".")[2]
    transposed = sorted(t for t in types if last in _CONV1D.get(t, frozenset()))
    if transposed:
        return "in,out", f"config: {transposed[0]} stores {last} as Conv1D [in, out]"
    return "out,in", f"config: {'/'.join(sorted(types))} stores Linear weights as [out, in]"


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for value in config.values():
        if isinstance(value, dict):
            yield from _model_types(value)
