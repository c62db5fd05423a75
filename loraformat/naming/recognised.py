"""Which weight of a base a target means, by the values: for names that no rule connects.

The same numbers are found renamed, transposed, with axes of heads, and stacked with those of other layers; on the
target's own side too, where it is a stack of layers itself.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.adapter import Adapter
from loraformat.axes import Placement
from loraformat.errors import LoraFormatError, Problem
from loraformat.likeness import recognise, unlike
from loraformat.naming.links import Link, Seat
from loraformat.resolve import Hints
from loraformat.sketch import sketch, telling
from loraformat.tiles import values_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.base import Base, Parameter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]
    Shape = tuple[int, ...]

__all__ = ["recognised"]

_MOST_AXES = 4
_FIX = "translate by names, of which a space may know the factor: without --origin, or as it was before bind"


@dataclass(frozen=True, slots=True)
class _Spot:
    """One matrix in a tensor: all of it, or one of a stack.

    Attributes:
        index: (i, n) of the stack's batch axis, which the placement has.
    """

    name: str
    place: Placement
    index: tuple[int, int] | None = None

    @property
    def matrix(self) -> Shape:
        """[out, in]."""
        return self.place.matrix_shape[-2:]

    def seat(self) -> Seat:
        """For a link."""
        return Seat(self.name, index=self.index, axes=self.place.spec, shape=self.place.shape)

    def sketch(self, weight: _Weight) -> Array | None:
        """Of this matrix alone; None where it tells nothing."""
        place = self.place
        if self.index is None:
            drawn = sketch(weight.values, place)
        else:
            axis = place.batch[0]
            place = place.without(axis)
            drawn = sketch(weight.whole.take(self.index[0], axis), place)
        return drawn if drawn is not None and drawn.any() and telling(place) else None


class _Weight:
    """A stored tensor: a stack is read once for all of its matrices."""

    def __init__(self, base: Base, parameter: Parameter) -> None:
        self.values = values_of(base, parameter)

    @functools.cached_property
    def whole(self) -> Array:
        """All of it."""
        return np.asarray(self.values[:])


def recognised(targets: Mapping[str, Update], base: Base, origin: Base | None) -> Iterator[Link]:
    """Links of the targets whose weight ``base`` has, in whatever axes; several where several are as near.

    Args:
        targets: bound to their base, or found in ``origin``, which has it.

    Raises:
        LoraFormatError: LF-616 the weight is a multiple of the target's there.
    """
    wanted = {spot: drawn for key, update in targets.items() for spot, drawn in _own(key, update, origin)}
    sizes = {spot.matrix for spot in wanted}
    known: dict[_Spot, Array] = {}
    problems: list[Problem] = []
    for parameter in base.parameters().values():
        weight = _Weight(base, parameter)
        for spot in _spots(parameter, sizes):
            if (drawn := spot.sketch(weight)) is not None:
                known[spot] = drawn
    for own, drawn in wanted.items():
        found = recognise(drawn, {spot: other for spot, other in known.items() if spot.matrix == own.matrix})
        for spot in found.names:
            evidence = f"sketch: cosine {found.cosine:.3f}, the next {found.second:.3f}"
            yield Link(own.seat(), spot.seat(), evidence)
        told = (unlike(own.name, drawn, known[spot], spot.name) for spot in found.names)
        problems += [replace(problem, fix=_FIX) for problem in told if problem]
    if problems:
        raise LoraFormatError(problems)


def _spots(parameter: Parameter, sizes: set[Shape]) -> Iterator[_Spot]:
    """Every matrix of one of these sizes that a tensor may hold: by its axes in order, or stacked along one of them."""
    shape = parameter.shape
    if not 2 <= len(shape) <= _MOST_AXES:
        return
    axes = tuple(range(len(shape)))
    for place in _readings(shape, axes, ()):
        if place.matrix_shape in sizes:
            yield _Spot(parameter.name, place)
    for batch in axes[:2] if len(shape) > 2 else ():
        for place in _readings(shape, tuple(axis for axis in axes if axis != batch), (batch,)):
            if place.matrix_shape[-2:] in sizes:
                yield from (_Spot(parameter.name, place, (i, shape[batch])) for i in range(shape[batch]))


def _readings(shape: Shape, axes: Shape, batch: Shape) -> Iterator[Placement]:
    """Every division of the axes into out and in; an axis of size 1 says nothing and is out."""
    free = [axis for axis in axes if shape[axis] > 1]
    for count in range(1, len(free)):
        for in_ in itertools.combinations(free, count):
            yield Placement(shape, tuple(axis for axis in axes if axis not in in_), in_, batch)


def _own(key: str, update: Update, origin: Base | None) -> Iterator[tuple[_Spot, Array]]:
    """A target's own weight, or each of the stack that it is, with its sketch; nothing where that is not known."""
    place = update.placement
    if update.sketch is not None and place is not None and not place.batch:
        if update.sketch.any() and telling(place):
            yield _Spot(key, place), update.sketch
        return
    if origin is None:
        return
    try:
        found = origin.resolve(Adapter({key: update}), Hints()).targets.get(key, ())
    except LoraFormatError:
        return
    parameter = origin.parameters().get(found[0].weight) if found else None
    if parameter is None or found[0].placement is None or len(found[0].placement.batch) > 1:
        return
    place, weight = found[0].placement, _Weight(origin, parameter)
    count = place.batch_sizes[0] if place.batch else 0
    for spot in [_Spot(key, place, (i, count)) for i in range(count)] or [_Spot(key, place)]:
        if (drawn := spot.sketch(weight)) is not None:
            yield spot, drawn
