"""Linear algebra on matrices of low rank, in their factors: norms, angles, singular values, the nearest of a rank.

A sum of pairs is one pair, its factors side by side: [B₁ B₂] · [A₁; A₂]. An orthogonal basis of each side (QR) leaves a
problem of the size of the rank, whose singular values are those of the whole. ΔW itself is never formed, and no digit
is lost on the way: where two pairs nearly cancel, what is left is right.

Everything is float64. Of a matrix M = B·A the singular values, ``norm`` and ``nearest`` are exact within
1e-15 · ‖B‖ · ‖A‖ · √rank, which is 1e-15 · ‖M‖ for well-conditioned factors (measured against a dense SVD in
``tests/test_lowrank.py``). float32 is only what the factors come in and go out as.

    one, other = lowrank(update), lowrank(another)
    cosine(one, other), norm(total([(1, one), (-1, other)]))        # how alike, how far apart
    found = svd(one)                                                # found.s: singular values
    found.cut(8), found.residual(8)                                 # the nearest of rank 8, and what it loses

Batch axes stand first, as in ``Lora``; a size of 1 is shared by the whole batch. A pair that shares a factor keeps
sharing it: ``svd`` takes the batch of such an axis together with the side that varies, as one tall matrix
(B₁; B₂; …)·A. Its nearest of a rank is the best of all that share that factor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from loraformat.errors import fault
from loraformat.parts import Delta, Loha, Lokr, Lora

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.parts import Additive
    from loraformat.updates import Update

    Array = npt.NDArray[Any]
    F64 = npt.NDArray[np.float64]

__all__ = ["SVD", "LowRank", "angles", "cosine", "inner", "lowrank", "norm", "svd", "total"]


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


def lowrank(update: Update) -> LowRank:
    """ΔW of the additive parts, in float64: scales are in B, Tucker cores in A.

    A Hadamard product of ranks r₁ and r₂ has rank r₁·r₂ and a Kronecker product that of its sides multiplied; both are
    exact in such factors. What has no factors, or more than the matrix has rows and columns, is its own factor beside
    a unit matrix. A vector [out] is a matrix [out, 1].

    Raises:
        LoraFormatError: LF-612 an update that adds nothing.
    """
    if not update.additive:
        raise fault("LF-612", f"a {update.kind} update adds nothing: it has no matrix")
    return total((part.scale, _factors(part)) for part in update.additive)


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
    left, right = _sides(_Fold(m))
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


def svd(m: LowRank, rank: int | None = None) -> SVD:
    """The singular value decomposition, at the cost of out·r² + in·r² + r³; every value, and ``rank`` vectors of each side."""
    fold = _Fold(m)
    left, right = _sides(fold)
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


class _Side(NamedTuple):
    """A tall matrix as basis · turn · small, basis · turn orthonormal; no basis where it is not taller than wide."""

    small: F64
    basis: F64 | None = None
    turn: F64 | None = None

    def whole(self, inner: F64) -> F64:
        if self.basis is None:
            return inner
        found: F64 = np.matmul(self.basis, inner if self.turn is None else np.matmul(self.turn, inner))
        return found


def _sides(fold: _Fold) -> tuple[_Side, _Side]:
    return _side(fold.B), _side(fold.A.swapaxes(-1, -2))


def _side(tall: F64) -> _Side:
    if tall.shape[-2] <= tall.shape[-1]:
        return _Side(tall)
    return _twice(tall) or _Side(*np.linalg.qr(tall)[::-1])


def _twice(tall: F64) -> _Side | None:
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
    return _Side(np.matmul(second, first), basis, np.asarray(np.linalg.inv(second), np.float64))


class _Fold:
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


def _beside(factors: list[F64], axis: int) -> F64:
    """Factors one after the other along their rank; one that shares what another does not is repeated."""
    batch = np.broadcast_shapes(*(factor.shape[:-2] for factor in factors))
    return np.concatenate([np.broadcast_to(f, (*batch, *f.shape[-2:])) for f in factors], axis=axis)


def _factors(part: Additive) -> LowRank:
    """The unscaled product of a part."""
    match part:
        case Lora(mid=None):
            return LowRank(_double(part.lora_A), _double(part.lora_B))
        case Lora():
            return LowRank(_around(part.mid, part.lora_A), _double(part.lora_B))
        case Loha():
            one, other = (_hada(part, n) for n in ("1", "2"))
            return _compact(LowRank(_rowwise(one.A, other.A), _columnwise(one.B, other.B)))
        case Lokr():
            one, other = (_kron_side(part, n) for n in ("1", "2"))
            return _compact(LowRank(_double(np.kron(one.A, other.A)), _double(np.kron(one.B, other.B))))
        case Delta():
            return _dense(_double(part.delta).reshape(part.matrix_shape()))


def _double(tensor: Array | None) -> F64:
    assert tensor is not None
    return np.asarray(tensor, np.float64)


def _around(core: Array | None, a: Array | None) -> F64:
    """Σ core[m, n, …] a[n, i] → [m, i·…]: see ``loraformat.products``."""
    whole: F64 = np.einsum("mn...,ni->mi...", _double(core), _double(a))
    return whole.reshape(whole.shape[0], -1)


def _hada(part: Loha, n: str) -> LowRank:
    a, b = _double(getattr(part, f"hada_w{n}_a")), _double(getattr(part, f"hada_w{n}_b"))
    core = part.t1 if n == "1" else part.t2
    return LowRank(b, a) if core is None else LowRank(_around(core, b), a.T)


def _kron_side(part: Lokr, n: str) -> LowRank:
    whole, a, b = (getattr(part, f"lokr_w{n}{end}") for end in ("", "_a", "_b"))
    if whole is not None:
        return _dense(_double(whole).reshape(whole.shape[0], -1))
    core = part.t2 if n == "2" else None
    return LowRank(_double(b), _double(a)) if core is None else LowRank(_around(core, b), _double(a).T)


def _rowwise(one: F64, other: F64) -> F64:
    """Rows multiplied each with each: the A of a Hadamard product (Khatri–Rao)."""
    return (one[:, None, :] * other[None, :, :]).reshape(-1, one.shape[-1])


def _columnwise(one: F64, other: F64) -> F64:
    return (one[:, :, None] * other[:, None, :]).reshape(one.shape[0], -1)


def _compact(m: LowRank) -> LowRank:
    """The same matrix, dense where its factors would be larger."""
    return m if m.rank < min(m.shape[-2:]) else _dense(m.matrix())


def _dense(matrix: F64) -> LowRank:
    """A matrix as its own factor, beside the smaller unit matrix."""
    out, in_ = matrix.shape[-2:]
    unit = np.broadcast_to(np.eye(min(out, in_)), (*matrix.shape[:-2], min(out, in_), min(out, in_)))
    return LowRank(matrix, unit) if out <= in_ else LowRank(unit, matrix)
