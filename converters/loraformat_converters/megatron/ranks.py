"""Rows in the order of the module, out of the order in which the ranks of a tensor-parallel run stored them.

A rank of T holds a T-th of the rows of a gate and as many of an up, and a checkpoint has the gates of all ranks before
the ups (Megatron-Core 0.19 transformer/mlp.py ``apply_swiglu_sharded_factory``). Megatron-Bridge 0.6.2 does so with every
``linear_out`` of a ``linear_fc1``, those of a gate or an up alone too, of which it stores the first halves of all ranks
and then the second ones; and with no magnitude, which has gate and up rank by rank. Both are right where T is 1. T is
known by the chunks of the very tensors (all measured).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["from_halves", "from_ranks"]


def from_halves(stored: Array, ranks: int) -> Array:
    """The rows of one projection, of which the first halves of all ranks lie before the second ones.

    >>> import numpy as np
    >>> from_halves(np.arange(8), 2).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    return _exchanged(stored, 2, ranks)


def from_ranks(stored: Array, ranks: int) -> Array:
    """The rows of a gate and then of an up, which lie rank by rank, a gate and an up of each.

    >>> import numpy as np
    >>> from_ranks(np.arange(8), 2).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    return _exchanged(stored, ranks, 2)


def _exchanged(stored: Array, outer: int, inner: int) -> Array:
    """Rows [outer · inner · n], read as [inner, outer, n]."""
    blocks = stored.reshape(outer, inner, -1, *stored.shape[1:])
    return blocks.swapaxes(0, 1).reshape(stored.shape)
