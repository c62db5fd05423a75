"""The names of JAX models, and how they stand to torch's: by rule, or by the table of a family of models.

*Linen's rule* (transformers' Flax models, up to 4.x: BERT, ViT, Llama, Gemma, GPT-2, …): the same path, ``.`` as ``/``,
and of a ``weight`` what it is there: ``kernel`` [in, out], ``embedding``, the ``scale`` of a norm.

*Tunix's tables* (tunix models/llama3, qwen2 and qwen3 params.py at 0737eb8): other paths, and attention by heads:
q, k and v [in, heads, head_dim], o [heads, head_dim, out]. Rows keep their order, rotary ones too.

Both know a layer's ``…/mlp/up_proj/kernel``: which it is, a name that only one of them has must tell, or a base.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraformat.naming.links import Link, Seat
from loraformat.naming.spaces import TORCH, Known

if TYPE_CHECKING:
    from loraformat.updates import Update

__all__ = ["Flax", "space"]

_HEADS_OUT, _HEADS_IN = "in,out0,out1", "in0,in1,out"

# torch → Tunix, with the axes there and the sizes that split heads; # stands for the layer's number.
_TUNIX = {
    "model.embed_tokens.weight": ("embedder/input_embedding", "in,out", ""),
    "model.layers.#.self_attn.q_proj.weight": ("layers/#/attn/q_proj/w", _HEADS_OUT, "num_attention_heads"),
    "model.layers.#.self_attn.k_proj.weight": ("layers/#/attn/k_proj/w", _HEADS_OUT, "num_key_value_heads"),
    "model.layers.#.self_attn.v_proj.weight": ("layers/#/attn/v_proj/w", _HEADS_OUT, "num_key_value_heads"),
    "model.layers.#.self_attn.o_proj.weight": ("layers/#/attn/o_proj/w", _HEADS_IN, "num_attention_heads"),
    "model.layers.#.mlp.gate_proj.weight": ("layers/#/mlp/gate_proj/kernel", "in,out", ""),
    "model.layers.#.mlp.up_proj.weight": ("layers/#/mlp/up_proj/kernel", "in,out", ""),
    "model.layers.#.mlp.down_proj.weight": ("layers/#/mlp/down_proj/kernel", "in,out", ""),
    "model.layers.#.self_attn.q_norm.weight": ("layers/#/attn/q_norm/w", "out", ""),
    "model.layers.#.self_attn.k_norm.weight": ("layers/#/attn/k_norm/w", "out", ""),
    "model.layers.#.input_layernorm.weight": ("layers/#/input_layernorm/w", "out", ""),
    "model.layers.#.post_attention_layernorm.weight": ("layers/#/post_attention_layernorm/w", "out", ""),
    "model.norm.weight": ("final_norm/w", "out", ""),
    "lm_head.weight": ("lm_head/w", "in,out", ""),
}
_OWN = {own: torch for torch, (own, _, _) in _TUNIX.items()}


@dataclass(frozen=True, slots=True)
class _Reading:
    """One way in which a torch key is called here."""

    torch: str
    own: str
    axes: tuple[str, str]
    evidence: str
    shape: tuple[int, ...] | None = None


class Flax:
    """Paths joined by ``/``."""

    name = "flax"
    describes = "JAX: paths of flax's Linen and NNX, Tunix"

    def links(self, known: Known) -> Iterator[Link]:
        """Both readings of every key that may matter; of keys that both know, Tunix's alone where another is Tunix's only."""
        readings = list(_readings(known))
        certain = any(r.evidence.startswith("table") and not _linen_too(r.own) and _named(known, r) for r in readings)
        for reading in readings:
            if certain and reading.evidence.startswith("rule") and _tunix_of(reading.own) is not None:
                continue
            here = Seat(
                reading.torch, axes=reading.axes[0], shape=_flat(known.adapter.targets.get(reading.own), reading)
            )
            there = Seat(reading.own, axes=reading.axes[1], shape=reading.shape)
            yield Link(here, there, reading.evidence)


def _readings(known: Known) -> Iterator[_Reading]:
    adapter = known.adapter
    if adapter.names != TORCH:
        for own, update in adapter.items():
            if (torch := _tunix_of(own)) is not None and (not known.names or torch in known.names):
                yield _tunix(torch, own, known.config)
            if (torch := _torch_of(own)) is not None and (not known.names or torch in known.names):
                yield _linen(torch, own, update)
        return
    for torch, update in adapter.items():
        number, pattern = _numbered(torch, ".")
        if pattern in _TUNIX:
            yield _tunix(torch, _TUNIX[pattern][0].replace("#", number), known.config)
        for own in _linen_names(torch, update):
            yield _linen(torch, own, update)


def _flat(update: Update | None, reading: _Reading) -> tuple[int, ...] | None:
    """The shape of torch's [out, in], of a kernel that has heads here."""
    matrix = update.matrix_shape() if update is not None else None
    return matrix if matrix is not None and len(matrix) == 2 and reading.axes[0] == "out,in" else None


