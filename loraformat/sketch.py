"""Sketches: 64 numbers that recognise a base weight though it was renamed, cast, quantised or stored the other way.

Normative. Let W be a base weight of two or more axes as the matrix [out, in] of its placement, batch axes in front of
out and flattened with it. In float64,

    S = P · W · Q        8 × 8,  P [8, out],  Q [in, 8],  all entries ±1

- P[k, j] is +1 where bit k (of value 2^k) of byte j of SHAKE-128("loraformat/1\\nsketch\\nout") is set, else −1;
  Q[j, k] is read in the same way from SHAKE-128("loraformat/1\\nsketch\\nin"). A weight of any size reads a prefix of
  the same two streams.
- The sketch is S itself, row-major, as 64 values of F32: it is linear, and c·W has c times the sketch of W.

``likeness`` says what two of them tell.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loraformat.blas import one_blas_thread

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.axes import Placement
    from loraformat.tiles import Tensor

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]
    F64 = npt.NDArray[np.float64]

__all__ = ["SIZE", "sketch", "sketches", "telling"]

_K = 8
SIZE = _K * _K
"""How many numbers a sketch has."""

_TILE = 1 << 18  # values: 2 MiB of float64


@one_blas_thread()
def sketch(weight: Tensor, placement: Placement) -> F32 | None:
    """The sketch of a base weight: float32 [64].

    Args:
        weight: a tensor of ``placement.shape``, any float dtype; or what gives one where it is sliced: it is read in tiles.

    Returns:
        None for a weight of fewer than two axes, or with sums that are not finite in float32: it has no sketch.
    """
    if len(weight.shape) < 2:
        return None
    *batch, out, in_ = placement.matrix_shape
    left, right = _signs("out", math.prod(batch) * out), _signs("in", in_)
    grid = np.arange(len(left)).reshape(*batch, out)
    total = np.zeros((_K, _K))
    step = max(1, _TILE // max(1, math.prod(weight.shape[1:])))
    for start in range(0, weight.shape[0], step):
        run = placement.rows(start, min(start + step, weight.shape[0]))
        tile = weight[start : start + step].astype(np.float64)
        matrix = run.placement.to_matrix(tile).reshape(-1, run.placement.matrix_shape[-1])
        if run.group == "in":
            total += left.T @ (matrix @ right[run.index])
        else:
            axis = run.position if run.group == "batch" else -1
            rows = np.arange(grid.shape[axis])[run.index]
            total += left[grid.take(rows, axis).reshape(-1)].T @ (matrix @ right)
    return _stored(total)


@one_blas_thread()
def sketches(matrix: Array, rows: int, step: int) -> Mapping[int, F32]:
    """Start → sketch of every run of ``rows`` rows of a matrix [out, in] that starts at a multiple of ``step``.

    Each is the sketch of the weight [rows, in] that the run would be by itself.
    """
    out, in_ = matrix.shape
    left, right = _signs("out", rows), _signs("in", in_)
    tiles = max(1, _TILE // max(1, in_))
    summed = np.concatenate([matrix[i : i + tiles].astype(np.float64) @ right for i in range(0, out, tiles)])
    drawn = {start: _stored(left.T @ summed[start : start + rows]) for start in range(0, out - rows + 1, step)}
    return {start: found for start, found in drawn.items() if found is not None}


def telling(place: Placement) -> bool:
    """Whether a sketch of a matrix of this size is proof: that of a small one varies in too few directions.

    Of random matrices that vary in 4 directions, one in 50 is taken for a given other; in 32, one in 10^11.
    """
    *rows, columns = place.matrix_shape
    return min(_K, math.prod(rows)) * min(_K, columns) >= 32


@functools.lru_cache(maxsize=32)
def _signs(side: Literal["out", "in"], count: int) -> npt.NDArray[np.int8]:
    """±1 [count, 8] of one side; a byte each, because a vocabulary is long."""
    stream = hashlib.shake_128(f"loraformat/1\nsketch\n{side}".encode()).digest(count)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8)[:, None], axis=1, bitorder="little")
    return (2 * bits.astype(np.int8) - 1).astype(np.int8)


def _stored(total: F64) -> F32 | None:
    with np.errstate(over="ignore"):
        drawn = total.reshape(-1).astype(np.float32)
    return drawn if np.isfinite(drawn).all() else None
