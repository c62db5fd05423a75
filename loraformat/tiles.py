"""W' = W + ΔW in runs of rows: float32 arithmetic, one rounding, the memory of one tile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat import progress

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Norms", "changed"]

_TILE = 1 << 18  # values: 1 MiB of float32, small enough for the cache and for malloc to reuse


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


def changed(updates: Sequence[Update], base: Array, norms: Norms) -> Iterator[Array]:
    """Runs of rows of W', each in the dtype of ``base``, in order; adds to ``norms`` as it goes.

    Args:
        updates: placed in ``base``'s own axes; applied one after the other in float32, rounded once.
        base: W, any float dtype; may be a view of a file.
    """
    if not all(update.tileable for update in updates):
        yield _tile(updates, base, None, norms)
        return
    rows = max(1, _TILE // max(1, math.prod(base.shape[1:])))
    for start in range(0, base.shape[0], rows):
        stop = min(start + rows, base.shape[0])
        yield _tile(updates, base[start:stop], (start, stop), norms)


def _tile(updates: Sequence[Update], base: Array, rows: tuple[int, int] | None, norms: Norms) -> Array:
    old = base.astype(np.float32)
    wanted = old
    for update in updates:
        wanted = update.apply(wanted, rows)
    stored = wanted.astype(base.dtype)
    if base.dtype == np.float64 and all(update.linear for update in updates):
        stored = base + sum(update.delta(rows=rows) for update in updates)  # W keeps what float32 would round away
    norms.base += _square(old)
    norms.delta += _square(np.subtract(wanted, old, out=old))
    if stored.dtype != np.float32:
        norms.lost += _square(stored.astype(np.float32) - wanted)
    progress.advance(stored.nbytes)
    return stored


def _square(values: Array) -> float:
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    return float(np.dot(flat, flat))
