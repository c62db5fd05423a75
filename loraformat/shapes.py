"""Whether an update's tensors fit each other, the placement and their roles: LF-309 … LF-314, LF-403 … LF-408."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from loraformat.dtypes import dtype_name
from loraformat.errors import Problem
from loraformat.parts import Magnitude, Replace, Rows, roles_of

if TYPE_CHECKING:
    from loraformat.axes import Placement
    from loraformat.updates import Update

__all__ = ["FLOATS", "shape_problems"]

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""dtypes that factors and values may have."""

_OTHERS = frozenset({"BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"})
"""dtypes that ``replace`` may have besides: counters, masks."""


def shape_problems(key: str, update: Update) -> list[Problem]:
    """Every fault of one target's shapes and dtypes; values are read only for row indices."""
    problems = [Problem(rule, what, f"{key}.{role}") for rule, what, role in _tensor_faults(update)]
    if not problems:
        problems = [Problem(rule, what, f'targets["{key}"]') for rule, what in _fit_faults(update)]
    return problems


def _tensor_faults(update: Update) -> Iterator[tuple[str, str, str]]:
    for part in update.parts:
        for role, tensor in roles_of(part):
            dtype = _dtype(tensor)
            if 0 in tensor.shape:
                yield "LF-311", f"the tensor is empty: {list(tensor.shape)}", role
            if role == "indices" and dtype != "I64":
                yield "LF-314", f"indices are I64, not {dtype}", role
            allowed = FLOATS | _OTHERS if role == "replace" else FLOATS
            if role != "indices" and dtype not in allowed:
                yield "LF-314", f"{role} is one of {', '.join(sorted(allowed))}, not {dtype}", role
    sketch: Any = update.sketch
    if sketch is not None and (sketch.shape != (64,) or _dtype(sketch) != "F32"):
        yield "LF-408", f"a sketch is F32 [64], not {_dtype(sketch)} {list(sketch.shape)}", "sketch"


def _dtype(tensor: Any) -> str:
    try:
        return dtype_name(tensor.dtype)
    except ValueError:
        return str(tensor.dtype)


def _fit_faults(update: Update) -> Iterator[tuple[str, str]]:
    for factors in update.additive:
        if why := factors.fault():
            yield "LF-309", why
            return
    shapes = [p.matrix_shape() for p in update.additive]
    if len({len(shape) for shape in shapes}) > 1:
        yield "LF-309", f"the parts give different matrices: {', '.join(str(list(s)) for s in shapes)}"
        return
    matrix = update.matrix_shape()
    if matrix is not None and not all(_covers(shape, matrix) for shape in shapes):
        yield "LF-309", f"the parts give different matrices: {', '.join(str(list(s)) for s in shapes)}"
        return
    place = update.placement
    if matrix is not None and place is not None and not _covers(matrix, place.matrix_shape):
        yield (
            "LF-403",
            f"the factors give {list(matrix)}, the placement {place.spec} of {list(place.shape)} "
            f"describes {list(place.matrix_shape)}",
        )
    for part in update.parts:
        match part:
            case Replace():
                yield from _replace_faults(part, place)
            case Magnitude():
                yield from _magnitude_faults(part, update, place)
            case Rows():
                yield from _rows_faults(part, _shape(update))


def _covers(matrix: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal, but for batch sizes of 1 (shared by all)."""
    return (
        len(matrix) == len(wanted)
        and matrix[-2:] == wanted[-2:]
        and all(m in (1, n) for m, n in zip(matrix[:-2], wanted[:-2], strict=True))
    )


def _replace_faults(part: Replace, place: Placement | None) -> Iterator[tuple[str, str]]:
    if place is not None and part.replace.shape != place.shape:
        yield "LF-406", f"replace is {list(part.replace.shape)}, the placement's shape is {list(place.shape)}"
    if unknown := set(part.allows) - {"add", "resize"}:
        yield "LF-203", f"allows holds {sorted(map(str, unknown))}; known: add, resize"


def _magnitude_faults(part: Magnitude, update: Update, place: Placement | None) -> Iterator[tuple[str, str]]:
    axes, matrix = part.magnitude_axes, update.matrix_shape()
    if axes is not None and (
        place is None or len(set(axes)) != len(axes) or not all(a in range(len(place.shape)) for a in axes)
    ):
        yield "LF-404", f"magnitude_axes {list(axes)} need a placement whose axes they are, each once"
        return
    if place is not None:
        matrix = place.matrix_shape
    if matrix is None:
        yield "LF-404", "a magnitude alone needs a placement"
    elif part.magnitude.shape != (wanted := part.shape_for(matrix, place)):
        yield "LF-404", f"magnitude is {list(part.magnitude.shape)}, its axes have {list(wanted)}"
    if not part.eps >= 0:
        yield "LF-404", f"eps is {part.eps}; it must not be negative"


def _shape(update: Update) -> tuple[int, ...] | None:
    """The base tensor's shape, where the update says it."""
    if update.placement is not None:
        return update.placement.shape
    return tuple(update["replace"].replace.shape) if "replace" in update else None


def _rows_faults(part: Rows, shape: tuple[int, ...] | None) -> Iterator[tuple[str, str]]:
    indices, values = part.indices, part.values
    if indices.ndim != 1 or bool((indices[1:] <= indices[:-1]).any()) or int(indices[0]) < 0:
        yield "LF-405", "indices must be one axis of unique, ascending, non-negative integers"
    elif not 0 <= part.axis < values.ndim or values.shape[part.axis] != len(indices):
        yield "LF-405", f"values {list(values.shape)} must have {len(indices)} slices along axis {part.axis}"
    elif shape is not None and (why := part.misfit(shape)):
        yield "LF-405", why
