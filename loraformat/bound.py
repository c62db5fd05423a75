"""Whether a base is the one that an adapter was bound to: by the digest of a tensor's bytes, or by its sketch.

A sketch tells another weight, and the same one times a factor that a tool folded into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.base import Recognising
from loraformat.errors import LoraFormatError, Problem
from loraformat.identity import runs_sha256
from loraformat.likeness import unlike
from loraformat.sketch import sketch
from loraformat.tiles import read_runs, values_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.base import Base, Parameter
    from loraformat.resolve import Match, Resolution
    from loraformat.updates import Update

__all__ = ["check_bound"]

_CAST = frozenset({"F16", "BF16"})
"""What exported graphs are cast to; the digest is then another."""


def check_bound(adapter: Adapter, base: Base, resolution: Resolution) -> None:
    """LF-607 where the adapter says which weights it was bound to, and these are others; LF-616 where they are multiples."""
    known = base.parameters()
    problems = []
    for key, places in resolution.targets.items():
        for match in places:
            name = match.name_in(known)
            problem = _other(key, adapter[key], base, match, known[name] if name is not None else None)
            if problem is not None:
                problems.append(problem)
    if problems:
        raise LoraFormatError(problems)


def _other(key: str, update: Update, base: Base, match: Match, parameter: Parameter | None) -> Problem | None:
    """By the digest, where the tensor lies as it lay then; else by the sketch, which survives casts and transposes."""
    # What a checkpoint stores the other way round is named as its parameter lies; a graph's tensor is another one then.
    named = match.parameter if match.parameter and match.node is None else match.placement
    if parameter is not None and update.base_sha256 is not None and update.placement == named:
        found = runs_sha256(tile for _, tile in read_runs(base, parameter))
        if found == update.base_sha256:
            return None
        if not (match.node is not None and parameter.dtype in _CAST):
            what = f"the adapter was bound to a tensor {update.base_sha256[:12]}…, the base has {found[:12]}…"
            return Problem("LF-607", what, key, "take that base, or --any-base for a close relative")
    if update.sketch is None or update.placement is None or not update.sketch.any():
        return None
    if parameter is None and not isinstance(base, Recognising):
        return None
    drawn = _drawn(base, match, parameter)
    if drawn is None:
        what = f"{match.weight} cannot be read, nor compared with the tensor that the adapter was bound to"
        return Problem("LF-607", what, key, "--any-base takes it unseen")
    return unlike(key, update.sketch, drawn, match.weight)


def _drawn(base: Base, match: Match, parameter: Parameter | None) -> npt.NDArray[np.float32] | None:
    """The sketch of what is there; None where it cannot be told."""
    if isinstance(base, Recognising):
        return base.sketch(match)
    if parameter is None or (weight := values_of(base, parameter)).shape != match.placement.shape:
        return None
    return sketch(weight, match.placement)
