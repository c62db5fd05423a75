"""Regular expressions out of a stranger's file, matched in bounded time.

Python's ``re`` backtracks: ``(a+)+$`` against forty letters takes hours, and neither a thread nor a signal can stop
it in a library. Here the parsed expression moves *sets* of positions through the name, as Thompson did (1968), so
no position is tried twice at one place; what remains is counted, and refused beyond ``STEPS``. The answer is the one
that ``re`` gives, because ``re`` itself parses the expression and tests each single character.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["LENGTH", "STEPS", "Pattern"]

LENGTH = 4096
"""Characters of an expression."""

STEPS = 100_000
"""Characters tried in one match: a usual pattern and path take a few hundred."""

_UNBOUNDED = 2**31
_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_SPACE": r"\s", "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W",
}  # fmt: skip
_ANCHORS = {
    "AT_BEGINNING": "^", "AT_END": "$", "AT_BOUNDARY": r"\b", "AT_NON_BOUNDARY": r"\B", "AT_BEGINNING_STRING": r"\A",
    "AT_END_STRING": r"\Z",
}  # fmt: skip
_ONE = frozenset({"LITERAL", "NOT_LITERAL", "ANY", "IN", "RANGE", "CATEGORY"})
_INNER = frozenset({"SUBPATTERN", "BRANCH", "MAX_REPEAT", "MIN_REPEAT", "ASSERT", "ASSERT_NOT"})


class Pattern:
    """A parsed expression.

    Raises:
        ValueError: it is none, it is longer than ``LENGTH``, or it uses what sets of positions cannot do:
            back-references, atomic groups.
    """

    def __init__(self, text: str) -> None:
        if len(text) > LENGTH:
            raise ValueError(f"{len(text)} characters; an expression has at most {LENGTH}")
        try:
            # The parser of ``re`` under the name that it has since CPython 3.11 (``sre_parse`` before).
            from re import _parser  # type: ignore[attr-defined]

            re.compile(text)  # the compiler refuses what the parser lets pass, such as a look-behind of any width
            parsed = _parser.parse(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(str(error) or "nested too deeply") from None
        self._tree: Sequence[tuple[Any, Any]] = parsed
        self._flags: int = parsed.state.flags
        self._tests: dict[tuple[str, int], re.Pattern[str]] = {}
        self._left = 0
        if foreign := sorted(_foreign(parsed)):
            raise ValueError(f"{', '.join(foreign)} cannot be matched in bounded time")

    def starts(self, name: str) -> bool:
        """Whether ``re.match`` finds it; ValueError beyond ``STEPS``."""
        return bool(self._run(name))

    def fills(self, name: str) -> bool:
        """Whether ``re.fullmatch`` finds it; ValueError beyond ``STEPS``."""
        return len(name) in self._run(name)

    def _run(self, name: str) -> set[int]:
        self._left = STEPS
        try:
            return self._after(self._tree, name, {0}, self._flags)
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def _after(self, tree: Sequence[tuple[Any, Any]], name: str, at: set[int], flags: int) -> set[int]:
        """Every position at which ``tree`` can end that began at one of ``at``."""
        for op, value in tree:
            if not at:
                break
            match op.name:
                case "SUBPATTERN":
                    _, add, remove, body = value
                    at = self._after(body, name, at, (flags | add) & ~remove)
                case "BRANCH":
                    at = set().union(*(self._after(body, name, at, flags) for body in value[1]))
                case "MAX_REPEAT" | "MIN_REPEAT":
                    at = self._repeat(value, name, at, flags)
                case "ASSERT" | "ASSERT_NOT":
                    at = {p for p in at if self._looks(value, name, p, flags) == (op.name == "ASSERT")}
                case _:
                    at = self._test(op.name, value, name, at, flags)
        return at

    def _repeat(self, value: tuple[int, int, Any], name: str, at: set[int], flags: int) -> set[int]:
        least, most, body = value
        for _ in range(least):
            before, at = at, self._after(body, name, at, flags)
            if at == before:  # each further round ends where it began
                break
        every = fresh = at
        for _ in range(min(most - least, _UNBOUNDED)):
            fresh = self._after(body, name, fresh, flags) - every
            if not fresh:
                break
            every = every | fresh
        return every

    def _looks(self, value: tuple[int, Any], name: str, p: int, flags: int) -> bool:
        """Whether a look-ahead, or a look-behind (whose width ``re`` requires to be fixed), holds at ``p``."""
        direction, body = value
        if direction > 0:
            return bool(self._after(body, name, {p}, flags))
        start = p - body.getwidth()[0]
        return start >= 0 and p in self._after(body, name, {start}, flags)

    def _test(self, op: str, value: Any, name: str, at: set[int], flags: int) -> set[int]:
        """The positions behind those of ``at`` where one character, or an anchor, fits."""
        self._left -= len(at)
        if self._left < 0:
            raise ValueError(f"it takes more than {STEPS:,} steps on a name of {len(name)} characters")
        text = _spelled(op, value)
        fits = self._tests.get((text, flags))
        if fits is None:
            fits = self._tests[text, flags] = re.compile(text, flags & ~re.DEBUG)
        width = 0 if op == "AT" else 1
        return {p + width for p in at if fits.match(name, p)}


def _spelled(op: str, value: Any) -> str:
    """The expression for one character or anchor, as a person would write it."""
    match op:
        case "AT":
            return _ANCHORS[value.name]
        case "ANY":
            return "."
        case "LITERAL":
            return re.escape(chr(value))
        case "NOT_LITERAL":
            return f"[^{re.escape(chr(value))}]"
        case "RANGE":
            return f"{re.escape(chr(value[0]))}-{re.escape(chr(value[1]))}"
        case "CATEGORY":
            return _CATEGORIES[value.name]
    inside = "".join("^" if inner.name == "NEGATE" else _spelled(inner.name, v) for inner, v in value)
    return f"[{inside}]"


def _foreign(tree: Sequence[tuple[Any, Any]]) -> set[str]:
    """The names of operations that ``Pattern`` does not do."""
    found: set[str] = set()
    for op, value in tree:
        if op.name in _INNER:
            bodies = value[1] if op.name == "BRANCH" else [value[-1]]
            found = found.union(*(_foreign(body) for body in bodies))
        elif op.name not in _ONE | {"AT"}:
            found.add(op.name.lower().replace("_", " "))
    return found
