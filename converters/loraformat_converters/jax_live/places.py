"""Which leaf is a target, and how the matrix lies in it: by exact name and by evidence, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.errors import LoraFormatError, Problem
from loraformat.names import nearest
from loraformat.placing import place

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.updates import Update

__all__ = ["placed"]


def placed(
    adapter: Adapter, positions: Mapping[str, int], leaves: list[Any], names: Mapping[str, str], axes: Mapping[str, str]
) -> dict[int, tuple[str, Update]]:
    """Position of a leaf → (key, the update, placed).

    Args:
        names: key → name of the leaf, where they differ.
        axes: key → how the matrix lies in its leaf, such as ``out,in``.

    Raises:
        LoraFormatError: LF-602 no leaf of that name; LF-603 two targets are one leaf; LF-604 to LF-606 see
            ``loraformat.placing``. Everything at once.
    """
    found: dict[int, tuple[str, Update]] = {}
    problems: list[Problem] = list(_unused(adapter, names, axes))
    for key, update in adapter.items():
        name = names.get(key, key)
        if name not in positions:
            near = nearest(name, positions)
            hint = f"nearest: {', '.join(near)}; say it: names={{{key!r}: …}}" if near else ""
            problems.append(Problem("LF-602", f"no leaf is called {name}", key, hint))
            continue
        at = positions[name]
        if at in found:
            problems.append(Problem("LF-603", f"{name} is meant by {found[at][0]} too", key))
            continue
        shape = tuple(np.shape(leaves[at]))
        try:
            where, _ = place(key, update, shape, axes.get(key), [])
            found[at] = key, update.placed(where)
        except LoraFormatError as error:
            problems += error.problems
    if problems:
        raise LoraFormatError(problems)
    return found


def _unused(adapter: Adapter, *stated: Mapping[str, str]) -> Iterator[Problem]:
    for mapping in stated:
        yield from (
            Problem("LF-705", "is stated, and no target is called so", key) for key in mapping if key not in adapter
        )
