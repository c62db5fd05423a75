"""W' for every target, in its dtype: arithmetic in float32 and one rounding, as a merge into a file has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from loraformat.errors import fault
from loraformat.magnitudes import kept_axes
from loraformat.parts import ADDITIVE, Magnitude, Replace, Rows
from loraformat_converters.jax_live.places import placed
from loraformat_converters.jax_live.tree import named

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.updates import Update

__all__ = ["apply", "changed"]


def apply(
    params: Any, adapter: Adapter, *, names: Mapping[str, str] | None = None, axes: Mapping[str, str] | None = None
) -> Any:
    """The parameters with the adapter merged: a tree like ``params``, every target W' in W's dtype.

    ``params`` may be traced: the function can be called under ``jit``. For ``names`` and ``axes`` see ``branch``.

    Raises:
        LoraFormatError: LF-602 to LF-606 a target is not found, or how it lies is not known; LF-608 a leaf of integers or
            fp8, which are codes whose scales lie elsewhere, or without values; LF-612 a replacement of another shape.
    """
    positions, leaves, structure = named(params)
    for at, (key, update) in placed(adapter, positions, leaves, names or {}, axes or {}).items():
        leaves[at] = changed(key, update, leaves[at])
    return jax.tree_util.tree_unflatten(structure, leaves)


def changed(key: str, update: Update, base: Any) -> Any:
    """W' of one target."""
    if not jnp.issubdtype(base.dtype, jnp.floating) or jnp.dtype(base.dtype).itemsize < 2:
        raise fault("LF-608", f"a leaf of {base.dtype} is no weight that float arithmetic changes", where=key)
    if isinstance(base, jax.ShapeDtypeStruct):
        raise fault("LF-608", "the leaf has no values (a ShapeDtypeStruct)", where=key, fix="branch takes it")
    value = base.astype(jnp.float32)
    added = False
    for part in update.parts:
        if isinstance(part, Replace):
            if part.replace.shape != tuple(base.shape):
                raise fault(
                    "LF-612", f"{list(base.shape)} becomes {list(part.replace.shape)}: another model", where=key
                )
            value = jnp.asarray(part.replace, jnp.float32)
        elif part.kind in ADDITIVE and not added:
            value, added = value + _sum(update), True
        elif isinstance(part, Magnitude):
            value = _rescaled(part, update, value)
        elif isinstance(part, Rows):
            index: list[Any] = [slice(None)] * value.ndim
            index[part.axis] = np.asarray(part.indices)
            value = value.at[tuple(index)].set(jnp.asarray(part.values, jnp.float32))
    return value.astype(base.dtype)


def _sum(update: Update) -> Any:
    """ΔW of the additive parts in the leaf's own axes."""
    assert update.placement is not None
    return jnp.asarray(update.placement.from_matrix(update.matrix()))


def _rescaled(part: Magnitude, update: Update, value: Any) -> Any:
    """magnitude · V / (‖V‖ + eps), see ``loraformat.parts.Magnitude``."""
    assert update.placement is not None
    kept = kept_axes(part, update.placement)
    others = tuple(axis for axis in range(value.ndim) if axis not in kept)
    norm = jnp.sqrt(jnp.sum(value * value, axis=others, keepdims=True)) + part.eps
    ordered = np.asarray(part.magnitude, np.float32).reshape([value.shape[axis] for axis in kept])
    shape = [value.shape[axis] if axis in kept else 1 for axis in range(value.ndim)]
    return value / norm * jnp.asarray(ordered.transpose(np.argsort(kept)).reshape(shape))
