"""Ranks and scales of many modules as PEFT states them: one r, one alpha, one rule, and patterns for what differs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from loraformat.errors import fault
from loraformat.parts import Loha, Lora
from loraformat.scale import ScaleRule, alpha_for

__all__ = ["alpha_under", "stated"]


def stated(parts: Mapping[str, Lora | Loha], alpha_name: str = "lora_alpha") -> dict[str, Any]:
    """``r``, alpha and both patterns, by which PEFT gives each module (or adapted parameter) its own numbers.

    Raises:
        LoraFormatError: LF-508 a scale that no alpha of float64 gives.
    """
    lora = alpha_name == "lora_alpha"
    rules: set[ScaleRule] = {part.scale_rule for part in parts.values()}
    rule: ScaleRule = "alpha/sqrt(r)" if lora and rules == {"alpha/sqrt(r)"} else "alpha/r"
    alphas = {module: alpha_under(rule, part) for module, part in parts.items()}
    if endless := [module for module, alpha in alphas.items() if not math.isfinite(alpha)]:
        what = f"a scale of {parts[endless[0]].scale} needs an alpha beyond float64"
        raise fault("LF-508", what, where=endless[0])
    r, rank_pattern = _usual({module: part.r for module, part in parts.items()})
    alpha, alpha_pattern = _usual(alphas)
    numbers = {"r": r, alpha_name: alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    return numbers | ({"use_rslora": rule == "alpha/sqrt(r)"} if lora else {})


def alpha_under(rule: ScaleRule, part: Lora | Loha) -> float:
    """The alpha that gives ``part.scale`` under ``rule``, to the last bit where a double can."""
    return part.alpha if part.scale_rule == rule else alpha_for(part.scale, part.r, rule)


def _usual(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the commonest value, a pattern for every other module that means this module alone)."""
    usual = Counter(values.values()).most_common(1)[0][0]
    rest = {f"^{re.escape(module)}": value for module, value in values.items() if value != usual}
    return _plain(usual), {pattern: _plain(value) for pattern, value in rest.items()}


def _plain(value: Any) -> Any:
    """An integral alpha as the integer that PEFT's dataclass declares."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
