"""Magnitudes: the direction of a sum, scaled to a length that was learnt (DoRA, arXiv:2402.09353)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.axes import Placement
from loraformat.errors import fault
from loraformat.parts import Magnitude
from loraformat.products import single

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]

__all__ = ["kept_axes", "norm", "of_squares", "rescale", "squares"]


def kept_axes(part: Magnitude, place: Placement) -> tuple[int, ...]:
    """The axes of the base tensor that the norm does not run over."""
    return (*place.batch, *place.out) if part.magnitude_axes is None else part.magnitude_axes


def rescale(part: Magnitude, value: F32, whole: Placement, rows: tuple[int, int] | None) -> F32:
    """magnitude · V / (‖V‖ + eps), V the tensor or a run of its rows."""
    if rows and part.length is None and 0 not in kept_axes(part, whole):
        raise fault("LF-612", "the norm of this magnitude runs over axis 0: a run of rows cannot be served alone")
    length = norm(part, value, whole, rows) if part.length is None else _run(part, part.length, whole, rows)
    return np.asarray(_laid(part, single(part.magnitude), whole, rows) * (value / length), np.float32)


def norm(part: Magnitude, value: F32, whole: Placement, rows: tuple[int, int] | None = None) -> F32:
    """‖V‖ + eps, the other axes of size 1, and 1 where nothing is rescaled; LF-612 where it is zero."""
    return of_squares(part, squares(part, value, whole), whole, rows)


def squares(part: Magnitude, value: F32, whole: Placement) -> F32:
    """‖V‖², the other axes of size 1; of a run of rows its share of that, where the norm runs over axis 0."""
    kept = kept_axes(part, whole)
    over = tuple(a for a in range(value.ndim) if a not in kept)
    return np.asarray(np.sum(np.square(value), axis=over, keepdims=True))


def of_squares(part: Magnitude, squares: Array, whole: Placement, rows: tuple[int, int] | None = None) -> F32:
    """``norm`` of V by ‖V‖²."""
    length = np.sqrt(squares) + np.float32(part.eps)
    if part.span is not None:
        inside = np.zeros(part.magnitude.shape, np.bool_)
        inside[..., slice(*part.span)] = True
        length = np.where(_laid(part, inside, whole, rows), length, np.float32(1))
    if not length.all():
        raise fault("LF-612", "a slice of the weight is zero: it has no direction that a magnitude could scale")
    return np.asarray(length, np.float32)


def _laid(part: Magnitude, values: Array, whole: Placement, rows: tuple[int, int] | None) -> Array:
    """What has the shape of ``magnitude`` as it meets the tensor, or a run of its rows."""
    kept = kept_axes(part, whole)
    ascending = sorted(range(len(kept)), key=kept.__getitem__)
    laid = values.reshape([whole.shape[a] for a in kept]).transpose(ascending)
    laid = laid.reshape([n if a in kept else 1 for a, n in enumerate(whole.shape)])
    return _run(part, laid, whole, rows)


def _run(part: Magnitude, laid: Array, whole: Placement, rows: tuple[int, int] | None) -> Array:
    """What meets a run of rows: all of it, where axis 0 is none of its own."""
    return laid[slice(*rows)] if rows and 0 in kept_axes(part, whole) else laid
