"""Linear algebra on matrices of low rank, in their factors: norms, angles, singular values, the nearest of a rank.

A sum of pairs is one pair, its factors side by side: [B₁ B₂] · [A₁; A₂]. An orthogonal basis of each side (QR) leaves a
problem of the size of the rank, whose singular values are those of the whole. ΔW itself is never formed, and no digit
is lost on the way: where two pairs nearly cancel, what is left is right.

Everything is float64. Of a matrix M = B·A the singular values, ``norm`` and ``nearest`` are exact within
1e-15 · ‖B‖ · ‖A‖ · √rank, which is 1e-15 · ‖M‖ for well-conditioned factors (measured against a dense SVD in
``tests/test_lowrank.py``). float32 is only what the factors come in and go out as.

    one, other = lowrank(update), lowrank(another)                  # algebra.factors
    cosine(one, other), norm(total([(1, one), (-1, other)]))        # how alike, how far apart
    found = svd(one)                                                # algebra.svd; found.s: singular values
    found.cut(8), found.residual(8)                                 # the nearest of rank 8, and what it loses

Batch axes stand first, as in ``Lora``; a size of 1 is shared by the whole batch. A pair that shares a factor keeps
sharing it: ``svd`` takes the batch of such an axis together with the side that varies, as one tall matrix
(B₁; B₂; …)·A. Its nearest of a rank is the best of all that share that factor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.algebra.sides import Fold, sides
from loraformat.parts import Lora

if TYPE_CHECKING:
    import numpy.typing as npt

    F64 = npt.NDArray[np.float64]

__all__ = ["LowRank", "cosine", "inner", "norm", "total"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix B @ A, kept as its factors; every batch size is that of the matrix, or 1 where it is shared.

    Attributes:
        A: float64 [*batch, r, in].
        B: float64 [*batch, out, r].
    """

    A: F64
    B: F64

    @property
    def rank(self) -> int:
        """The inner dimension r: an upper bound of the rank, and what the algebra costs."""
        return int(self.A.shape[-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """(*batch, out, in) of the matrix."""
        batch = np.broadcast_shapes(self.A.shape[:-2], self.B.shape[:-2])
        return (*batch, self.B.shape[-2], self.A.shape[-1])

    def times(self, weight: float) -> LowRank:
        """weight · M."""
        return LowRank(self.A, self.B * weight)

    def matrix(self) -> F64:
        """M itself, float64 [*batch, out, in]: for what has no form in the factors."""
        whole: F64 = np.matmul(self.B, self.A)
        return whole

    def pair(self, dtype: Any = np.float32) -> Lora:
        """A ``lora`` part of scale 1 that stores the factors in ``dtype``."""
        return Lora(self.A.astype(dtype), self.B.astype(dtype), 1.0, "factor")


def total(terms: Iterable[tuple[float, LowRank]]) -> LowRank:
    """Σ weight · M: factors side by side, B with its weight; ranks add up. All matrices have one shape."""
    weighted = [(weight, m) for weight, m in terms]
    if len(weighted) == 1:
        (weight, m) = weighted[0]
        return m if weight == 1.0 else m.times(weight)
    b = _beside([m.B * weight for weight, m in weighted], axis=-1)
    return LowRank(_beside([m.A for _, m in weighted], axis=-2), b)


def norm(m: LowRank) -> float:
    """‖M‖ (Frobenius)."""
    left, right = sides(Fold(m))
    return float(np.linalg.norm(left.small @ right.small.swapaxes(-1, -2)))


def inner(m: LowRank, n: LowRank) -> float:
    """⟨M, N⟩ = Σ Mᵢⱼ Nᵢⱼ. Absolute error 1e-15 · the product of the four factors' norms."""
    left = np.matmul(m.B.swapaxes(-1, -2), n.B)
    right = np.matmul(m.A, n.A.swapaxes(-1, -2))
    shape = np.broadcast_shapes(m.shape[:-2], n.shape[:-2])
    return float(np.sum(np.broadcast_to(left * right, (*shape, m.rank, n.rank))))


def cosine(m: LowRank, n: LowRank) -> float:
    """⟨M, N⟩ / (‖M‖·‖N‖), within [−1, 1]; 0 where one of them is zero."""
    length = norm(m) * norm(n)
    return float(np.clip(inner(m, n) / length, -1.0, 1.0)) if length else 0.0


def _beside(factors: list[F64], axis: int) -> F64:
    """Factors one after the other along their rank; one that shares what another does not is repeated."""
    batch = np.broadcast_shapes(*(factor.shape[:-2] for factor in factors))
    return np.concatenate([np.broadcast_to(f, (*batch, *f.shape[-2:])) for f in factors], axis=axis)
