"""The span of several numbers, as a person reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

__all__ = ["span"]


def span(numbers: Iterable[float], shown: Callable[[float], str] = "{:.3g}".format) -> str:
    """The least and the greatest: one where they look the same, nothing of nothing.

    >>> span([6, 4, 5]), span([1.5, 1.5]), span([])
    ('4–6', '1.5', '')
    """
    known = list(numbers)
    return "–".join(dict.fromkeys(map(shown, (min(known), max(known))))) if known else ""
