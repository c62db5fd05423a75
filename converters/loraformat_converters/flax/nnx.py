"""Flax NNX (flax 0.12.8): ``nnx.LoRA`` and ``nnx.LoRALinear``, y = W·x + (x·lora_a)·lora_b. There is no scale.

lora_a is [in, r] and lora_b [r, out] beside a kernel [in, out]. ``LoRALinear`` keeps them in a module ``lora`` of its
own, ``LoRA`` in itself, around its ``base_module``: either way the parameter is called ``…/kernel`` in a model without
LoRA. A tree of ``nnx.State`` ends every path with ``value``; which it was, and which module, is given back.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.axes import Placement
from loraformat.errors import LoraFormatError, Problem
from loraformat.layout import Reading
from loraformat.parts import Lora
from loraformat_converters.flax import open_tree
from loraformat_converters.flax.pairs import Draft, OfTrees, form_of, grouped, kept_form

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.layout import ReadOptions
    from loraformat.source import Source
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Nnx", "layout"]

_ROLES = ("lora_a", "lora_b")
_INNER = "/lora"


class Nnx(OfTrees):
    """The state of NNX's LoRA modules, in any container."""

    name = "nnx"
    describes = "Flax NNX: the state of nnx.LoRA, as Orbax, msgpack, npz or safetensors"
    scale = "there is none: it has to be in the factors"

    def detect(self, source: Source) -> str | None:
        """Paths that end with lora_a and lora_b."""
        tree = open_tree(source)
        found = next((path for path in tree or () if path.rpartition("/")[2] in _ROLES), None)
        return f"the tree has {found}" if found else None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """Every pair, with the factor 1. LF-506: leaves of the base beside them."""
        tree = open_tree(source)
        draft = Draft(tree or {})
        stems, others = grouped(draft.tree, _split)
        draft.strays(others, "save the factors alone: nnx.state(model, nnx.LoRAParam)")
        for stem, a, b in draft.pairs(stems, _ROLES):
            if a.ndim != 2 or b.ndim != 2:
                draft.say("LF-309", f"lora_a {list(a.shape)} and lora_b {list(b.shape)} are no matrices", stem)
                continue
            part = Lora(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), 1.0, "factor")
            draft.target(_parameter(stem), part, Placement((a.shape[0], b.shape[1]), (1,), (0,)))
        form = form_of(tree) | {"inner": sorted(_parameter(s) for s in stems if s.endswith(_INNER))}
        return Reading(draft.finish("flax", {"nnx": json.dumps(form, sort_keys=True)}, str(source.path)))

    def leaves(self, adapter: Adapter) -> dict[str, Array]:
        """Path → array, of pairs of kernels [in, out] whose scale is 1; LF-508 for any other."""
        inner = kept_form(adapter, self.name).get("inner")
        arrays: dict[str, Array] = {}
        problems = []
        for key, update in adapter.items():
            if (what := _obstacle(key, update)) is not None:
                problems.append(Problem("LF-508", what[0], key, what[1]))
                continue
            module = key.removesuffix("/kernel") + _INNER * (not isinstance(inner, list) or key in inner)
            part = update["lora"]
            arrays |= {f"{module}/lora_a": part.lora_A.T, f"{module}/lora_b": part.lora_B.T}
        if problems:
            raise LoraFormatError(problems)
        return arrays


def _split(path: str) -> tuple[str, str] | None:
    stem, _, leaf = path.rpartition("/")
    return (stem, leaf) if leaf in _ROLES and stem else None


def _parameter(stem: str) -> str:
    return f"{stem.removesuffix(_INNER)}/kernel"


def _obstacle(key: str, update: Update) -> tuple[str, str] | None:
    """Why NNX cannot hold this target, and the way out."""
    part, place = update["lora"], update.placement
    if part.mid is not None or part.lora_A.ndim != 2:
        return "NNX has pairs of two axes only", "--to-lora R" if part.mid is not None else ""
    if not key.endswith("/kernel") or (place is not None and place.spec != "in,out"):
        return f"NNX's LoRA is of a kernel [in, out]{f', here [{place.spec}]' if place else ''}", ""
    if part.scale != 1.0:
        return f"NNX has no scale, here it is {part.scale:g}", "--fold-scale"
    return None


layout = Nnx()
