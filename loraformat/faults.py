"""Reading JSON that a stranger wrote: members of known name and right type, and a note of every one that is not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from loraformat.errors import LoraFormatError, Problem
from loraformat.names import nearest

__all__ = ["Faults", "brief", "is_number", "is_rank"]


class Faults:
    """Collects problems, so that a reader can go on and report all of them at once."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def say(self, rule: str, what: str, where: str, fix: str = "") -> None:
        """Note an error."""
        self.problems.append(Problem(rule, what, where, fix))

    def warn(self, rule: str, what: str, where: str) -> None:
        """Note a warning."""
        self.problems.append(Problem(rule, what, where, severity="warning"))

    @property
    def errors(self) -> int:
        """How many errors were noted."""
        return sum(p.severity == "error" for p in self.problems)

    def stop_if_any(self) -> None:
        """Raise everything noted, if an error is among it."""
        if self.errors:
            raise LoraFormatError(self.problems)

    def members(
        self, value: Any, types: Mapping[str, Any], where: str, required: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """The members of known name and right type; LF-203 for a wrong or missing one, LF-204 for an unknown one."""
        if not isinstance(value, dict):
            self.say("LF-203", f"expected an object, got {brief(value)}", where)
            return {}
        out: dict[str, Any] = {}
        for name, member in value.items():
            if name not in types:
                hint = nearest(name, types)
                mean = f"; did you mean {hint[0]!r}?" if hint else ""
                self.warn("LF-204", f"unknown field {name!r}, ignored{mean}", where)
            elif not _is(member, types[name]):
                self.say("LF-203", f"{name} must not be {brief(member)}", f"{where}.{name}")
            else:
                out[name] = member
        for name in required:
            if name not in value:
                self.say("LF-203", f"required field {name!r} is missing", where)
        return out


def _is(value: Any, kind: Any) -> bool:
    """Whether a JSON value has a type of the field tables; true and false are no numbers."""
    if kind is object:
        return True
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is(item, kind[0]) for item in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number that float64 holds: JSON has no limit of its own, and true is no number.

    >>> is_number(0.5), is_number(10**400), is_number(float("nan")), is_number(True)
    (True, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= 2**53


def is_rank(value: Any) -> TypeGuard[int]:
    """Whether a JSON value is a whole number that a rank can be: at least 1, and one that every tool's int holds."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def brief(value: Any) -> str:
    """A value, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
