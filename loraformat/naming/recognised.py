"""Which weight of a base a target means, by the values: for names that no rule connects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loraformat.adapter import Adapter
from loraformat.axes import Placement
from loraformat.errors import LoraFormatError
from loraformat.naming.links import Link, Seat
from loraformat.resolve import Hints
from loraformat.sketch import recognise, sketch, telling
from loraformat.tiles import Lazy, values_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.base import Base
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["recognised"]


def recognised(targets: Mapping[str, Update], base: Base, origin: Base | None) -> Iterator[Link]:
    """Links of the targets whose weight ``base`` has, as it lies or transposed; several where several are as near.

    Args:
        targets: bound to their base, or found in ``origin``, which has it.
    """
    wanted = {key: own for key, update in targets.items() if (own := _sketch_of(key, update, origin)) is not None}
    sizes = {tuple(sorted(place.shape)) for place, _ in wanted.values()}
    known: dict[tuple[str, str], Array] = {}  # by name and axes
    for name, parameter in base.parameters().items():
        if len(parameter.shape) == 2 and tuple(sorted(parameter.shape)) in sizes:
            for spec in ("out,in", "in,out"):
                other = sketch(Lazy(base, parameter), Placement.of(parameter.shape, spec))
                if other is not None and other.any():
                    known[name, spec] = other
    for key, (place, drawn) in wanted.items():
        fits = {(n, s): d for (n, s), d in known.items() if _same_matrix(place, base.parameters()[n].shape, s)}
        found = recognise(drawn, fits)
        for name, spec in found.names:
            shape = base.parameters()[name].shape
            evidence = f"sketch: cosine {found.cosine:.3f}, the next {found.second:.3f}"
            yield Link(Seat(key, axes=place.spec, shape=place.shape), Seat(name, axes=spec, shape=shape), evidence)


def _sketch_of(key: str, update: Update, origin: Base | None) -> tuple[Placement, Array] | None:
    """The placement and sketch of a target's own weight; None where they are not known or tell nothing."""
    place, drawn = update.placement, update.sketch
    if drawn is None and origin is not None:
        try:
            found = origin.resolve(Adapter({key: update}), Hints()).targets.get(key, ())
        except LoraFormatError:
            return None
        if not found or found[0].weight not in origin.parameters():
            return None
        place = found[0].placement
        drawn = sketch(values_of(origin, origin.parameters()[found[0].weight]), place)
    if place is None or drawn is None or not drawn.any() or len(place.shape) != 2 or not telling(place):
        return None
    return place, drawn


def _same_matrix(place: Placement, shape: tuple[int, ...], spec: str) -> bool:
    return Placement.of(shape, spec).matrix_shape == place.matrix_shape
