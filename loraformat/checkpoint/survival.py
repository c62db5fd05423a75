"""How much of a change survives the dtype in which a checkpoint is stored, and when that is too little to be a merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraformat.errors import Problem

if TYPE_CHECKING:
    from loraformat.checkpoint.change import Change

__all__ = ["survives", "too_little"]

_NAMED = 3


def survives(changes: Sequence[Change]) -> float:
    """1 − ‖W' − W − ΔW‖ / ‖ΔW‖ of all tensors that have a ΔW together, at least 0; 1 where there is none."""
    norms = [n for n in (change.norms for change in changes) if not n.new and math.isfinite(n.delta + n.lost)]
    moved, lost = (math.fsum(getattr(n, name) for n in norms) for name in ("delta", "lost"))
    return max(0.0, 1.0 - math.sqrt(lost / moved)) if moved else 1.0


def too_little(changes: Sequence[Change], limit: float) -> Problem | None:
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
