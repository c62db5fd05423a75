"""Singular values and vectors of a pair, the nearest of a rank, and the angles between what two pairs write or read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from loraformat.algebra.lowrank import LowRank
from loraformat.algebra.sides import Fold, sides

if TYPE_CHECKING:
    import numpy.typing as npt

    F64 = npt.NDArray[np.float64]

__all__ = ["SVD", "angles", "svd"]


class SVD(NamedTuple):
    """M = U · diag(s) · Vt, with as many singular values as M can have: min(r, out, in).

    ``U`` [*batch, out, k], ``s`` [*rest, k] descending, ``Vt`` [*batch, k, in]. An axis of the batch along which a factor
    is shared has size 1 in that factor and in ``s``: its U, over the whole batch, is what is orthonormal.
    """

    U: F64
    s: F64
    Vt: F64

    def cut(self, rank: int) -> LowRank:
        """The nearest of that rank (Eckart–Young), √s on either side; fewer where there are no more."""
        root = np.sqrt(self.s[..., :rank])
        return LowRank(root[..., :, None] * self.Vt[..., :rank, :], self.U[..., :rank] * root[..., None, :])

    def residual(self, rank: int) -> float:
        """‖M − cut(rank)‖ / ‖M‖; 0 of a matrix that is zero."""
        whole, lost = (float(np.linalg.norm(s)) for s in (self.s, self.s[..., rank:]))
        return lost / whole if whole else 0.0

    @property
    def significant(self) -> int:
        """How many singular values are more than the rounding of float64: the rank of M."""
        floor = 4 * np.finfo(np.float64).eps * max(self.U.shape[-2], self.Vt.shape[-1]) * self.s.max(initial=0.0)
        return int((self.s > floor).any(axis=tuple(range(self.s.ndim - 1))).sum())


def svd(m: LowRank, rank: int | None = None) -> SVD:
    """The singular value decomposition, at the cost of out·r² + in·r² + r³; every value, and ``rank`` vectors of each side."""
    fold = Fold(m)
    left, right = sides(fold)
    u, s, vt = np.linalg.svd(left.small @ right.small.swapaxes(-1, -2), full_matrices=False)
    v = right.whole(vt[..., :rank, :].swapaxes(-1, -2)).swapaxes(-1, -2)
    return SVD(fold.left(left.whole(u[..., :rank])), s, fold.right(v))


def angles(m: LowRank, n: LowRank, side: Literal["out", "in"], rank: int | None = None) -> F64:
    """The principal angles between what M and N write (``out``: column spaces) or read (``in``: row spaces), ascending.

    Radians [*batch, min of the ranks]; of each space the first ``rank`` singular directions, default all that are not
    zero. Small angles are as exact as large ones: they are taken from the sine (Björck and Golub 1973). Shared
    factors are compared over the whole batch.
    """
    found = [svd(x) for x in (m, n)]
    ranks = [min(f.significant, rank or f.significant) for f in found]
    bases = [
        f.U[..., :k] if side == "out" else f.Vt[..., :k, :].swapaxes(-1, -2) for f, k in zip(found, ranks, strict=True)
    ]
    one, other = sorted(bases, key=lambda basis: basis.shape[-1], reverse=True)
    across = np.matmul(one.swapaxes(-1, -2), other)
    cosines = np.linalg.svd(across, compute_uv=False)
    sines = np.linalg.svd(other - np.matmul(one, across), compute_uv=False)[..., ::-1]
    sines = sines[..., : cosines.shape[-1]]
    small = cosines**2 > 0.5
    return np.where(small, np.arcsin(np.clip(sines, 0, 1)), np.arccos(np.clip(cosines, 0, 1)))
