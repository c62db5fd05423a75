"""Tensors that are put together of others where they are read: q, k and v in one, the experts of a stack.

The pieces are views of a mapped file. What is made of them is as large as the adapter, where B goes block by block three
or four times as large, and is needed once, to be written: so it is made some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from loraformat.mapped import read_ahead

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Place = tuple[slice | int | npt.NDArray[np.intp], ...]

__all__ = ["Pieced", "bits", "pieced"]

_RUN = 1 << 20  # bytes


def pieced(shape: tuple[int, ...], pieces: Sequence[tuple[Place, Array]]) -> Array:
    """``out[place] = piece`` for each of the pieces, and zero elsewhere; in a dtype that holds each exactly.

    Args:
        pieces: where each lies, an index of the leading axes of which one at most goes by a list of numbers; no two overlap.
    """
    return cast("Array", Pieced(shape, pieces))


class Pieced(NDArrayOperatorsMixin):
    """As numpy's functions, operators and ``asarray`` take it, an array; made whole for all but ``runs`` and slices."""

    __slots__ = ("_pieces", "dtype", "shape")

    def __init__(self, shape: tuple[int, ...], pieces: Sequence[tuple[Place, Array]]) -> None:
        self.shape = shape
        self.dtype = _common([piece.dtype for _, piece in pieces])
        self._pieces = [((_resolved(place[0], shape[0]), *place[1:]), piece) for place, piece in pieces]

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self.size * self.itemsize

    def runs(self) -> Iterator[Array]:
        """Runs of the first axis, one after the other, of about a megabyte."""
        for _, piece in self._pieces:
            read_ahead(piece)
        step = max(1, _RUN * self.shape[0] // max(1, self.nbytes))
        for start in range(0, self.shape[0], step):
            yield self[start : start + step]

    def reshape(self, *shape: Any, **order: Any) -> Array:
        """Itself under its own shape, as a Linear's factors are written."""
        if shape in (self.shape, (self.shape,)) and not order:
            return cast("Array", self)
        return np.asarray(self).reshape(*shape, **order)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            start = range(self.shape[0])[key]
            return self[start : start + 1][0]
        if not isinstance(key, slice) or key.step not in (None, 1):
            return np.asarray(self)[key]
        start, stop, _ = key.indices(self.shape[0])
        out = np.zeros((max(0, stop - start), *self.shape[1:]), self.dtype)
        for place, piece in self._pieces:
            _put(out, start, place, piece)
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:], dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **more: Any) -> Any:
        if any(isinstance(out, Pieced) for out in more.get("out", ())):  # nothing is written into it
            return NotImplemented
        return getattr(ufunc, method)(*(np.asarray(i) if isinstance(i, Pieced) else i for i in inputs), **more)

    def __getattr__(self, name: str) -> Any:
        # numpy would take __array_interface__ for that of memory which nobody holds
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)


def bits(tensor: Array) -> Array:
    """The same values as unsigned integers: of a dtype that numpy does not know (bfloat16) it takes them one by one."""
    return tensor.view(f"u{tensor.itemsize}")


def _put(out: Array, start: int, place: Place, piece: Array) -> None:
    """What of a piece lies in these rows, of which the first is row ``start``."""
    first, stop = place[0], start + len(out)
    where: Any
    if isinstance(first, int):
        if not start <= first < stop:
            return
        where, own = first - start, piece[:]
    elif isinstance(first, slice):
        low, high = max(first.start, start), min(first.stop, stop)
        if low >= high:
            return
        where, own = slice(low - start, high - start), piece[low - first.start : high - first.start]
    else:
        inside = np.flatnonzero((first >= start) & (first < stop))
        where, own = first[inside] - start, piece[inside]
    if own.dtype == out.dtype:
        own, out = bits(own), bits(out)
    out[(where, *place[1:])] = own


def _resolved(place: slice | int | npt.NDArray[np.intp], size: int) -> slice | int | npt.NDArray[np.intp]:
    """The index of one axis; a slice with both its ends."""
    return slice(*place.indices(size)[:2]) if isinstance(place, slice) else place


def _common(dtypes: Sequence[np.dtype[Any]]) -> np.dtype[Any]:
    """One that holds the values of each exactly."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)
