"""Valid vectors of loha and lokr, of Tucker cores, and of the sum of several kinds."""

from __future__ import annotations

import numpy as np
from vector import Array, Part, Vector, dense, einsum, lora, place, valid


def _loha(*factors: Array, r: int, t1: Array | None = None, t2: Array | None = None) -> Part:
    roles = dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), factors, strict=True))
    cores = {} if t1 is None else {"t1": t1, "t2": t2}
    return {"kind": "loha", "r": r, "alpha": 6, "scale_rule": "alpha/r", **roles, **cores}


@valid()
def loha(v: Vector) -> None:
    """The Hadamard product of two products."""
    factors = v.numbers(5, 4), v.numbers(4, 7), v.numbers(5, 4), v.numbers(4, 7)
    v.target("w", _loha(*factors, r=4), **place([5, 7], out=[0], in_=[1]))
    matrix = 1.5 * einsum("or,ri,os,si->oi", *factors)
    v.adds("w", matrix, matrix)


@valid("LF-308", "LF-309")
def loha_two_ranks(v: Vector) -> None:
    """The second product of a loha may have another rank; r is that of the first."""
    factors = v.numbers(5, 4), v.numbers(4, 7), v.numbers(5, 2), v.numbers(2, 7)
    v.target("w", _loha(*factors, r=4), **place([5, 7], out=[0], in_=[1]))
    matrix = 1.5 * einsum("or,ri,os,si->oi", *factors)
    v.adds("w", matrix, matrix)


@valid()
def loha_tucker(v: Vector) -> None:
    """Hadamard factors around two cores: a [r, out], b [r, channels], t [r, r, kh, kw]."""
    a1, b1, a2, b2 = v.numbers(4, 7), v.numbers(4, 2), v.numbers(4, 7), v.numbers(4, 2)
    t1, t2 = v.numbers(4, 4, 3, 5), v.numbers(4, 4, 3, 5)
    part = _loha(a1, b1, a2, b2, r=4, t1=t1, t2=t2)
    v.target("conv.weight", part, **place([7, 2, 3, 5], out=[0], in_=[1, 2, 3]))
    first, second = (einsum("mo,mnyx,ni->oiyx", a, t, b) for a, t, b in ((a1, t1, b1), (a2, t2, b2)))
    v.adds("conv.weight", 1.5 * (first * second).reshape(7, 30), 1.5 * first * second)


@valid("LF-303", "LF-307")
def lokr(v: Vector) -> None:
    """The Kronecker product, each side whole or a product; r is stated or the rule has none."""
    w1, a1, b1 = v.numbers(2, 3), v.numbers(2, 4), v.numbers(4, 3)
    w2, a2, b2 = v.numbers(5, 7), v.numbers(5, 6), v.numbers(6, 7)
    first, second = einsum("or,ri->oi", a1, b1), einsum("or,ri->oi", a2, b2)
    by_rank = {"kind": "lokr", "alpha": 9, "scale_rule": "alpha/r"}
    for key, part, scale, left, right in (
        ("whole", {"kind": "lokr", "alpha": 0.75, "scale_rule": "factor", "lokr_w1": w1, "lokr_w2": w2}, 0.75, w1, w2),
        ("whole_r", by_rank | {"r": 12, "lokr_w1": w1, "lokr_w2": w2}, 0.75, w1, w2),
        ("w2_product", by_rank | {"r": 6, "lokr_w1": w1, "lokr_w2_a": a2, "lokr_w2_b": b2}, 1.5, w1, second),
        ("w1_product", by_rank | {"r": 4, "lokr_w1_a": a1, "lokr_w1_b": b1, "lokr_w2": w2}, 2.25, first, w2),
        (
            "products",
            by_rank | {"r": 6, "lokr_w1_a": a1, "lokr_w1_b": b1, "lokr_w2_a": a2, "lokr_w2_b": b2},
            1.5,
            first,
            second,
        ),
    ):
        v.target(key, part, **place([10, 21], out=[0], in_=[1]))
        matrix = scale * einsum("ab,cd->acbd", left, right).reshape(10, 21)
        v.adds(key, matrix, matrix)


