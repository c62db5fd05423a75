"""Trees of live arrays as adapters, and back: by the layouts of the files that would hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from loraformat import registry
from loraformat.errors import fault
from loraformat.layout import ReadOptions
from loraformat.memory import MemorySource
from loraformat.parts import Lora
from loraformat_converters.flax import nested
from loraformat_converters.flax.gemma import layout as gemma
from loraformat_converters.flax.lorax import layout as lorax
from loraformat_converters.flax.maxtext import layout as maxtext
from loraformat_converters.flax.nnx import layout as nnx
from loraformat_converters.flax.qwix import layout as qwix
from loraformat_converters.jax_live.tree import named

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["from_pytree", "to_pytree"]

_LAYOUTS: dict[str, Any] = {item.name: item for item in (nnx, qwix, gemma, lorax, maxtext)}


def from_pytree(tree: Any, layout: str | None = None, *, options: ReadOptions | None = None) -> Adapter:
    """The adapter that a tree of factors is, such as ``nnx.state(model, nnx.LoRAParam)``.

    Args:
        layout: ``nnx``, ``qwix``, ``gemma``, …; default: told by the names.
        options: what the tree does not say, such as alpha; a base for the shapes of its weights.

    Raises:
        LoraFormatError: as the layout's reader.
    """
    positions, leaves, _ = named(tree)
    arrays = {name: np.asarray(leaves[at]) for name, at in positions.items()}
    return registry.read_source(MemorySource(arrays), layout, options)[0].adapter


def to_pytree(adapter: Adapter, layout: str) -> dict[Any, Any]:
    """The factors as nested dicts of JAX arrays, as the layout names and shapes them; digits of a path are integers.

    It is what ``nnx.update(model, tree)`` and ``nnx.replace_by_pure_dict`` take. ``layout``: ``nnx``, ``qwix``, ``gemma``,
    ``lorax`` or ``maxtext``.

    Raises:
        LoraFormatError: LF-508 what the layout cannot hold; LF-705 another layout.
    """
    if layout not in _LAYOUTS:
        raise fault("LF-705", f"no tree is made in the layout {layout}", fix=f"one of {', '.join(_LAYOUTS)}")
    other = {part.kind for update in adapter.values() for part in update.parts if not isinstance(part, Lora)}
    if other:
        raise fault(
            "LF-508", f"{layout} cannot carry {', '.join(sorted(other))} parts", fix="merge with jax_live.apply"
        )
    arrays = _LAYOUTS[layout].leaves(adapter)
    tree: dict[Any, Any] = _numbered(nested({path: jnp.asarray(array) for path, array in arrays.items()}))
    return tree


def _numbered(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdecimal() else key: _numbered(value) for key, value in tree.items()}
