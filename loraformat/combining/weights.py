"""How much of each adapter: one number, or numbers by pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loraformat.errors import LoraFormatError, fault
from loraformat.resolve import matches, unmeant

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["Weight", "by_pattern", "weight_of"]

Weight = float | Mapping[str, float]
"""A number, or pattern → number: a target's weight is the product of all that mean it."""


def by_pattern(weight: Weight, adapter: Adapter) -> dict[str, float]:
    """Pattern → number; LF-705 for a pattern that means no target, or a number that is not finite."""
    patterns = dict(weight) if isinstance(weight, Mapping) else {"*": weight}
    if not all(math.isfinite(number) for number in patterns.values()):
        raise fault("LF-705", f"weights must be finite numbers, not {list(patterns.values())}")
    if unused := unmeant((pattern for pattern in patterns if pattern != "*"), adapter):
        raise LoraFormatError(unused)
    return {pattern: float(number) for pattern, number in patterns.items()}


def weight_of(key: str, weights: Mapping[str, float]) -> float:
    """The weight of one target."""
    return math.prod(number for pattern, number in weights.items() if matches(key, (pattern,)))
