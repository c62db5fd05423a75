"""The shapes of tensors that a base does not store: what a model makes of its checkpoint's while it loads them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from loraformat.adapter import Adapter
from loraformat.naming.links import Link, Share
from loraformat.naming.spaces import TORCH, Known, Space
from loraformat.updates import Update

__all__ = ["stacks"]

Shape = tuple[int, ...]


def stacks(
    wanted: Collection[str], names: Mapping[str, Shape], config: Mapping[str, Any], spaces: Iterable[Space]
) -> dict[str, Shape]:
    """Shape [n, out, in] of each wanted stack, such as of experts, whose matrices a base stores one by one, all of them.

    Args:
        wanted: torch names, as a model has them in memory.
        names: of the base → shape.
    """
    known = Known(Adapter(dict.fromkeys(wanted, Update(()))), names, config)
    links: dict[str, list[Link]] = {}
    for link in (link for space in spaces if space.name == TORCH for link in space.links(known)):
        if link.there.name in wanted and link.there.index is not None and len(names.get(link.here.name, ())) == 2:
            links.setdefault(link.there.name, []).append(link)
    return {name: shape for name, own in links.items() if (shape := _shape(own, names)) is not None}


def _shape(links: Iterable[Link], names: Mapping[str, Shape]) -> Shape | None:
    """What all pieces agree about, if every row of every matrix is one's."""
    rows: dict[int, int] = {}
    shapes = set()
    for link in links:
        (out, in_), (i, n), share = names[link.here.name], link.there.index or (0, 0), link.there.rows
        shapes.add((n, (share.whole(out) or 0) if isinstance(share, Share) else out, in_))
        rows[i] = rows.get(i, 0) + out
    shape = shapes.pop() if len(shapes) == 1 else None
    return shape if shape and rows == dict.fromkeys(range(shape[0]), shape[1]) else None
