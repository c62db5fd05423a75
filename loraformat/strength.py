"""How strongly an adapter acts: a weight for all of it, a factor for some targets, and which targets at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from loraformat.adapter import Adapter
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.parts import Delta, Loha, Lokr, Lora, Part, Replace, Rows
from loraformat.resolve import matches, unmeant

if TYPE_CHECKING:
    from loraformat.updates import Update

__all__ = ["strengthen", "weighed"]


def strengthen(
    adapter: Adapter, weight: float = 1.0, only: Sequence[str] = (), scales: Mapping[str, float] | None = None
) -> Adapter:
    """The adapter with ΔW multiplied by ``weight``, by ``scales`` where a pattern means the target, ``only`` for some.

    A magnitude stays: its norm runs over the base and the multiplied ΔW, as peft 0.21.2's ``set_scale`` does it.

    Raises:
        LoraFormatError: LF-612 absolute values (replace, rows) have no half; LF-705 a pattern that means no target, or
            a number that is not finite.
    """
    scales = scales or {}
    numbers = [weight, *scales.values()]
    if not all(math.isfinite(n) for n in numbers):
        raise fault("LF-705", f"weights must be finite numbers, not {numbers}")
    if unused := unmeant((*only, *scales), adapter):
        raise LoraFormatError(unused)
    targets, problems = {}, []
    for key, update in adapter.items():
        if only and not matches(key, only):
            continue
        factor = weight * math.prod({p: s for p, s in scales.items() if matches(key, (p,))}.values())
        if factor != 1.0 and any(isinstance(part, (Replace, Rows)) for part in update.parts):
            what = f"a {update.kind} update sets absolute values: a strength of {factor:g} means nothing"
            problems.append(Problem("LF-612", what, key, "give it the weight 1, or leave it out with --only"))
        targets[key] = _scaled(update, factor)
    if problems:
        raise LoraFormatError(problems)
    return replace(adapter, targets=targets)


def weighed(adapters: Adapter | Sequence[tuple[Adapter, float]] | Mapping[str, Adapter]) -> list[tuple[str, Adapter]]:
    """One adapter, several with their weights, or several by their names; by a name each and with the weight applied.

    Raises:
        LoraFormatError: LF-612, LF-705, as ``strengthen`` does.
    """
    if isinstance(adapters, Adapter):
        return [("default", adapters)]
    if isinstance(adapters, Mapping):
        return list(cast("Mapping[str, Adapter]", adapters).items())  # which an adapter alone is too, of updates
    return [(f"default{i}", strengthen(adapter, weight)) for i, (adapter, weight) in enumerate(adapters, 1)]


def _scaled(update: Update, factor: float) -> Update:
    if factor == 1.0:
        return update
    parts: list[Part] = [
        replace(p, alpha=p.alpha * factor) if isinstance(p, (Lora, Loha, Lokr, Delta)) else p for p in update.parts
    ]
    return replace(update, parts=tuple(parts))
