"""The text encoders of image models, by the names of transformers: CLIP and the encoder of T5.

Published checkpoints keep these names behind a prefix; the second encoder of SDXL is stored as OpenCLIP has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from loraformat_converters.spaces.rows import WEIGHT, Row, modules, thirds

__all__ = ["clip", "open_clip", "t5"]


def clip(layers: int, *, projection: bool = False) -> Iterator[Row]:
    """CLIPTextModel, or the one with a projection."""
    yield from modules("text_model.embeddings.token_embedding", leaves=WEIGHT)
    yield from modules("text_model.embeddings.position_embedding", leaves=WEIGHT)
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from modules(f"{layer}.self_attn.{name}")
        for name in ("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"):
            yield from modules(f"{layer}.{name}")
    yield from modules("text_model.final_layer_norm")
    if projection:
        yield from modules("text_projection", leaves=WEIGHT)


def open_clip(layers: int) -> Iterator[Row]:
    """The same with OpenCLIP's names, q, k and v in one tensor; its projection lies the other way round and is no row.

    diffusers 0.42.1 loaders/single_file_utils.convert_open_clip_checkpoint.
    """
    yield Row("text_model.embeddings.token_embedding.weight", "token_embedding.weight")
    yield Row("text_model.embeddings.position_embedding.weight", "positional_embedding")
    for i in range(layers):
        new, old = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        q, k, v = (f"{new}.self_attn.{name}_proj" for name in "qkv")
        for row in thirds((q, k, v), f"{old}.attn.in_proj"):
            yield replace(row, published=row.published.replace("in_proj.", "in_proj_"))
        yield from modules(f"{new}.self_attn.out_proj", f"{old}.attn.out_proj")
        for name, other in (("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
            yield from modules(f"{new}.{name}", f"{old}.{other}")
        for n in (1, 2):
            yield from modules(f"{new}.layer_norm{n}", f"{old}.ln_{n}")
    yield from modules("text_model.final_layer_norm", "ln_final")


def t5(layers: int = 24) -> Iterator[Row]:
    """The encoder of T5 1.1."""
    yield from modules("shared", leaves=WEIGHT)
    for i in range(layers):
        block = f"encoder.block.{i}.layer"
        for name in ("q", "k", "v", "o"):
            yield from modules(f"{block}.0.SelfAttention.{name}", leaves=WEIGHT)
        for name in ("wi_0", "wi_1", "wo"):
            yield from modules(f"{block}.1.DenseReluDense.{name}", leaves=WEIGHT)
        for n in (0, 1):
            yield from modules(f"{block}.{n}.layer_norm", leaves=WEIGHT)
    yield from modules("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", leaves=WEIGHT)
    yield from modules("encoder.final_layer_norm", leaves=WEIGHT)