def _named(known: Known, reading: _Reading) -> bool:
    return (reading.torch if known.adapter.names == TORCH else reading.own) in known.adapter


def _numbered(name: str, dot: str) -> tuple[str, str]:
    """(the layer's number, the name with # in its place)."""
    found = re.search(rf"(?<=layers\{dot})\d+(?=\{dot})", name)
    return ("", name) if found is None else (found[0], f"{name[: found.start()]}#{name[found.end() :]}")


# Tunix.


def _tunix_of(own: str) -> str | None:
    number, pattern = _numbered(own, "/")
    return _OWN[pattern].replace("#", number) if pattern in _OWN else None


def _tunix(torch: str, own: str, config: Mapping[str, Any]) -> _Reading:
    _, axes, heads = _TUNIX[_numbered(torch, ".")[1]]
    mine = {"out": "out", "in,out": "in,out" if "embed" in own else "out,in"}.get(axes, "out,in")
    return _Reading(torch, own, (mine, axes), "table: tunix", _split(axes, config, heads))


def _split(axes: str, config: Mapping[str, Any], heads: str) -> tuple[int, ...] | None:
    """The shape of a weight by heads, where the configuration tells."""
    hidden, n = config.get("hidden_size"), config.get(heads or "", config.get("num_attention_heads"))
    if not heads or not isinstance(hidden, int) or not isinstance(n, int) or n < 1:
        return None
    all_heads = config.get("num_attention_heads")
    size = config.get("head_dim") or (hidden // all_heads if isinstance(all_heads, int) and all_heads else None)
    if not isinstance(size, int):
        return None
    return (hidden, n, size) if axes == _HEADS_OUT else (n, size, hidden)


# Linen's rule.


def _linen_too(own: str) -> bool:
    return own.rpartition("/")[2] in ("kernel", "embedding", "scale", "bias")


def _torch_of(own: str) -> str | None:
    stem, _, leaf = own.rpartition("/")
    last = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}.get(leaf)
    return f"{stem.replace('/', '.')}.{last}" if stem and last else None


def _linen_names(torch: str, update: Update) -> list[str]:
    """What the parameter may be called; a lookup is an embedding, a product has a kernel, a vector is a norm's scale."""
    stem, _, leaf = torch.rpartition(".")
    path = stem.replace(".", "/")
    if leaf == "bias":
        return [f"{path}/bias"]
    if leaf != "weight" or not stem:
        return []
    shape = update.matrix_shape()
    if update.op == "embedding" or "rows" in update:
        return [f"{path}/embedding"]
    if "lora" in update or (shape is not None and shape[-1] > 1):
        return [f"{path}/kernel"]
    ndim = update["replace"].replace.ndim if "replace" in update else 1
    return [f"{path}/scale"] if ndim == 1 else [f"{path}/kernel", f"{path}/embedding"]


def _linen(torch: str, own: str, update: Update) -> _Reading:
    leaf = own.rpartition("/")[2]
    place = update.placement
    ndim = len(place.shape) if place is not None else 2
    if leaf in ("scale", "bias"):
        axes = ("out", "out")
    elif leaf == "embedding":
        axes = ("in,out", "in,out")
    elif ndim > 2:
        # flax 0.12.8 nnx.Conv: [*kernel, in, out]; torch: [out, in, *kernel].
        inner = [f"in{i}" for i in range(ndim - 1)]
        axes = (",".join(["out", *inner]), ",".join([*inner[1:], inner[0], "out"]))
    else:
        axes = ("out,in", "in,out")
    return _Reading(torch, own, axes, f"rule: a {leaf} of flax")


space = Flax()
