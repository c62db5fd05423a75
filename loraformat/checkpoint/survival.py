"""How much of a change survives the dtype in which a base stores it, and when that is too little to be a merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from loraformat.errors import Problem

if TYPE_CHECKING:
    from loraformat.tiles import Norms

__all__ = ["Stored", "survives", "too_little"]

_NAMED = 3


class Stored(Protocol):
    """A tensor that changed."""

    @property
    def name(self) -> str:
        """In the base."""

    @property
    def form(self) -> str:
        """In which it is stored, in words."""

    @property
    def norms(self) -> Norms:
        """Of W, of ΔW and of what rounding lost."""


def survives(changes: Sequence[Stored]) -> float:
    """1 − ‖W' − W − ΔW‖ / ‖ΔW‖ of all tensors that have a ΔW together, at least 0; 1 where there is none."""
    norms = [n for n in (change.norms for change in changes) if not n.new and math.isfinite(n.delta + n.lost)]
    moved, lost = (math.fsum(getattr(n, name) for n in norms) for name in ("delta", "lost"))
    return max(0.0, 1.0 - math.sqrt(lost / moved)) if moved else 1.0


def too_little(changes: Sequence[Stored], limit: float) -> Problem | None:
    """LF-615 where less than ``limit`` survives: base + adapter would be the base with noise."""
    whole = survives(changes)
    if whole >= limit:
        return None
    worst = sorted(changes, key=lambda change: -change.norms.loss)[:_NAMED]
    named = ", ".join(f"{change.name} {100 * max(0.0, 1 - change.norms.loss):.2g} %" for change in worst)
    dtypes = "/".join(sorted({change.form for change in changes if change.norms.lost}))
    what = f"{100 * whole:.2g} % of ΔW survives in {dtypes}, the least allowed is {100 * limit:.3g} %: {named}"
    fix = "merge into a base of a wider type, or attach the adapter at run time; --survival 0 takes what there is"
    return Problem("LF-615", what, fix=fix)
