"""The scale: the one number that multiplies B·A, and the rule that gives it from alpha and rank.

``alpha`` never multiplies anything itself. It is kept as stated, in float64, beside the rule of its source, so
that the source's own numbers can be given back; ``scale`` is what the mathematics uses.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

__all__ = ["LARGEST", "SCALE_RULES", "ScaleRule", "alpha_for", "scale_of"]

LARGEST = (2 - 2.0**-23) * 2.0**127
"""Of single precision, in which everything is computed: no alpha is beyond it."""

ScaleRule = Literal["alpha/r", "alpha/sqrt(r)", "factor"]
"""``alpha/r``: LoRA. ``alpha/sqrt(r)``: rsLoRA (arXiv:2312.03732). ``factor``: alpha *is* the scale."""

SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)


def scale_of(alpha: float, rule: ScaleRule, r: int | None) -> float:
    """The scale in float64.

    Args:
        alpha: finite; may be negative or zero.
        rule: one of ``SCALE_RULES``.
        r: the rank, at least 1; may be None only under ``factor``.

    >>> scale_of(16, "alpha/r", 8), scale_of(16, "alpha/sqrt(r)", 4), scale_of(0.5, "factor", None)
    (2.0, 8.0, 0.5)
    """
    if rule == "factor":
        return float(alpha)
    if r is None or r < 1:
        raise ValueError(f"rule {rule} needs a rank of at least 1, got {r}")
    return alpha / r if rule == "alpha/r" else alpha / math.sqrt(r)


def alpha_for(scale: float, r: int, rule: ScaleRule = "alpha/r") -> float:
    """The alpha that gives ``scale`` under ``rule``, to the last bit where a float64 can."""
    alpha = scale if rule == "factor" else scale * (r if rule == "alpha/r" else math.sqrt(r))
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((a for a in near if scale_of(a, rule, r) == scale), alpha)
