"""W' = W + ΔW in runs of rows: float32 arithmetic, one rounding, the memory of one tile."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

import numpy as np

from loraformat import progress
from loraformat.base import FewBits
from loraformat.dtypes import dtype_name, numpy_dtype
from loraformat.errors import fault
from loraformat.magnitudes import kept_axes, of_squares, squares
from loraformat.parts import Loha, Lokr, Lora, Part
from loraformat.products import simplified
from loraformat.rounding import rounded, widened
from loraformat.updates import Update

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.base import Base, Parameter

    Array = npt.NDArray[Any]

__all__ = [
    "Lazy",
    "Norms",
    "Tensor",
    "applied",
    "changed",
    "created",
    "length",
    "measured",
    "moved",
    "prepared",
    "read_runs",
    "runs",
    "values_of",
]

_TILE = 1 << 18  # values: 1 MiB of float32, small enough for the cache and for malloc to reuse


P = ParamSpec("P")
T = TypeVar("T")


def _quiet(function: Callable[P, T]) -> Callable[P, T]:
    """Without numpy's warnings: what becomes infinite is told by ``_check_range``, once and as an error."""

    @functools.wraps(function)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> T:
        with np.errstate(over="ignore", invalid="ignore"):
            return function(*args, **kwargs)

    return quiet


class Tensor(Protocol):
    """Stored values that are read where they are sliced: an array, a view of a file, rows of an open file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""

    def __getitem__(self, rows: slice | EllipsisType, /) -> Array:
        """A run of rows, in the stored dtype; by ``...`` a scalar, which has none."""


@dataclass(slots=True)
class Norms:
    """Sums of squares over one tensor: of W, of the wanted ΔW, and of what rounding to W's dtype lost.

    Attributes:
        new: the tensor was added, or has another shape than W: there is no ΔW, and ``delta`` is of W'.
    """

    base: float = 0.0
    delta: float = 0.0
    lost: float = 0.0
    new: bool = False

    @property
    def change(self) -> float | None:
        """‖ΔW‖ / ‖W‖; None where W is zero or the tensor is new."""
        return math.sqrt(self.delta / self.base) if self.base and not self.new else None

    @property
    def loss(self) -> float:
        """‖W' − W − ΔW‖ / ‖ΔW‖: what of the change did not survive the storage dtype."""
        return math.sqrt(self.lost / self.delta) if self.delta else 0.0


@dataclass(frozen=True, slots=True)
class Lazy:
    """A parameter of a base, read where it is sliced."""

    base: Base
    parameter: Parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.parameter.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""
        return numpy_dtype(self.parameter.dtype)

    def __getitem__(self, rows: slice | EllipsisType) -> Array:
        if not isinstance(rows, slice):
            return self.base.read(self.parameter.name)
        start, stop, _ = rows.indices(self.shape[0])
        return self.base.read(self.parameter.name, (start, stop))


