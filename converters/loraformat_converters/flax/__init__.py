"""The files of JAX programs: trees of arrays in Orbax folders, flax's msgpack, npz or safetensors; by path, joined by ``/``.

``orbax``, ``msgpack`` and ``npz`` read and write one container each, ``tree`` chooses. ``nnx``, ``qwix``, ``gemma``,
``lorax`` and ``maxtext`` are the layouts of factors in a tree, ``pairs`` and ``factors`` what they share, and ``base`` is a
tree of weights that they are merged into. ``space`` knows the names: ``linen`` by rule, ``families`` by tables.
"""

from __future__ import annotations

from loraformat_converters.flax.tree import Tree, nested, open_tree, output

__all__ = ["Tree", "nested", "open_tree", "output"]