@valid()
def lokr_conv(v: Vector) -> None:
    """The Kronecker product for a convolution: w2 whole, a product, or around a core."""
    w1, w2 = v.numbers(2, 3), v.numbers(5, 4, 3, 2)
    a2, b2 = v.numbers(5, 6), v.numbers(6, 4 * 3 * 2)
    a, b, t2 = v.numbers(6, 5), v.numbers(6, 4), v.numbers(6, 6, 3, 2)
    shared = {"kind": "lokr", "alpha": 1.5, "scale_rule": "factor", "lokr_w1": w1}
    for key, roles, right in (
        ("whole", {"lokr_w2": w2}, w2.astype(np.float64)),
        ("product", {"lokr_w2_a": a2, "lokr_w2_b": b2}, einsum("or,riyx->oiyx", a2, b2.reshape(6, 4, 3, 2))),
        ("core", {"lokr_w2_a": a, "lokr_w2_b": b, "t2": t2}, einsum("mo,mnyx,ni->oiyx", a, t2, b)),
    ):
        v.target(key, shared | roles, **place([10, 12, 3, 2], out=[0], in_=[1, 2, 3]))
        delta = 1.5 * einsum("ab,cdyx->acbdyx", w1, right).reshape(10, 12, 3, 2)
        v.adds(key, delta.reshape(10, 72), delta)


@valid()
def sum_of_kinds(v: Vector) -> None:
    """Additive parts of one target are summed, each with its own scale."""
    A, B, D, w1, w2 = v.numbers(3, 6), v.numbers(4, 3), v.numbers(4, 6), v.numbers(2, 2), v.numbers(2, 3)
    kronecker = {"kind": "lokr", "alpha": -0.5, "scale_rule": "factor", "lokr_w1": w1, "lokr_w2": w2}
    v.target("w", lora(A, B, 6), kronecker, dense(D, 0.25), **place([6, 4], out=[1], in_=[0]))
    matrix = 2 * einsum("or,ri->oi", B, A) - 0.5 * einsum("ab,cd->acbd", w1, w2).reshape(4, 6) + 0.25 * D
    v.adds("w", matrix, matrix.T)


@valid("LF-309")
def one_kernel_axis(v: Vector) -> None:
    """Cores of a convolution over one axis [s, r, taps], whose two ranks differ: lora, loha and lokr."""
    axes = place([6, 2, 3], out=[0], in_=[1, 2])
    a, b, mid = v.numbers(4, 2), v.numbers(6, 5), v.numbers(5, 4, 3)
    v.target("lora", lora(a, b, 6, mid=mid), **axes)
    delta = 1.5 * einsum("om,mnx,ni->oix", b, mid, a)
    v.adds("lora", delta.reshape(6, 6), delta)
    a1, b1, t1, a2, b2, t2 = (v.numbers(*shape) for shape in ((5, 6), (4, 2), (5, 4, 3), (2, 6), (3, 2), (2, 3, 3)))
    v.target("loha", _loha(a1, b1, a2, b2, r=4, t1=t1, t2=t2), **axes)
    delta = 1.5 * einsum("mo,mnx,ni->oix", a1, t1, b1) * einsum("mo,mnx,ni->oix", a2, t2, b2)
    v.adds("loha", delta.reshape(6, 6), delta)
    w1, a, b, t2 = v.numbers(2, 2), v.numbers(5, 3), v.numbers(4, 1), v.numbers(5, 4, 3)
    roles = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "t2": t2}
    v.target("lokr", {"kind": "lokr", "alpha": 1.5, "scale_rule": "factor", **roles}, **axes)
    delta = 1.5 * einsum("ab,cdx->acbdx", w1, einsum("mo,mnx,ni->oix", a, t2, b)).reshape(6, 2, 3)
    v.adds("lokr", delta.reshape(6, 6), delta)