def runs(shape: tuple[int, ...], step: int = 1) -> Iterator[tuple[int, int]]:
    """[start, stop) of axis 0, a tile's worth of rows each, in whole steps, at least one."""
    rows = max(1, _TILE // max(1, math.prod(shape[1:])) // step) * step
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


def read_runs(base: Base, parameter: Parameter) -> Iterator[tuple[tuple[int, int] | None, Array]]:
    """The values of a parameter of a base, a tile at a time, each with its rows; None for a scalar, which has none."""
    for rows in runs(parameter.shape) if parameter.shape else [None]:
        yield rows, base.read(parameter.name, rows)


def values_of(base: Base, parameter: Parameter) -> Tensor:
    """What a parameter of a base means, read where it is sliced: of one in few bits float32, else what is stored."""
    known = base.dequantised(parameter.name) if isinstance(base, FewBits) else None
    return known or Lazy(base, parameter)


def changed(updates: Sequence[Update], base: Tensor, norms: Norms) -> Iterator[Array]:
    """Runs of rows of W', each in the dtype of ``base``, in order; adds to ``norms`` as it goes.

    Args:
        updates: placed in ``base``'s own axes; applied one after the other in float32, rounded once. None: a copy.
        base: W, any float dtype; of any dtype where the last update only replaces it.

    Raises:
        LoraFormatError: LF-606 an update for another shape; LF-611 a value beyond the range of the dtype; LF-612.
    """
    if not base.shape:
        yield _tile([prepared(update) for update in updates], base[...], None, norms)
        return
    updates = measured([prepared(update) for update in updates], base)
    for start, stop in runs(base.shape):
        yield _tile(updates, base[start:stop], (start, stop), norms)


@_quiet
def measured(updates: Sequence[Update], base: Tensor) -> list[Update]:
    """The same updates with those norms known that run over axis 0 of ``base``: every run of rows tells a part of them."""
    known: list[Update] = []
    for update in updates:
        if not update.tileable:
            part = replace(update["magnitude"], length=length(update, known, base))
            update = replace(update, parts=tuple(part if p.kind == part.kind else p for p in update.parts))
        known.append(update)
    return known


@_quiet
def length(update: Update, before: Sequence[Update], base: Tensor) -> Array:
    """What the magnitude of a placed update divides by on the weight that others leave, as ``Magnitude.length`` has it."""
    part, place = update["magnitude"], update.placement
    assert place is not None
    sums = (applied([*before, update.unscaled], base[slice(*rows)], rows) for rows in runs(base.shape))
    shares = [squares(part, widened(one), place) for one in sums]
    if 0 in kept_axes(part, place):
        return of_squares(part, np.concatenate(shares), place)
    return of_squares(part, np.asarray(np.sum(shares, axis=0, dtype=np.float64)), place)


def moved(update: Update, base: Tensor) -> float:
    """‖ΔW‖ of a placed update on ``base``."""
    if not base.shape:
        return math.sqrt(_square(update.delta(base[...])))
    (update,) = measured([update], base)
    return math.sqrt(sum(_square(update.delta(base[slice(*rows)], rows)) for rows in runs(base.shape)))


def created(
    updates: Sequence[Update], shape: tuple[int, ...], dtype: np.dtype[Any], old: Tensor | None, norms: Norms
) -> Iterator[Array]:
    """Runs of rows of a tensor that the first update replaces by one of another ``shape``, or adds where ``old`` is None."""
    updates = [prepared(update) for update in updates]
    norms.new = True
    none = None if old is None else old[0:0] if old.shape else np.zeros((), old.dtype)
    whole = not shape or not all(update.tileable for update in updates)
    for rows in [None] if whole else runs(shape):
        wanted = applied(updates, none, rows)
        norms.delta += _square(wanted)
        stored = rounded(wanted, dtype)
        _check_range(stored, wanted)
        progress.advance(stored.nbytes)
        yield stored


@_quiet
def prepared(update: Update) -> Update:
    """The same update with what every tile would do again done once, and a pair's scale in one of its factors."""
    return replace(update, parts=tuple(_prepared(part) for part in update.parts))


def _prepared(part: Part) -> Part:
    if not isinstance(part, (Lora, Loha, Lokr)):
        return part
    same = simplified(part)
    if isinstance(same, Lora) and _keeps_digits(same.lora_B, same.scale):
        return replace(same, lora_B=same.lora_B * np.float32(same.scale), alpha=1.0)
    return same


def _keeps_digits(factor: Array, scale: float) -> bool:
    """Whether no value of scale · factor comes near the ends of float32, where the product itself may not be."""
    sizes = np.abs(factor[factor != 0])
    if not sizes.size:
        return True
    return float(sizes.min()) * abs(scale) >= 2.0**-100 and float(sizes.max()) * abs(scale) <= 2.0**100


@_quiet
def applied(updates: Sequence[Update], base: Array | None, rows: tuple[int, int] | None) -> Array:
    """W' of a run of rows before rounding: float32; of a float64 base, W itself in float64 and ΔW in float32.

    What is only replaced is not computed with: it comes in its own dtype, so that a counter stays exact.
    """
    if updates[-1].replaces:
        return updates[-1].replaced(base, rows)
    if base is not None and all(update.linear for update in updates):
        return (base if base.dtype == np.float64 else widened(base)) + _added(updates, base.shape, rows)
    wanted = None if base is None else widened(base)
    for update in updates:
        wanted = update.apply(wanted, rows)
    assert wanted is not None
    return wanted


def _added(updates: Sequence[Update], shape: tuple[int, ...], rows: tuple[int, int] | None) -> Array:
    """The sum of additive updates in a run of rows of that shape."""
    total = updates[0].delta(rows=rows)
    for update in updates[1:]:
        total = total + update.delta(rows=rows)
    if total.shape != shape:
        raise fault("LF-606", f"the update gives {list(total.shape)}, the base tensor has {list(shape)}")
    return total


@_quiet
def _tile(updates: Sequence[Update], base: Array, rows: tuple[int, int] | None, norms: Norms) -> Array:
    if not updates:
        progress.advance(base.nbytes)
        return base
    old = widened(base)
    norms.base += _square(old)
    if all(update.linear for update in updates):
        delta = _added(updates, base.shape, rows)
        squares = _square(delta)
        wanted = base + delta if base.dtype == np.float64 else np.add(old, delta, out=old)
    else:
        wanted = applied(updates, base, rows)
        squares = _square(np.subtract(wanted, old, out=old, casting="same_kind"))
    stored = rounded(wanted, base.dtype)
    lost = 0.0
    if stored.dtype != wanted.dtype:
        back = widened(stored)
        lost = _square(np.subtract(back, wanted, out=back, casting="same_kind"))
    if not math.isfinite(squares + lost):
        _check_range(stored, base)
    norms.delta += squares
    norms.lost += lost
    progress.advance(stored.nbytes)
    return stored


def _check_range(stored: Array, before: Array) -> None:
    """LF-611 where the change made a finite value infinite."""
    beyond = int(np.count_nonzero(~np.isfinite(stored) & np.isfinite(before)))
    if beyond:
        what = f"{beyond} values of W + ΔW are beyond the range of {dtype_name(stored.dtype)}"
        raise fault("LF-611", what, fix="a lower weight, or a base of a wider type")


@_quiet
def _square(values: Array) -> float:
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    return float(np.dot(flat, flat))
