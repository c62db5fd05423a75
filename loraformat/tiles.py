"""W' = W + ΔW in runs of rows: float32 arithmetic, one rounding, the memory of one tile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from loraformat import progress
from loraformat.parts import Delta, Loha, Lokr, Lora, Part
from loraformat.products import single
from loraformat.rounding import rounded, widened
from loraformat.updates import Update

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.base import Base, Parameter

    Array = npt.NDArray[Any]

__all__ = ["Norms", "Tensor", "applied", "changed", "created", "prepared", "read_runs", "runs"]

_TILE = 1 << 18  # values: 1 MiB of float32, small enough for the cache and for malloc to reuse


class Tensor(Protocol):
    """Stored values that are read where they are sliced: an array, a view of a file, rows of an open file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""

    def __getitem__(self, rows: slice, /) -> Array:
        """A run of rows, in the stored dtype."""


@dataclass(slots=True)
class Norms:
    """Sums of squares over one tensor: of W, of the wanted ΔW, and of what rounding to W's dtype lost."""

    base: float = 0.0
    delta: float = 0.0
    lost: float = 0.0

    @property
    def change(self) -> float:
        """‖ΔW‖ / ‖W‖; infinite where W is zero."""
        return math.sqrt(self.delta / self.base) if self.base else math.inf

    @property
    def loss(self) -> float:
        """‖W' − W − ΔW‖ / ‖ΔW‖: what of the change did not survive the storage dtype."""
        return math.sqrt(self.lost / self.delta) if self.delta else 0.0


def runs(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """[start, stop) of axis 0, a tile's worth of rows each, at least one."""
    rows = max(1, _TILE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


def read_runs(base: Base, parameter: Parameter) -> Iterator[tuple[tuple[int, int] | None, Array]]:
    """The values of a parameter of a base, a tile at a time, each with its rows; None for a scalar, which has none."""
    for rows in runs(parameter.shape) if parameter.shape else [None]:
        yield rows, base.read(parameter.name, rows)


def changed(updates: Sequence[Update], base: Tensor, norms: Norms) -> Iterator[Array]:
    """Runs of rows of W', each in the dtype of ``base``, in order; adds to ``norms`` as it goes.

    Args:
        updates: placed in ``base``'s own axes; applied one after the other in float32, rounded once.
        base: W, any float dtype.
    """
    updates = [prepared(update) for update in updates]
    if not all(update.tileable for update in updates):
        yield _tile(updates, base[0 : base.shape[0]], None, norms)
        return
    for start, stop in runs(base.shape):
        yield _tile(updates, base[start:stop], (start, stop), norms)


def created(
    updates: Sequence[Update], shape: tuple[int, ...], dtype: np.dtype[Any], old: Tensor | None, norms: Norms
) -> Iterator[Array]:
    """Runs of rows of a tensor that the first update replaces by one of another ``shape``, or adds where ``old`` is None."""
    updates = [prepared(update) for update in updates]
    start: Array | None = None
    if old is not None:
        start = old[0:0] if old.shape else np.zeros((), old.dtype)
    whole = not shape or not all(update.tileable for update in updates)
    for rows in [None] if whole else runs(shape):
        value = start
        for update in updates:
            value = update.apply(value, rows)
        assert value is not None
        norms.delta += _square(value)
        stored = rounded(value, dtype)
        progress.advance(stored.nbytes)
        yield stored


def prepared(update: Update) -> Update:
    """The same update with what every tile would do again done once: factors in float32, other products whole."""
    return replace(update, parts=tuple(_prepared(part) for part in update.parts))


def _prepared(part: Part) -> Part:
    if isinstance(part, Lora) and part.mid is None:
        return replace(part, lora_A=single(part.lora_A), lora_B=single(part.lora_B))
    if isinstance(part, (Lora, Loha, Lokr)):  # no tile of these has a product of its own
        return Delta(Update((part,)).matrix())
    return part


def applied(updates: Sequence[Update], base: Array, rows: tuple[int, int] | None) -> Array:
    """W' of a run of rows before rounding: float32; of a float64 base, W itself in float64 and ΔW in float32."""
    if base.dtype == np.float64 and all(update.linear for update in updates):
        wanted = base.copy()
        for update in updates:
            wanted += update.delta(rows=rows)
        return wanted
    wanted = widened(base)
    for update in updates:
        wanted = update.apply(wanted, rows)
    return wanted


def _tile(updates: Sequence[Update], base: Array, rows: tuple[int, int] | None, norms: Norms) -> Array:
    wanted = applied(updates, base, rows)
    stored = rounded(wanted, base.dtype) if wanted.dtype == np.float32 else wanted
    old = widened(base)
    norms.base += _square(old)
    norms.delta += _square(np.subtract(wanted, old, out=old, casting="same_kind"))
    if stored.dtype not in (np.float32, np.float64):
        back = widened(stored)
        norms.lost += _square(np.subtract(back, wanted, out=back))
    progress.advance(stored.nbytes)
    return stored


def _square(values: Array) -> float:
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    return float(np.dot(flat, flat))
