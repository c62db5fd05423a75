"""Factors as arrays of a JAX model keep them, axis by axis, and as the matrices that they are.

    a [*batch, in…, r]   b [*batch, r, out…]      A [*batch, r, in]   B [*batch, out, r]

Layers that a scan stacks are one batch axis. A scan over axis 1, MaxText's default, puts it behind the first axis of
each array: a [in0, L, in1…, r], b [r, L, out…].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.axes import Placement

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.parts import Lora

    Array = npt.NDArray[Any]
    Shape = tuple[int, ...]

__all__ = ["as_arrays", "as_matrices", "layers_first", "layers_second", "ways"]


def as_matrices(a: Array, b: Array, batch: int = 0) -> tuple[Array, Array]:
    """A and B of factors whose first ``batch`` axes are a batch."""
    rank = a.shape[-1]
    flat_a, flat_b = a.reshape(*a.shape[:batch], -1, rank), b.reshape(*b.shape[:batch], rank, -1)
    return np.ascontiguousarray(flat_a.swapaxes(-1, -2)), np.ascontiguousarray(flat_b.swapaxes(-1, -2))


def as_arrays(part: Lora, ins: Shape, outs: Shape) -> tuple[Array, Array]:
    """a and b with axes of these sizes, the batch in front."""
    a, b = part.lora_A.swapaxes(-1, -2), part.lora_B.swapaxes(-1, -2)
    return a.reshape(*a.shape[:-2], *ins, part.r), b.reshape(*b.shape[:-2], part.r, *outs)


def layers_first(array: Array) -> Array:
    """Of a factor whose axis 1 counts the layers, with them in front."""
    return np.moveaxis(array, 1, 0)


def layers_second(array: Array) -> Array:
    """The other way round."""
    return np.moveaxis(array, 0, 1)


def ways(shape: Shape, batch: Shape, ins: Shape, outs: Shape) -> Iterator[Placement]:
    """Every placement in a weight of ``shape`` whose in axes have the sizes ``ins`` and its out axes ``outs``, in order.

    Args:
        batch: axes of the weight.
        ins, outs: sizes one by one, or all of them as one number.
    """
    axes = [axis for axis in range(len(shape)) if axis not in batch]
    for count in range(1, len(axes)):
        for chosen in itertools.combinations(axes, count):
            rest = tuple(axis for axis in axes if axis not in chosen)
            if _same(shape, chosen, ins) and _same(shape, rest, outs):
                yield Placement(shape, rest, chosen, batch)


def _same(shape: Shape, axes: Shape, stored: Shape) -> bool:
    sizes = tuple(shape[axis] for axis in axes)
    return sizes == stored or (len(stored) == 1 and math.prod(sizes) == stored[0])
