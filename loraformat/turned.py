"""The same update for a tensor that holds its parameter's numbers in other axes: a graph, another framework.

The matrix is what two such tensors have in common. Factors are of the matrix and stay; what speaks of the tensor's
own axes (``replace``, ``rows``, ``magnitude_axes``) is turned with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loraformat.axes import Placement
from loraformat.errors import fault
from loraformat.parts import Magnitude, Part, Replace, Rows

if TYPE_CHECKING:
    from loraformat.updates import Update

__all__ = ["neutral", "turned"]


def neutral(update: Update) -> bool:
    """Whether only the matrix matters: no part speaks of the parameter's own axes."""
    return not any(
        isinstance(p, (Replace, Rows)) or (isinstance(p, Magnitude) and p.magnitude_axes is not None)
        for p in update.parts
    )


def turned(update: Update, parameter: Placement, stored: Placement) -> Update:
    """``update``, which was made for a tensor laid like ``parameter``, for one laid like ``stored``.

    Raises:
        LoraFormatError: LF-606 the two are not the same matrix, or a part's axes have no counterpart.
    """
    if parameter == stored:
        return update.placed(stored)
    if parameter.matrix_shape != stored.matrix_shape or any(map(_split_differently, *_sizes(parameter, stored))):
        what = f"a tensor [{parameter.spec}] of {list(parameter.shape)} and one [{stored.spec}] of {list(stored.shape)}"
        raise fault("LF-606", f"{what} do not hold the same matrix")
    parts = tuple(_turned(part, parameter, stored) for part in update.parts)
    return replace(update, parts=parts, placement=stored, base_sha256=None)


def _sizes(one: Placement, other: Placement) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The sizes of out, in and batch of both, without those of 1."""
    sizes = [
        [tuple(p.shape[a] for a in axes if p.shape[a] != 1) for axes in (p.out, p.in_, p.batch)] for p in (one, other)
    ]
    return sizes[0], sizes[1]


def _split_differently(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two lists of axes count the same entries in another order: [in, h, w] and [h, w, in]."""
    return one != other and len(one) > 1 and len(other) > 1


def _turned(part: Part, parameter: Placement, stored: Placement) -> Part:
    match part:
        case Replace():
            if part.replace.shape != parameter.shape:
                what = f"replace is {list(part.replace.shape)}, the parameter {list(parameter.shape)}"
                raise fault("LF-606", what, fix="a resized tensor keeps the axes of the base")
            return replace(part, replace=stored.from_matrix(parameter.to_matrix(part.replace)))
        case Rows():
            axis = _counterpart(part.axis, parameter, stored)
            n = len(part.indices)
            cut = replace(parameter, shape=_with(parameter.shape, part.axis, n))
            target = replace(stored, shape=_with(stored.shape, axis, n))
            return replace(part, values=target.from_matrix(cut.to_matrix(part.values)), axis=axis)
        case Magnitude() if part.magnitude_axes is not None:
            return replace(part, magnitude_axes=tuple(_counterpart(a, parameter, stored) for a in part.magnitude_axes))
        case _:
            return part


def _counterpart(axis: int, parameter: Placement, stored: Placement) -> int:
    """The axis of the stored tensor that means what ``axis`` of the parameter does."""
    for mine, theirs in zip(
        (parameter.out, parameter.in_, parameter.batch), (stored.out, stored.in_, stored.batch), strict=True
    ):
        if axis in mine and [parameter.shape[a] for a in mine] == [stored.shape[a] for a in theirs]:
            return theirs[mine.index(axis)]
    what = f"axis {axis} of [{parameter.spec}] has no counterpart in [{stored.spec}] of {list(stored.shape)}"
    raise fault("LF-606", what, fix="merge into the checkpoint and export again")


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])
