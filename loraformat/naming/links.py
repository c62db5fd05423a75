"""Links: which numbers of a parameter in one name space are which numbers of a parameter in another.

    matrix_there[index][rows] = scale · matrix_here[index][rows]      with matrices [*batch, out, in] of ``loraformat.axes``

or the transpose of that, of whole tensors alone.

A renamed parameter is one link. A fused one (q, k and v in one tensor) is several links that fill its rows, a stack of
layers or experts several that fill its batch, rows in another order one link with their order. Read backwards, the same
links lead back: fused is cut, stacked is taken apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.axes import Placement
from loraformat.errors import fault

if TYPE_CHECKING:
    import numpy.typing as npt

    Indices = npt.NDArray[np.intp]

__all__ = ["Link", "Seat", "Share"]


@dataclass(frozen=True, slots=True)
class Share:
    """The rows [total · start / of, total · stop / of): a share of whatever size the tensor has.

    The value of a fused query, key and value is ``Share(2, 3, 3)``; of one that has four times as much MLP behind it
    ``Share(2, 3, 7)``.
    """

    start: int
    stop: int
    of: int

    def whole(self, part: int) -> int | None:
        """How many rows the tensor has, of which ``part`` rows are this share; None where no number fits."""
        total, rest = divmod(part * self.of, self.stop - self.start)
        return None if rest else total

    def indices(self, total: int) -> Indices | None:
        """The rows of a tensor with ``total`` rows; None where it does not divide so."""
        if total % self.of:
            return None
        unit = total // self.of
        return np.arange(unit * self.start, unit * self.stop)


@dataclass(frozen=True, slots=True, eq=False)
class Seat:
    """Where, in a parameter of one name space.

    Attributes:
        name: the key, with its component: ``unet:conv_in.weight``.
        rows: which out rows of the matrix, in the order that the other side has them in; None: all of them as they lie.
        index: (i, n): the i-th of n matrices that are stacked along the one batch axis; None: not stacked.
        axes: how the matrix lies in the tensor, as ``--axes`` has it (``out,in``, ``in,out``, ``batch,in,out``);
            None: not known, or as on the other side. Only what speaks of a tensor's own axes needs it (``replace``,
            ``rows``, ``magnitude_axes``, a placement): factors are of the matrix and stay as they are.
        shape: of the tensor, where it is known; needed where the two sides split ``out`` or ``in`` differently.
    """

    name: str
    rows: Share | Indices | None = None
    index: tuple[int, int] | None = None
    axes: str | None = None
    shape: tuple[int, ...] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seat) and self._told() == other._told()

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def whole(self) -> bool:
        """Whether the seat is the whole tensor as it lies."""
        return self.rows is None and self.index is None

    @property
    def matrix_axes(self) -> str | None:
        """``axes`` of one matrix of a stack, or of the tensor."""
        if self.index is None or self.axes is None:
            return self.axes
        return ",".join(word for word in self.axes.split(",") if not word.strip().startswith("batch"))

    @property
    def matrix_shape(self) -> tuple[int, ...] | None:
        """``shape`` of one matrix of a stack, or of the tensor."""
        if self.index is None or self.shape is None:
            return self.shape
        if self.axes is None:
            return None
        words = [word.strip() for word in self.axes.split(",")]
        return tuple(n for n, word in zip(self.shape, words, strict=True) if not word.startswith("batch"))

    def indices(self, size: int) -> Indices:
        """``rows`` of a matrix that has ``size``; LF-606 where it has no such rows."""
        if self.rows is None:
            return np.arange(size)
        if not isinstance(self.rows, Share):
            if len(self.rows) and int(self.rows.max()) >= size:
                raise fault("LF-606", f"row {int(self.rows.max())} is meant of a tensor that has {size}")
            return self.rows
        found = self.rows.indices(size)
        if found is None:
            raise fault("LF-606", f"{size} rows are not divisible by {self.rows.of}: this is no such fused tensor")
        return found

    def total(self, part: int, together: int) -> int | None:
        """How many rows the matrix has, of which ``part`` rows are this seat and ``together`` those of all its pieces."""
        if isinstance(self.rows, Share):
            return self.rows.whole(part)
        if self.rows is None:
            return part
        if self.shape is not None and self.axes is not None:
            return Placement.of(self.shape, self.axes).matrix_shape[-2]
        return max(together, int(self.rows.max()) + 1)

    def _told(self) -> tuple[Any, ...]:
        rows = tuple(self.rows.tolist()) if isinstance(self.rows, np.ndarray) else self.rows
        return self.name, rows, self.index, self.axes, self.shape


@dataclass(frozen=True, slots=True)
class Link:
    """``there`` holds the numbers of ``here``.

    Attributes:
        evidence: what says so, as ``source: detail``: ``table: sdxl``, ``base: its names``, ``config: n_head 32``.
        scale: what the numbers are multiplied by, where the other framework keeps W so.
        op: ``embedding`` of a table, where that is known.
        transposed: the other framework keeps Wᵀ, and calls its rows out as well: a Linear whose program transposes it. Where
            the sides say how their tensors lie, ``axes`` say it of the same matrix.
    """

    here: Seat
    there: Seat
    evidence: str
    scale: float = 1.0
    op: str | None = None
    transposed: bool = False

    def reversed(self) -> Link:
        """The way back."""
        scale = 1.0 if self.scale == 1.0 else 1.0 / self.scale
        return replace(self, here=self.there, there=self.here, scale=scale)

    def same(self, other: Link) -> bool:
        """Whether both say the same, whatever says so."""
        return self._says() == other._says()

    def _says(self) -> tuple[Any, ...]:
        return self.here, self.there, self.scale, self.transposed
