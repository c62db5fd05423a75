"""Leaves of a pytree by name: path joined by ``/``, as flax names parameters."""

from __future__ import annotations

from typing import Any

import jax

from loraformat.errors import fault

__all__ = ["named"]

_WRAPPERS = ("value", "raw_value")  # flax 0.12.8 nnx.State: the array is a field of its Variable

_FIX = "a key with / in it reads like two keys, one in the other: rename one"


def named(tree: Any) -> tuple[dict[str, int], list[Any], Any]:
    """(name → position, leaves, structure) of a tree of arrays.

    A Linen collection ``params`` that is the only one is no part of a name: the model that it belongs to has none.

    Raises:
        LoraFormatError: LF-603 two leaves have one name.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    paths = [[_word(entry) for entry in path] for path, _ in flat]
    paths = [path[:-1] if len(path) > 1 and path[-1] in _WRAPPERS else path for path in paths]
    if isinstance(tree, dict) and tuple(tree) == ("params",):
        paths = [path[1:] for path in paths]
    positions: dict[str, int] = {}
    for i, path in enumerate(paths):
        if positions.setdefault("/".join(path), i) != i:
            raise fault("LF-603", "two leaves of the tree have this path", where="/".join(path), fix=_FIX)
    return positions, [leaf for _, leaf in flat], structure


def _word(entry: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(entry, field):
            return str(getattr(entry, field))
    return str(entry)
