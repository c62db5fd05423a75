"""What is combined at one target: the change of each adapter with its weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from loraformat.normal import uniform

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.updates import Update

    F32 = npt.NDArray[np.float32]
    F64 = npt.NDArray[np.float64]

__all__ = ["Term"]


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter's change of one target.

    Attributes:
        weight: what ΔW is multiplied by; not zero.
        update: as its adapter has it.
        digest: of the adapter, so that what is drawn for it depends neither on its place nor on its companions.
    """

    weight: float
    update: Update
    digest: str

    @property
    def change(self) -> Update:
        """The additive parts alone."""
        return replace(self.update, parts=self.update.additive)

    def delta(self, shape: tuple[int, ...]) -> F32:
        """weight · ΔW as float32 of that shape (a shared batch is repeated), contiguous, an array of its own."""
        return np.multiply(np.broadcast_to(self.change.matrix(), shape), np.float32(self.weight), order="C")

    def draw(self, key: str, seed: int, row: int, count: int) -> F64:
        """``count`` uniform numbers in (0, 1) for a row of this target: the same on every machine."""
        return uniform(seed, f"{key}\n{self.digest}\n{row}", count)
