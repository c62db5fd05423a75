"""Bind: write into an adapter what its base says: how each matrix lies in its tensor, and which tensor it is.

Two things tell which: a digest of its bytes, which only the very tensor has, and a sketch, which recognises it renamed,
cast or quantised, so that a target is found in a graph that kept no names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loraformat.errors import fault
from loraformat.identity import runs_sha256
from loraformat.resolve import Hints
from loraformat.sketch import sketch
from loraformat.tiles import read_runs, values_of

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.base import Base

__all__ = ["bind"]


def bind(adapter: Adapter, base: Base, hints: Hints | None = None, *, sketches: bool = True) -> Adapter:
    """The same adapter (the same digest) with ``placement``, ``base_sha256`` and ``sketch`` of every target.

    Args:
        sketches: write them; 256 bytes a target. A tensor of one axis has none.

    Raises:
        LoraFormatError: LF-602 … LF-606 where a target is not found or not placed; LF-608 where the base stores its
            weights in an orientation of its own.
    """
    if "attach" in base.verbs:
        fix = "bind to the checkpoint that the graph was exported from; merge and attach need no binding"
        raise fault(
            "LF-608", f"{base.path} is a graph: its tensors are not laid out like the named parameters", fix=fix
        )
    resolution = base.resolve(adapter, hints or Hints()).require()
    known = base.parameters()
    bound = {}
    for key, update in adapter.items():
        match, *_ = resolution.targets[key]
        sha256 = drawn = None
        if match.weight in known:
            weight = values_of(base, known[match.weight])
            sha256 = runs_sha256(tile for _, tile in read_runs(base, known[match.weight]))
            # A resized vocabulary is no longer the tensor that the placement describes: its sketch would mislead.
            drawn = sketch(weight, match.placement) if sketches and weight.shape == match.placement.shape else None
        bound[key] = replace(update, placement=match.parameter or match.placement, base_sha256=sha256, sketch=drawn)
    return replace(adapter, targets=bound)
