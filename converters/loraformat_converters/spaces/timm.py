"""Other torch names of one model: a vision transformer (ViT, DeiT) in timm, and in transformers.

timm has query, key and value in one Linear, transformers each by itself; the rest goes by other words (transformers 4.57
models/vit/convert_vit_timm_to_pytorch.py). What transformers 5 calls otherwise than its older files is known by its own
rules (``renames``).
"""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.naming.links import Link, Seat, Share
from loraformat.naming.spaces import TORCH, Known
from loraformat.naming.templates import Templates
from loraformat_converters.spaces.renames import newer

__all__ = ["Timm"]

_MODULES = {
    "encoder.layer.{}.attention.output.dense": "blocks.{}.attn.proj",
    "encoder.layer.{}.intermediate.dense": "blocks.{}.mlp.fc1",
    "encoder.layer.{}.output.dense": "blocks.{}.mlp.fc2",
    "encoder.layer.{}.layernorm_before": "blocks.{}.norm1",
    "encoder.layer.{}.layernorm_after": "blocks.{}.norm2",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
_FUSED = ("query", "key", "value")
_PREFIXES = ("", "vit.", "deit.")
_CLASSES = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassification"}


def _pairs(modules: dict[str, str]) -> list[tuple[str, str]]:
    both = [(here, there) for name, there in modules.items() for here in (f"{prefix}{name}" for prefix in _PREFIXES)]
    return [(f"{here}.{leaf}", f"{there}.{leaf}") for here, there in both for leaf in ("weight", "bias")]


_TABLE = Templates([*_pairs(_MODULES), *((f"classifier.{leaf}", f"head.{leaf}") for leaf in ("weight", "bias"))])
_QKV = [Templates(_pairs({f"encoder.layer.{{}}.attention.attention.{leaf}": "blocks.{}.attn.qkv"})) for leaf in _FUSED]


class Timm:
    """See ``loraformat.naming.spaces.Space``: ``here`` is transformers' name."""

    name = TORCH
    describes = "torch: a vision transformer of timm, and of transformers"

    def links(self, known: Known) -> Iterator[Link]:
        """By a table; rows of query, key and value as thirds of the one that timm has."""
        both = set(known.adapter) | known.names.keys()
        for there in both:
            if not there.startswith(("blocks.", "patch_embed.", "norm.", "head.")):
                continue
            yield from _links(there, _TABLE, None, both)
            for i, table in enumerate(_QKV):
                yield from _links(there, table, Share(i, i + 1, 3), both)


def _links(there: str, table: Templates, rows: Share | None, both: set[str]) -> Iterator[Link]:
    for older in table.here(there):
        forms = {
            form
            for kind, name in _CLASSES.items()
            for form in newer(older, {"model_type": kind, "architectures": [name]})
        }
        for form in sorted(forms & both):
            yield Link(Seat(form), Seat(there, rows=rows), "table: timm")
