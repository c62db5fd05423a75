"""Updates of parameters that another name space stacks in one tensor: layers of a scan, experts; and the way back.

Exact or refused. A pair of a stack has a batch axis in front of A and of B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement
from loraformat.errors import fault
from loraformat.parts import ORDER, Delta, Lora, Magnitude, Part, Replace
from loraformat.pieced import pieced
from loraformat.updates import Update

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Held = Sequence[tuple[int, Any]]

__all__ = ["stack", "unstack"]


def stack(pieces: Sequence[tuple[int, Update]], count: int, spec: str | None) -> Update:
    """The update of a tensor that stacks ``count`` of them.

    Args:
        pieces: position in the stack, and the update of the matrix there; zero elsewhere. Unplaced, or placed alike.
        spec: how the matrix lies in the stacked tensor: ``batch,in,out``.

    Raises:
        LoraFormatError: LF-604 nothing says where the batch axis is; LF-612 no exact form as one.
    """
    parts = []
    for kind in ORDER:
        held = [(i, update[kind]) for i, update in pieces if kind in update]
        if not held:
            continue
        if kind not in ("lora", "delta") and len(held) != count:
            what = f"{kind} parts of {len(held)} of {count} matrices are none of their stack"
            raise fault("LF-612", what, fix=f"--drop {kind}, or train all of them")
        parts.append(_stacked(held, count, spec))
    first = pieces[0][1]
    place = None if first.placement is None else _with_batch(first.placement, count, spec)
    return Update(tuple(parts), place, first.op, first.assumed)


def unstack(update: Update, index: int, count: int, spec: str | None) -> Update:
    """The update of the matrix at ``index`` of a stack of ``count``; its tensor has the other axes, in their order."""
    parts = tuple(_taken(part, index, count, spec, update.placement) for part in update.parts)
    place = update.placement
    if place is not None:
        place = place.without(_batch_axis(spec, place))
    return replace(update, parts=parts, placement=place, base_sha256=None, sketch=None)


def _stacked(held: Held, count: int, spec: str | None) -> Part:
    first = held[0][1]
    match first:
        case Lora():
            if any(p.mid is not None for _, p in held):
                raise fault("LF-612", "a stack holds no pairs around a core", fix="--to-lora R")
            if len({p.r for _, p in held}) > 1:
                raise fault("LF-612", "the pairs of a stack have one rank", fix="--pad-rank")
            a, b = (_put([(i, getattr(p, role)) for i, p in held], count, 0) for role in ("lora_A", "lora_B"))
            return Lora(a, b, **_common(held))
        case Delta():
            if first.delta.ndim == 1:
                raise fault("LF-612", "a stack of vectors has no matrix here", fix="--drop delta")
            return replace(first, delta=_put([(i, p.delta) for i, p in held], count, 0), **_common(held))
        case Magnitude() if first.magnitude_axes is None:
            return replace(first, magnitude=_put([(i, p.magnitude) for i, p in held], count, 0))
        case Replace():
            axis = _batch_axis(spec, None)
            return replace(first, replace=_put([(i, p.replace) for i, p in held], count, axis))
    raise fault("LF-612", f"{first.kind} parts of several tensors are none of their stack", fix="--to-lora R")


def _taken(part: Part, index: int, count: int, spec: str | None, place: Placement | None) -> Part:
    match part:
        case Lora():
            a, b = (_at(t, index, count, part.lora_A.ndim - 2) for t in (part.lora_A, part.lora_B))
            return replace(part, lora_A=a, lora_B=b)
        case Delta():
            return replace(part, delta=_at(part.delta, index, count, part.delta.ndim - 2))
        case Magnitude() if part.magnitude_axes is None:
            return replace(part, magnitude=_at(part.magnitude, index, count, part.magnitude.ndim - 1))
        case Replace():
            return replace(part, replace=part.replace.take(index, _batch_axis(spec, place)))
    raise fault("LF-612", f"a {part.kind} part is not taken out of a stack", fix=f"--drop {part.kind}")


def _at(tensor: Array, index: int, count: int, batch: int) -> Array:
    if batch != 1 or tensor.shape[0] not in (1, count):
        raise fault("LF-606", f"{list(tensor.shape)} is no stack of {count} matrices")
    taken: Array = tensor[index if tensor.shape[0] == count else 0]
    return taken


def _put(pieces: Sequence[tuple[int, Array]], count: int, axis: int) -> Array:
    shapes = {block.shape for _, block in pieces}
    if len(shapes) > 1:
        raise fault("LF-606", f"what is stacked here has different shapes: {', '.join(map(str, sorted(shapes)))}")
    (shape,) = shapes
    before = (slice(None),) * axis
    return pieced((*shape[:axis], count, *shape[axis:]), [((*before, i), block) for i, block in pieces])


def _common(held: Held) -> dict[str, Any]:
    said = {(p.alpha, p.scale_rule) for _, p in held}
    if len(said) == 1:
        return {"alpha": held[0][1].alpha, "scale_rule": held[0][1].scale_rule}
    scales = {p.scale for _, p in held}
    if len(scales) > 1:
        raise fault("LF-612", "what is stacked here has different scales", fix="--fold-scale multiplies it into them")
    return {"alpha": scales.pop(), "scale_rule": "factor"}


def _batch_axis(spec: str | None, place: Placement | None) -> int:
    """The one batch axis of a stacked tensor."""
    if place is not None and len(place.batch) == 1:
        return place.batch[0]
    words = [word.strip().rstrip("0123456789") for word in (spec or "").split(",")]
    if words.count("batch") != 1:
        raise fault(
            "LF-604", "nothing says which axis of the tensor counts the matrices", fix="bind it to its base first"
        )
    return words.index("batch")


def _with_batch(place: Placement, count: int, spec: str | None) -> Placement:
    axis = _batch_axis(spec, None)
    upper = [tuple(a + (a >= axis) for a in axes) for axes in (place.out, place.in_)]
    return Placement((*place.shape[:axis], count, *place.shape[axis:]), upper[0], upper[1], (axis,))
