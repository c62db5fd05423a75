"""What becomes of one tensor of a checkpoint: its values, tile by tile, when they are written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.checkpoint.requantised import Grid, requantised
from loraformat.dtypes import DTYPES, numpy_dtype
from loraformat.errors import LoraFormatError
from loraformat.serializer import raw
from loraformat.shapes import FLOATS
from loraformat.tiles import Norms, Tensor, changed, created

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Change"]


@dataclass(frozen=True, slots=True)
class Change:
    """The tensor ``name`` as it will be stored.

    Attributes:
        base: W, wherever it is stored; None for a tensor that the adapter adds.
        updates: placed in the tensor's own axes, applied one after the other; none for a copy under another name.
        keys: the adapters' names for what changes it.
        norms: filled while the tiles are made.
        grid: of a weight that is stored in few bits and may be rounded to them again.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: Tensor | None
    updates: tuple[Update, ...] = ()
    keys: tuple[str, ...] = ()
    norms: Norms = field(default_factory=Norms)
    grid: Grid | None = None

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        if self.grid is not None:
            return self.grid.nbytes
        return DTYPES[self.dtype] * math.prod(self.shape)

    @property
    def held(self) -> int:
        """Bytes of memory beyond a tile: where a norm runs over axis 0, a tensor in few bits is held whole, five times over."""
        return 0 if self.grid is None or all(u.tileable for u in self.updates) else 20 * math.prod(self.grid.shape)

    @property
    def form(self) -> str:
        """What people call the form in which it is stored."""
        return self.grid.name if self.grid is not None else self.dtype

    def holds(self, update: Update) -> bool:
        """Whether the dtype of storage is one to round to; of any other, whether what replaces the tensor is exact in it."""
        if self.dtype in FLOATS and DTYPES[self.dtype] >= 2:
            return True
        if self.grid is not None and "replace" not in update and "rows" not in update:
            return True
        if not update.replaces:
            return False
        new = update["replace"].replace
        with np.errstate(all="ignore"):
            return np.array_equal(new.astype(numpy_dtype(self.dtype)).astype(new.dtype), new)

    def sampled(self) -> float:
        """What the dtype loses of ΔW in the first run of rows, as a share: an estimate for the whole."""
        trial = replace(self, norms=Norms())
        next(iter(trial.tiles()), None)
        return trial.norms.loss

    def tiles(self) -> Iterator[memoryview]:
        """The bytes, in order."""
        if self.grid is not None and not all(u.replaces for u in self.updates):
            arrays = requantised(self.updates, self.grid, self.norms)
        elif self.base is None or self.base.shape != self.shape:
            arrays = created(self.updates, self.shape, numpy_dtype(self.dtype), self.base, self.norms)
        else:
            arrays = changed(self.updates, self.base, self.norms)
        try:
            yield from map(raw, arrays)
        except LoraFormatError as error:  # a tile does not know whose it is
            raise LoraFormatError(replace(problem, where=self.name) for problem in error.problems) from None
