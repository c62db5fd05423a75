"""Some out rows of an update, or another order of them: what becomes of it in a tensor that has only these.

Exact for every part, or refused: rows of ΔW are rows of B. What belongs to whole rows (a magnitude, replaced values)
goes with them; a norm over all rows has no part for some of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.axes import Placement
from loraformat.errors import fault
from loraformat.parts import Delta, Loha, Lokr, Lora, Magnitude, Part, Replace, Rows
from loraformat.pieced import bits, pieced

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.updates import Update

    Array = npt.NDArray[Any]
    Indices = npt.NDArray[np.intp]

__all__ = ["cut", "out_axis", "out_size", "resized", "run_of"]


def cut(update: Update, rows: Indices, spec: str | None = None) -> Update:
    """The update of the tensor that holds rows ``rows`` of this one's out side, in that order.

    Args:
        rows: [n], each at most once.
        spec: how the matrix lies in the tensor, where the update is unplaced and a part speaks of the tensor's axes.

    Raises:
        LoraFormatError: LF-604 a part needs the axes and nobody states them; LF-612 no exact form for these rows.
    """
    size = out_size(update, spec)
    if len(rows) == size and np.array_equal(rows, np.arange(size)):
        return update
    parts = tuple(_cut(part, rows, update, spec, size) for part in update.parts)
    place = None if update.placement is None else resized(update.placement, len(rows))
    return replace(update, parts=parts, placement=place, base_sha256=None, sketch=None)


def out_size(update: Update, spec: str | None = None) -> int:
    """How many out rows the update's matrix has."""
    if (shape := update.matrix_shape()) is not None:
        return shape[-2]
    if update.placement is not None:
        return update.placement.matrix_shape[-2]
    for part in update.parts:
        match part:
            case Magnitude() if part.magnitude_axes is None:
                return int(part.magnitude.shape[-1])
            case Replace():
                return int(part.replace.shape[out_axis(update, spec, part.replace.ndim)])
            case Rows() if (axis := out_axis(update, spec, part.values.ndim)) != part.axis:
                return int(part.values.shape[axis])
    raise fault("LF-604", "nothing says how many rows the tensor has", fix="bind it to its base first")


def out_axis(update: Update, spec: str | None, ndim: int) -> int:
    """The one axis of the tensor that is out; LF-604 where nothing says it, LF-612 where there are several."""
    if ndim == 1:
        return 0
    if update.placement is not None:
        found = update.placement.out
    elif spec is not None:
        found = Placement.of((1,) * ndim, spec).out
    else:
        raise fault("LF-604", "nothing says which axis of the tensor is out", fix="bind it to its base first")
    if len(found) != 1:
        raise fault("LF-612", f"out is {len(found)} axes of the tensor: its rows cannot be told apart here")
    return found[0]


def resized(place: Placement, size: int) -> Placement:
    """The placement of a tensor that differs in the number of its out rows."""
    if len(place.out) != 1:
        raise fault("LF-612", f"out is {len(place.out)} axes of the tensor: its rows cannot be told apart here")
    axis = place.out[0]
    return replace(place, shape=(*place.shape[:axis], size, *place.shape[axis + 1 :]))


def _cut(part: Part, rows: Indices, update: Update, spec: str | None, size: int) -> Part:
    match part:
        case Lora():
            return _pair(part, rows)
        case Loha():
            axis = 0 if part.t1 is None else 1
            return replace(
                part, hada_w1_a=_taken(part.hada_w1_a, rows, axis), hada_w2_a=_taken(part.hada_w2_a, rows, axis)
            )
        case Lokr():
            return _kronecker(part, rows)
        case Delta():
            return replace(part, delta=_taken(part.delta, rows, 0 if part.delta.ndim == 1 else -2))
        case Magnitude():
            return _magnitude(part, rows, update, spec, size)
        case Replace():
            return replace(part, replace=_taken(part.replace, rows, out_axis(update, spec, part.replace.ndim)))
        case Rows():
            return _rows(part, rows, out_axis(update, spec, part.values.ndim))


def run_of(rows: Indices) -> slice | Indices:
    """The same rows as a slice where each follows the one before it: what is taken by it is a view."""
    start = int(rows[0]) if len(rows) else 0
    return slice(start, start + len(rows)) if np.array_equal(rows, np.arange(start, start + len(rows))) else rows


