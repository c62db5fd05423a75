"""The best pair of a given rank for a dense matrix, found by a few products with it instead of a whole decomposition.

Randomised subspace iteration (Halko, Martinsson, Tropp, arXiv:0909.4061): the range of M is felt with some random
vectors more than the rank, and refined by products with M Mᵀ until a round no longer gains. What is left out is not
estimated but known: for Q with orthonormal columns ‖M − QQᵀM‖² = ‖M‖² − ‖QᵀM‖².
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.normal import normal

if TYPE_CHECKING:
    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]
    Array = npt.NDArray[Any]

__all__ = ["Pair", "best_pair", "square"]

_MORE = 10  # random vectors beyond the rank
_ROUNDS = 12
_GAIN = (
    5e-3  # a round that wins less than this share of what is left out is the last: the flattest spectra end at 1.003
)
_SMALL = 4  # a side that is less than so many times the vectors is decomposed whole
_ROUNDING = 1e-7  # singular values below this share of the largest are rounding of float32


@dataclass(frozen=True, slots=True)
class Pair:
    """M ≈ B @ A.

    Attributes:
        A: [r, in] float32, B: [out, r] float32; the scale of each singular value is shared by both.
        sigma: [r] float64, the singular values, descending.
        norm: ‖M‖ (Frobenius).
        residual: ‖M − B @ A‖ / ‖M‖, measured with the float32 factors; 0 of a zero matrix.
    """

    A: F32
    B: F32
    sigma: npt.NDArray[np.float64]
    norm: float
    residual: float


def best_pair(matrix: F32, *, rank: int | None = None, energy: float | None = None, seed_name: str = "") -> Pair:
    """The nearest product of rank ``rank``, or of the least rank that holds ``energy`` of ‖M‖².

    Args:
        matrix: [out, in].
        energy: in (0, 1]: the share of ‖M‖² that the pair must hold, as far as float32 can tell.
        seed_name: the same name and matrix give the same pair.

    Returns:
        Fewer than ``rank`` where the other singular values are nothing but rounding; none of a zero matrix.
    """
    total = square(matrix)
    if total == 0.0:
        out, in_ = matrix.shape
        return Pair(np.zeros((0, in_), np.float32), np.zeros((out, 0), np.float32), np.zeros(0), 0.0, 0.0)
    q, values = _basis(matrix, total, rank, energy, seed_name)
    kept = int(np.count_nonzero(values > _ROUNDING * values[0]))
    if rank is None and energy is not None:
        held = np.cumsum(values[:kept] ** 2) >= energy * total
        kept = int(np.argmax(held)) + 1 if held.any() else kept
    else:
        kept = min(kept, rank or kept)
    return _pair(matrix, q[:, :kept], values[:kept], total)


def square(values: Array) -> float:
    """‖values‖² of float32 values, summed in runs so that the sum keeps its digits."""
    flat = values.reshape(-1) if values.flags.c_contiguous else values.T.reshape(-1)
    runs = (flat[i : i + (1 << 16)] for i in range(0, flat.size, 1 << 16))
    return math.fsum(float(np.dot(run, run)) for run in runs)


def _basis(
    matrix: F32, total: float, rank: int | None, energy: float | None, name: str
) -> tuple[F32, npt.NDArray[np.float64]]:
    """Left singular vectors [out, k] and values [k], at least those that are asked for."""
    least = min(matrix.shape)
    count = rank or 32
    while _SMALL * (count + _MORE) < least:
        q, values = _felt(matrix, total, count, name)
        if rank is not None or float(np.sum(values[:count] ** 2)) >= (energy or 1.0) * total:
            return q[:, :count], values[:count]
        count *= 2
    return _whole(matrix)


def _felt(matrix: F32, total: float, count: int, name: str) -> tuple[F32, npt.NDArray[np.float64]]:
    """By subspace iteration with ``count`` vectors and some more."""
    k, in_ = count + _MORE, matrix.shape[1]
    start = normal(0, name, in_ * k).reshape(in_, k).astype(np.float32)
    q, held = np.linalg.qr(matrix @ start)[0], 0.0
    for _ in range(_ROUNDS):
        back = matrix.T @ q
        before, held = held, square(back)
        if held - before <= _GAIN * max(total - held, _ROUNDING * total):
            break
        q = np.linalg.qr(matrix @ np.linalg.qr(back)[0])[0]
    u, values, _ = np.linalg.svd((q.T @ matrix).astype(np.float64), full_matrices=False)
    return np.asarray(q @ u.astype(np.float32), np.float32), values


def _whole(matrix: F32) -> tuple[F32, npt.NDArray[np.float64]]:
    """All of them: the eigenvectors of M Mᵀ or MᵀM, whichever is smaller, in float64."""
    wide = matrix.shape[0] <= matrix.shape[1]
    sides = matrix.astype(np.float64) if wide else matrix.T.astype(np.float64)
    squares, vectors = np.linalg.eigh(sides @ sides.T)
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    vectors = vectors[:, ::-1]
    if wide:
        return vectors.astype(np.float32), values
    lengths = np.maximum(values, _ROUNDING * values[0])
    return np.asarray(sides.T @ vectors / lengths, np.float32), values


def _pair(matrix: F32, q: F32, values: npt.NDArray[np.float64], total: float) -> Pair:
    root = np.sqrt(values).astype(np.float32)
    a, b = (q.T @ matrix) / root[:, None], q * root
    step = max(1, (1 << 20) // max(1, matrix.shape[1]))
    rows = range(0, matrix.shape[0], step)
    left = math.fsum(square(matrix[i : i + step] - b[i : i + step] @ a) for i in rows)
    return Pair(a, b, values, math.sqrt(total), math.sqrt(left / total))
