"""Bind: write into an adapter what its base says: how each matrix lies in its tensor, and which tensor it is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loraformat.errors import fault
from loraformat.identity import tensor_sha256
from loraformat.resolve import Hints

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.base import Base

__all__ = ["bind"]


def bind(adapter: Adapter, base: Base, hints: Hints | None = None) -> Adapter:
    """The same adapter (the same digest) with ``placement`` and ``base_sha256`` of every target.

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
        (match,) = resolution.targets[key]
        sha256 = tensor_sha256(base.read(match.weight)) if match.weight in known else None
        bound[key] = replace(update, placement=match.placement, base_sha256=sha256)
    return replace(adapter, targets=bound)
