"""An update as a matrix of low rank: the factors of every kind of part, exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.algebra.lowrank import LowRank, total
from loraformat.errors import fault
from loraformat.parts import Delta, Loha, Lokr, Lora

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.parts import Additive
    from loraformat.updates import Update

    Array = npt.NDArray[Any]
    F64 = npt.NDArray[np.float64]

__all__ = ["lowrank"]


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
