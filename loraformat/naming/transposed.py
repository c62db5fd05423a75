"""The update of a tensor that holds the transpose of its parameter: in goes for out.

(B·A)ᵀ = Aᵀ·Bᵀ: the factors change places. Exact or refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement
from loraformat.errors import fault
from loraformat.parts import Delta, Loha, Lora, Magnitude, Part, Replace, Rows

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["transposed"]


def transposed(update: Update) -> Update:
    """The update of Wᵀ; of a stack that of each matrix.

    Raises:
        LoraFormatError: LF-604 a part speaks of the tensor's axes, and nobody states them; LF-612 no exact form.
    """
    place = update.placement
    if place is not None and (len(place.out), len(place.in_)) != (1, 1):
        raise fault("LF-612", f"a tensor [{place.spec}] has no transpose: one axis is out, and one in")
    parts = tuple(_transposed(part, place) for part in update.parts)
    place = None if place is None else replace(place, shape=_swapped(place.shape, place))
    return replace(update, parts=parts, placement=place, base_sha256=None, sketch=None)


def _transposed(part: Part, place: Placement | None) -> Part:
    match part:
        case Lora(mid=None):
            return replace(part, lora_A=_turn(part.lora_B), lora_B=_turn(part.lora_A))
        case Loha(t1=None):
            part = replace(part, hada_w1_a=part.hada_w1_b.T, hada_w1_b=part.hada_w1_a.T)
            return replace(part, hada_w2_a=part.hada_w2_b.T, hada_w2_b=part.hada_w2_a.T)
        case Delta() if part.delta.ndim > 1:
            return replace(part, delta=_turn(part.delta))
        case Replace() | Rows() | Magnitude():
            return _laid(part, _known(place))
    raise fault("LF-612", f"a {part.kind} part has no transpose of its kind", fix="--to-lora R makes pairs of it")


def _laid(part: Replace | Rows | Magnitude, place: Placement) -> Part:
    """A part that speaks of the tensor's axes, of which the two change places."""
    ends = {place.out[0]: place.in_[0], place.in_[0]: place.out[0]}
    match part:
        case Replace():
            return replace(part, replace=part.replace.swapaxes(*ends))
        case Rows():
            return replace(part, values=part.values.swapaxes(*ends), axis=ends.get(part.axis, part.axis))
        case Magnitude():
            kept = part.magnitude_axes if part.magnitude_axes is not None else (*place.batch, *place.out)
            return replace(part, magnitude_axes=tuple(ends.get(axis, axis) for axis in kept))


def _known(place: Placement | None) -> Placement:
    if place is None:
        raise fault(
            "LF-604", "nothing says how the tensor lies that is transposed there", fix="bind it to its base first"
        )
    return place


def _swapped(shape: tuple[int, ...], place: Placement) -> tuple[int, ...]:
    sizes = list(shape)
    sizes[place.out[0]], sizes[place.in_[0]] = sizes[place.in_[0]], sizes[place.out[0]]
    return tuple(sizes)


def _turn(matrix: Array) -> Array:
    return matrix.swapaxes(-1, -2)
