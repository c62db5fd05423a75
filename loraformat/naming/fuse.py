"""Several updates as one of the tensor that their parameters are fused into: q, k and v, a gate and its input.

Exact or refused. Pairs that share their A keep their rank: B is put together of rows. Others stand side by side, A under
A and B block by block, so that the ranks add up. Rows that no update changes are zero in B.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.errors import fault
from loraformat.naming.cut import out_axis, resized, run_of
from loraformat.parts import ORDER, Delta, Loha, Lora, Magnitude, Part, Replace, Rows
from loraformat.pieced import bits, pieced
from loraformat.updates import Update

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Indices = npt.NDArray[np.intp]
    Placed = Sequence[tuple[Indices, Any]]

__all__ = ["fuse"]

_FOLD = "--fold-scale multiplies it into the factors"


def fuse(pieces: Sequence[tuple[Indices, Update]], total: int, spec: str | None = None) -> Update:
    """The update of a tensor of ``total`` out rows, of which each piece changes those that stand beside it.

    Args:
        pieces: rows, in the piece's own order, and the update of the tensor that holds only them; no row in two.
        spec: how the matrix lies in the tensor, where the pieces are unplaced and a part speaks of its axes.

    Raises:
        LoraFormatError: LF-612 what the pieces are has no exact form as one.
    """
    covered = sum(len(rows) for rows, _ in pieces) == total
    parts = []
    for kind in ORDER:
        held = [(rows, update[kind]) for rows, update in pieces if kind in update]
        if not held:
            continue
        full = covered and len(held) == len(pieces)
        if kind in ("magnitude", "replace") and not full:
            what = f"{kind} says what becomes of whole rows, and says it of some of the fused tensor's only"
            raise fault("LF-612", what, fix=f"--drop {kind}, or train all of them")
        parts.append(_fused(held, total, pieces[0][1], spec, full))
    first = pieces[0][1]
    place = None if first.placement is None else resized(first.placement, total)
    ops = {update.op for _, update in pieces}
    return Update(tuple(parts), place, ops.pop() if len(ops) == 1 else None, first.assumed)


def _fused(held: Placed, total: int, first: Update, spec: str | None, full: bool) -> Part:
    part = held[0][1]
    match part:
        case Lora():
            return _pairs(held, total)
        case Loha():
            return _hadamard(held, total)
        case Delta():
            alpha = _common(held)
            axis = 0 if part.delta.ndim == 1 else -2
            return replace(part, delta=_put([(r, p.delta) for r, p in held], total, axis), **alpha)
        case Magnitude() if part.magnitude_axes is None:
            return replace(part, magnitude=_put([(r, p.magnitude) for r, p in held], total, -1))
        case Replace():
            axis = out_axis(first, spec, part.replace.ndim)
            return replace(part, replace=_put([(r, p.replace) for r, p in held], total, axis))
        case Rows():
            return _trained(held, total, out_axis(first, spec, part.values.ndim), full)
    raise fault(
        "LF-612", f"{part.kind} parts of several tensors are none of one", fix="--to-lora R makes pairs of them"
    )


def _pairs(held: Placed, total: int) -> Lora:
    """One A where all share it, else the ranks one after the other."""
    parts = [part for _, part in held]
    first: Lora = parts[0]
    if any((part.mid is None) != (first.mid is None) for part in parts):
        raise fault("LF-612", "a pair around a core and one without are none together", fix="--to-lora R")
    if all(_same(p.lora_A, first.lora_A) and _same(p.mid, first.mid) and p.scale == first.scale for p in parts):
        return replace(first, lora_B=_put([(rows, p.lora_B) for rows, p in held], total, -2))
    if first.mid is not None:
        raise fault("LF-612", "pairs around different cores are none together", fix="--to-lora R")
    alpha = _common(held, "factor")
    if len(shapes := {p.lora_A.shape[:-2] + p.lora_A.shape[-1:] for p in parts}) > 1:
        raise fault(
            "LF-606", f"what is fused here has inputs of different sizes: {', '.join(map(str, sorted(shapes)))}"
        )
    batch = (slice(None),) * (first.lora_A.ndim - 2)
    starts = list(itertools.accumulate((p.r for p in parts), initial=0))
    columns = [slice(start, stop) for start, stop in itertools.pairwise(starts)]
    a = pieced(
        (*first.lora_A.shape[:-2], starts[-1], first.lora_A.shape[-1]),
        [((*batch, ranks), p.lora_A) for ranks, p in zip(columns, parts, strict=True)],
    )
    b = pieced(
        (*first.lora_B.shape[:-2], total, starts[-1]),
        [((*batch, run_of(rows), ranks), p.lora_B) for ranks, (rows, p) in zip(columns, held, strict=True)],
    )
    return Lora(a, b, **alpha)


def _hadamard(held: Placed, total: int) -> Loha:
    first: Loha = held[0][1]
    shared = ("hada_w1_b", "hada_w2_b", "t1", "t2")
    if not all(_same(getattr(p, role), getattr(first, role)) for _, p in held for role in shared):
        raise fault("LF-612", "Hadamard products with different factors are none together", fix="--to-lora R")
    alpha = _common(held)
    axis = 0 if first.t1 is None else 1
    w1, w2 = (_put([(rows, getattr(p, role)) for rows, p in held], total, axis) for role in ("hada_w1_a", "hada_w2_a"))
    return replace(first, hada_w1_a=w1, hada_w2_a=w2, **alpha)


def _trained(held: Placed, total: int, axis: int, full: bool) -> Rows:
    first: Rows = held[0][1]
    if first.axis == axis:
        found = sorted((int(rows[old]), p, n) for rows, p in held for n, old in enumerate(p.indices))
        values = [p.values.take([n], axis) for _, p, n in found]
        return Rows(np.concatenate(_alike(values), axis), np.array([i for i, _, _ in found], np.int64), axis)
    if not full or not all(_same(p.indices, first.indices) for _, p in held):
        raise fault("LF-612", "different rows were trained in what is fused here", fix="--drop rows")
    return replace(first, values=_put([(rows, p.values) for rows, p in held], total, axis))


def _common(held: Placed, rule: str | None = None) -> dict[str, Any]:
    """alpha and rule of all of them, as stated where all state the same, else as their one factor."""
    parts = [part for _, part in held]
    said = {(p.alpha, p.scale_rule, p.r) for p in parts}
    if len(said) == 1 and rule is None:
        return {"alpha": parts[0].alpha, "scale_rule": parts[0].scale_rule}
    scales = sorted({p.scale for p in parts})
    if len(scales) > 1:
        raise fault("LF-612", f"what is fused here has different scales: {', '.join(map(str, scales))}", fix=_FOLD)
    return {"alpha": scales[0], "scale_rule": "factor"}


def _put(pieces: Sequence[tuple[Indices, Array]], total: int, axis: int) -> Array:
    """A tensor with ``total`` rows along ``axis``, zero where no piece has any."""
    first = pieces[0][1]
    axis %= first.ndim
    if len({(*b.shape[:axis], *b.shape[axis + 1 :]) for _, b in pieces}) > 1:
        sizes = ", ".join(str(list(b.shape)) for _, b in pieces)
        raise fault("LF-606", f"what is fused here does not fit together: {sizes}")
    before = (slice(None),) * axis
    shape = (*first.shape[:axis], total, *first.shape[axis + 1 :])
    return pieced(shape, [((*before, run_of(rows)), block) for rows, block in pieces])


def _alike(tensors: Sequence[Array]) -> list[Array]:
    """All in one dtype that holds each exactly."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) == 1:
        return list(tensors)
    wide = np.float64 if np.dtype(np.float64) in dtypes else np.float32
    return [t.astype(wide) for t in tensors]


def _same(one: Array | None, other: Array | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or (one.dtype == other.dtype and np.array_equal(bits(one), bits(other)))