def _taken(tensor: Array, rows: Indices, axis: int) -> Array:
    """``tensor.take(rows, axis)``: a view where the rows follow each other, and made where it is read where they are all."""
    run, before = run_of(rows), (slice(None),) * (axis % tensor.ndim)
    if isinstance(run, slice) and run.stop <= tensor.shape[axis]:
        taken: Array = tensor[(*before, run)]
        return taken
    if len(rows) == tensor.shape[axis]:
        return pieced(tensor.shape, [((*before, np.argsort(rows)), tensor)])
    return tensor.take(rows, axis)


def _pair(part: Lora, rows: Indices) -> Lora:
    """Rows of B; of one that is block-diagonal with the ranks of their own block, which is the pair that was fused."""
    b = _taken(part.lora_B, rows, -2)
    ranks = _own_ranks(part.lora_B, b, rows) if part.mid is None else None
    if ranks is None:
        return replace(part, lora_B=b)
    return Lora(part.lora_A[..., ranks, :], b[..., ranks], part.scale, "factor")


def _own_ranks(whole: Array, b: Array, rows: Indices) -> slice | Indices | None:
    """The columns that are zero in all rows but these; None where they share one with others, or have none.

    A column that is zero in all of them belongs with the one before it.
    """
    if len(rows) == whole.shape[-2] or _used(b[..., :1, :]).all():  # dense, as nearly every B: its first row says so
        return None
    own, others = _used(b), _used_but(whole, rows)
    if not own.any() or not others.any() or (own & others).any():
        return None
    used = np.flatnonzero(own | others)
    owners = used[np.maximum(0, np.searchsorted(used, np.arange(len(own)), "right") - 1)]
    return run_of(np.flatnonzero(own[owners]))


def _used_but(whole: Array, rows: Indices) -> npt.NDArray[np.bool_]:
    """The same of all rows but these."""
    run = run_of(rows)
    if isinstance(run, slice):  # of views: B may be large
        return _used(whole[..., : run.start, :]) | _used(whole[..., run.stop :, :])
    return _used(np.delete(whole, rows, -2))


def _used(b: Array) -> npt.NDArray[np.bool_]:
    """[r]: whether a column of B has a value that is not zero, of either sign."""
    return np.asarray(np.bitwise_or.reduce(bits(b), axis=tuple(range(b.ndim - 1))) << 1, np.bool_)


def _kronecker(part: Lokr, rows: Indices) -> Lokr:
    """Whole blocks of kron(w1, w2) are rows of w1."""
    inner = part.sides()[1][0]
    blocks = rows[::inner] // inner
    if len(rows) % inner or not np.array_equal((blocks[:, None] * inner + np.arange(inner)).reshape(-1), rows):
        what = f"a Kronecker product in blocks of {inner} rows does not hold these rows as such a product"
        raise fault("LF-612", what, fix="--to-lora R makes a pair of it, and prints the residual")
    if part.lokr_w1 is not None:
        return replace(part, lokr_w1=part.lokr_w1.take(blocks, 0))
    assert part.lokr_w1_a is not None
    return replace(part, lokr_w1_a=part.lokr_w1_a.take(blocks, 0))


def _magnitude(part: Magnitude, rows: Indices, update: Update, spec: str | None, size: int) -> Magnitude:
    if part.magnitude_axes is None:
        return replace(part, magnitude=part.magnitude.take(rows, -1))
    axis = out_axis(update, spec, len(update.placement.shape) if update.placement is not None else 0)
    if axis in part.magnitude_axes:
        return replace(part, magnitude=part.magnitude.take(rows, part.magnitude_axes.index(axis)))
    if len(rows) == size:  # another order of all rows: the norm over them is the same
        return part
    raise fault("LF-612", "the magnitude's norm runs over all out rows: some of them alone have none")


def _rows(part: Rows, rows: Indices, axis: int) -> Rows:
    if part.axis != axis:
        return replace(part, values=part.values.take(rows, axis))
    place = {int(old): new for new, old in enumerate(rows)}
    kept = sorted((place[int(old)], n) for n, old in enumerate(part.indices) if int(old) in place)
    if not kept:
        raise fault("LF-612", "none of the trained rows is among these")
    indices = np.array([new for new, _ in kept], np.int64)
    return replace(part, indices=indices, values=part.values.take([n for _, n in kept], axis))
