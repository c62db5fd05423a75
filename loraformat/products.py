"""The matrix of each additive kind. The only module that multiplies B and A.

All arithmetic is float32, rounded once by whoever stores the result: a float16 product of rank 64 is already
off by 2e-4 relative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.parts import Additive, Delta, Loha, Lokr, Lora

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.axes import Rows

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]

__all__ = ["product", "simplified", "single"]


def product(part: Additive, tile: Rows | None = None) -> F32:
    """The unscaled matrix of an additive part, float32 [*batch, out, in]; of a tile of the base, if given."""
    match part:
        case Lora():
            a, b = _pick(_tucker_A(part), tile, "in", -1), _pick(single(part.lora_B), tile, "out", -2)
            return single(np.matmul(b, a))
        case Loha():
            first = _around(part.hada_w1_a, part.hada_w1_b, part.t1, tile)
            return first * _around(part.hada_w2_a, part.hada_w2_b, part.t2, tile)
        case Lokr():
            return _kron(*_sides(part), tile)
        case Delta():
            return _cut(single(part.delta).reshape(part.matrix_shape()), tile)


def simplified(part: Additive) -> Additive:
    """The same product, by as few tensors as a tile of it can be computed from alone, in float32.

    Of a Hadamard product around cores that is the whole matrix.
    """
    match part:
        case Lora():
            a = _tucker_A(part)
            return Lora(a, single(part.lora_B), part.scale, "factor")
        case Loha(t1=None):
            a1, b1, a2, b2 = map(single, (part.hada_w1_a, part.hada_w1_b, part.hada_w2_a, part.hada_w2_b))
            return Loha(a1, b1, a2, b2, part.scale, "factor")
        case Loha():
            return Delta(product(part), part.scale, "factor")
        case Lokr():
            w1, w2 = _sides(part)
            return Lokr(part.scale, "factor", lokr_w1=w1, lokr_w2=w2)
        case Delta():
            return part


def single(tensor: Array) -> F32:
    """The tensor in float32."""
    return np.asarray(tensor, np.float32)


def _tucker_A(part: Lora) -> F32:  # noqa: N802
    a = single(part.lora_A)
    if part.mid is None:
        return a
    # LyCORIS 4.1.3 functional/general.py rebuild_tucker: ΔW[o, i, …] = Σ up[o, m] mid[m, n, …] down[n, i]
    core: F32 = np.einsum("mn...,ni->mi...", single(part.mid), a)
    return core.reshape(core.shape[0], -1)


def _around(a: Array | None, b: Array | None, core: Array | None, tile: Rows | None = None) -> F32:
    """``a @ b`` as a matrix, or the Tucker product around a core: Σ core[i, j, …] b[j, r] a[i, p] → [p, r·…]."""
    assert a is not None
    assert b is not None
    if core is None:
        columns = _pick(single(b).reshape(b.shape[0], -1), tile, "in", -1)
        return single(_pick(single(a), tile, "out", -2) @ columns)
    whole: F32 = np.einsum("ij...,jr,ip->pr...", single(core), single(b), single(a))
    return _cut(whole.reshape(whole.shape[0], -1), tile)


def _sides(part: Lokr) -> tuple[F32, F32]:
    """w1 and w2, each as a matrix."""
    w1 = single(part.lokr_w1) if part.lokr_w1 is not None else _around(part.lokr_w1_a, part.lokr_w1_b, None)
    w2 = single(part.lokr_w2) if part.lokr_w2 is not None else _around(part.lokr_w2_a, part.lokr_w2_b, part.t2)
    return w1, w2.reshape(w2.shape[0], -1)


def _kron(w1: F32, w2: F32, tile: Rows | None) -> F32:
    """The Kronecker product [(o₁, o₂), (i₁, i₂)], or its rows or columns of a tile."""
    out, in_ = (np.arange(m * n) for m, n in zip(w1.shape, w2.shape, strict=True))
    if tile is not None and tile.group == "in":
        one, two = np.divmod(in_[tile.index], w2.shape[1])
        return single(w1[:, None, one] * w2[None, :, two]).reshape(len(out), -1)
    one, two = np.divmod(out if tile is None else out[tile.index], w2.shape[0])
    return single(w1[one, :, None] * w2[two, None, :]).reshape(-1, len(in_))


def _pick(factor: F32, tile: Rows | None, side: str, axis: int) -> F32:
    """The slice of one factor that a tile needs: along its own side, or along a batch axis that it does not share."""
    if tile is None:
        return factor
    if tile.group == side:
        return _along(factor, tile.index, axis)
    if tile.group == "batch" and factor.shape[tile.position] != 1:
        return _along(factor, tile.index, tile.position)
    return factor


def _cut(matrix: F32, tile: Rows | None) -> F32:
    """The tile's part of a whole matrix."""
    if tile is None:
        return matrix
    if tile.group == "batch":
        return _along(matrix, tile.index, tile.position) if matrix.shape[tile.position] != 1 else matrix
    return _along(matrix, tile.index, -2 if tile.group == "out" else -1)


def _along(tensor: F32, index: slice | npt.NDArray[np.intp], axis: int) -> F32:
    selector: list[Any] = [slice(None)] * tensor.ndim
    selector[axis] = index
    return single(tensor[tuple(selector)])
