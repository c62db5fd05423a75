"""Weights stored as numbers of a few bits: W' is the nearest to W + ΔW of the values that the stored scales allow.

Scales, zero points and tables stay as they are: only the numbers change, and where ΔW is zero not even these. What of ΔW
survives is mostly little: the steps of so few bits are wider than the change of many an adapter. So this is done on
request, the loss is measured value by value, and too great a loss is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from loraformat import progress
from loraformat.errors import fault
from loraformat.tiles import Norms, applied, prepared, runs

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.updates import Update

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]

__all__ = ["Grid", "Run", "Values", "requantised"]


class Run(Protocol):
    """A run of rows of a weight in few bits."""

    @property
    def stored(self) -> Array:
        """The numbers as they lie in the file, which may pack several in one."""

    def means(self, stored: Array) -> F32:
        """The values of such numbers in these rows: float32 [rows, …]."""

    def nearest(self, wanted: F32) -> Array:
        """The numbers whose values are the nearest, as they are stored; the old ones where these are as near."""


class Grid(Protocol):
    """The values that a weight in few bits can have.

    A tool that computes in 16 bits rounds them to these; here they are what numbers and scales say, in float32.
    """

    @property
    def name(self) -> str:
        """What people call the form."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, in the axes in which it is stored."""

    @property
    def step(self) -> int:
        """How many rows lie together, so that a run begins at a multiple."""

    @property
    def nbytes(self) -> int:
        """Of the tensor that holds the numbers."""

    def run(self, start: int, stop: int) -> Run:
        """The rows [start, stop)."""


@dataclass(frozen=True, slots=True)
class Values:
    """The values of a weight in few bits, as a ``Tensor`` in the axes in which it is stored."""

    grid: Grid

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.grid.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32."""
        return np.dtype(np.float32)

    def __getitem__(self, rows: slice | EllipsisType) -> F32:
        start, stop, _ = rows.indices(self.shape[0]) if isinstance(rows, slice) else (0, self.shape[0], 1)
        step = self.grid.step
        first, last = start // step * step, min(-(-stop // step) * step, self.shape[0])
        run = self.grid.run(first, last)
        return run.means(run.stored)[start - first : stop - first]


def requantised(updates: Sequence[Update], grid: Grid, norms: Norms) -> Iterator[Array]:
    """Runs of rows of what is stored, in order; adds to ``norms``, in which what saturates counts as lost.

    Raises:
        LoraFormatError: LF-611 a value of W + ΔW is infinite or NaN.
    """
    updates = [prepared(update) for update in updates]
    whole = not all(update.tileable for update in updates)
    for start, stop in [(0, grid.shape[0])] if whole else runs(grid.shape, grid.step):
        new = _rounded(updates, grid.run(start, stop), None if whole else (start, stop), norms)
        progress.advance(new.nbytes)
        yield new


def _rounded(updates: Sequence[Update], run: Run, rows: tuple[int, int] | None, norms: Norms) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        old = run.means(run.stored)
        wanted = applied(updates, old, rows).astype(np.float32)
        squares = _square(wanted - old)
        if not math.isfinite(squares) and not np.isfinite(wanted).all():
            sound = bool(np.isfinite(old).all())
            fix = "a lower weight" if sound else "the base itself holds NaN or an infinity there"
            raise fault("LF-611", "a value of W + ΔW is not finite", fix=fix)
        new = run.nearest(wanted)
        norms.base += _square(old)
        norms.delta += squares
        norms.lost += _square(run.means(new) - wanted)
    return new


def _square(values: F32) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))
