"""The two sides of a pair as orthonormal bases: what is left between them is a problem of the size of the rank.

Batch axes along which one factor is shared are taken together with the side that varies, as one tall matrix (B₁; B₂; …)·A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.algebra.lowrank import LowRank

    F64 = npt.NDArray[np.float64]

__all__ = ["Fold", "Side", "sides"]


class Fold:
    """A pair whose shared axes are taken together with the side that varies: (B₁; B₂; …)·A.

    Each batch axis stays, or goes to the out side (A is shared along it), or to the in side (B is).
    """

    def __init__(self, m: LowRank) -> None:
        sizes = list(zip(m.A.shape[:-2], m.B.shape[:-2], strict=True))
        self.out = [i for i, (a, b) in enumerate(sizes) if a == 1 < b]
        self.in_ = [i for i, (a, b) in enumerate(sizes) if b == 1 < a]
        self.A = _gathered(m.A, self.in_, -1)
        self.B = _gathered(m.B, self.out, -2)
        self.batch_A, self.batch_B = m.A.shape[:-2], m.B.shape[:-2]

    def left(self, u: F64) -> F64:
        """U of the fold as [*batch, out, k]."""
        return _scattered(u, self.batch_B, self.out, -2)

    def right(self, vt: F64) -> F64:
        """Vt of the fold as [*batch, k, in]."""
        return _scattered(vt, self.batch_A, self.in_, -1)


class Side(NamedTuple):
    """A tall matrix as basis · turn · small, basis · turn orthonormal; no basis where it is not taller than wide."""

    small: F64
    basis: F64 | None = None
    turn: F64 | None = None

    def whole(self, inner: F64) -> F64:
        """basis · turn · inner."""
        if self.basis is None:
            return inner
        found: F64 = np.matmul(self.basis, inner if self.turn is None else np.matmul(self.turn, inner))
        return found


def sides(fold: Fold) -> tuple[Side, Side]:
    """Of B and of Aᵀ: B·A = (basis·turn) · small · smallᵀ · (basis·turn)ᵀ."""
    return _side(fold.B), _side(fold.A.swapaxes(-1, -2))


def _side(tall: F64) -> Side:
    if tall.shape[-2] <= tall.shape[-1]:
        return Side(tall)
    return _twice(tall) or Side(*np.linalg.qr(tall)[::-1])


def _twice(tall: F64) -> Side | None:
    """QR by two Cholesky decompositions (Yamamoto et al. 2015, ETNA 44), a third of the time of Householder's.

    As exact while the condition is below 1e7: the first basis is then nearly orthonormal, and the second corrects it.
    None where it is not, as of factors that repeat each other.
    """
    try:
        first = np.linalg.cholesky(np.matmul(tall.swapaxes(-1, -2), tall)).swapaxes(-1, -2)
        basis = np.matmul(tall, np.linalg.inv(first))
        gram = np.matmul(basis.swapaxes(-1, -2), basis)
        if not np.abs(gram - np.eye(gram.shape[-1])).max() < 0.1:
            return None
        second = np.linalg.cholesky(gram).swapaxes(-1, -2)
    except np.linalg.LinAlgError:
        return None
    return Side(np.matmul(second, first), basis, np.asarray(np.linalg.inv(second), np.float64))


def _gathered(tensor: F64, axes: list[int], side: int) -> F64:
    """The batch ``axes`` moved into the axis ``side``; they stay with size 1."""
    if not axes:
        return tensor
    where = tensor.ndim + side
    moved = np.moveaxis(tensor, axes, range(where - len(axes), where))
    batch = [1 if i in axes else n for i, n in enumerate(tensor.shape[:-2])]
    rest = [-1, tensor.shape[-1]] if side == -2 else [tensor.shape[-2], -1]
    return moved.reshape([*batch, *rest])


def _scattered(tensor: F64, batch: tuple[int, ...], axes: list[int], side: int) -> F64:
    """What ``_gathered`` put into one axis, as the batch that it was."""
    if not axes:
        return tensor
    kept = [n for i, n in enumerate(batch) if i not in axes]
    sizes = [batch[i] for i in axes]
    rest = [*sizes, -1, tensor.shape[-1]] if side == -2 else [tensor.shape[-2], *sizes, -1]
    where = len(batch) + 2 + side
    return np.moveaxis(tensor.reshape([*kept, *rest]), range(where - len(axes), where), axes)
