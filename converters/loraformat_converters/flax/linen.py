"""Linen's rule, which transformers' Flax models follow (up to 4.x: BERT, ViT, Mistral, Llama, Gemma, GPT-2, …).

The same path, ``.`` as ``/``, and of a ``weight`` what it is there: ``kernel`` [in, out], ``embedding``, the ``scale``
of a norm, which the RMS norms of Llama, Mistral and Gemma call ``weight`` (known by a base). A parameter with a name of its own (a ViT's ``cls_token``) has it there too, and the same axes.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.updates import Update

__all__ = ["axes", "here", "leaf_of", "there"]

_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "weight": "weight", "bias": "bias"}


def leaf_of(own: str) -> str:
    """The last word of a path."""
    return own.rpartition("/")[2]


def here(own: str, update: Update) -> str | None:
    """The torch key of a path, if the rule has one."""
    stem, _, leaf = own.rpartition("/")
    if not stem or (leaf not in _LEAVES and not _bare(update)):
        return None
    return f"{stem.replace('/', '.')}.{_LEAVES.get(leaf, leaf)}"


def there(torch: str, update: Update, known: Container[str] = ()) -> list[str]:
    """What the parameter may be called; a lookup is an embedding, a product has a kernel, a vector is a norm's scale.

    Args:
        known: the names of a base.
    """
    stem, _, leaf = torch.rpartition(".")
    path = stem.replace(".", "/")
    if leaf == "bias":
        return [f"{path}/bias"]
    if not stem or (leaf != "weight" and not _bare(update)):
        return []
    if leaf != "weight":
        return [f"{path}/{leaf}"]
    shape = update.matrix_shape()
    if update.op == "embedding" or "rows" in update:
        return [f"{path}/embedding"]
    if "lora" in update or (shape is not None and shape[-1] > 1):
        return [f"{path}/kernel"]
    ndim = update["replace"].replace.ndim if "replace" in update else 1
    if ndim == 1 and f"{path}/weight" in known:
        return [f"{path}/weight"]
    return [f"{path}/scale"] if ndim == 1 else [f"{path}/kernel", f"{path}/embedding"]


def axes(own: str, update: Update) -> tuple[str, str]:
    """How the matrix lies in torch's tensor, and in this one."""
    leaf = leaf_of(own)
    ndim = len(update.placement.shape) if update.placement is not None else 2
    if leaf in ("scale", "weight", "bias"):
        return "out", "out"
    if leaf not in _LEAVES:
        same = ",".join(["out", *["in"] * (len(update["replace"].replace.shape) - 1)])
        return same, same
    if leaf == "embedding":
        return "in,out", "in,out"
    if ndim <= 2:
        return "out,in", "in,out"
    # flax 0.12.8 nnx.Conv: [*kernel, in, out]; torch: [out, in, *kernel].
    inner = [f"in{i}" for i in range(ndim - 1)]
    return ",".join(["out", *inner]), ",".join([*inner[1:], inner[0], "out"])


def _bare(update: Update) -> bool:
    """Whether the parameter is replaced as a whole: what else is changed is the weight of some layer."""
    return [part.kind for part in update.parts] == ["replace"]
