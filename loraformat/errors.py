"""What can be wrong, said so that a person can act on it: what, where, expected, how to fix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["LoraFormatError", "Problem", "fault"]

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of one input.

    Attributes:
        rule: stable id, listed in ``loraformat.rules`` and (file rules) in ``spec/loraformat.md``.
        what: what was found and what was expected.
        where: the target, tensor, field or path at fault; empty when it is the whole input.
        fix: what the user can do about it.
        severity: an ``error`` makes the input invalid; a ``warning`` does not.
    """

    rule: str
    what: str
    where: str = ""
    fix: str = ""
    severity: Severity = "error"

    def __str__(self) -> str:
        where = f"  @ {self.where}" if self.where else ""
        fix = f"\n        {self.fix}" if self.fix else ""
        word = "" if self.severity == "error" else "warning: "
        return f"{self.rule}  {word}{self.what}{where}{fix}"

    def as_json(self) -> dict[str, str]:
        """The five fields of the ``problems`` entries of every ``--json`` output."""
        return {
            "rule": self.rule,
            "severity": self.severity,
            "where": self.where,
            "what": self.what,
            "fix": self.fix,
        }


class LoraFormatError(Exception):
    """The input is at fault. Carries every problem that was found, not only the first."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def fault(rule: str, what: str, *, where: str = "", fix: str = "") -> LoraFormatError:
    """The error with a single problem: ``raise fault("LF-602", …)``."""
    return LoraFormatError(Problem(rule, what, where, fix))
