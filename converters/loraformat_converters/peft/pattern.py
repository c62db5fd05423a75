"""Regular expressions out of a stranger's file, matched in bounded time.

Python's ``re`` backtracks: ``(a+)+$`` against forty letters takes hours, and neither a thread nor a signal can stop
it in a library. The ``regex`` package reads the same language and stops at a timeout. ``re`` judges first, so that
only what PEFT itself could compile is tried, and means the same.
"""

from __future__ import annotations

import functools
import re
import warnings

import regex

__all__ = ["LENGTH", "SECONDS", "Pattern"]

LENGTH = 4096
"""Characters of an expression."""

SECONDS = 0.25
"""Processor time of one match: a usual pattern and path take some microseconds."""

# Escaped characters and sets, in which a brace is only a brace.
_QUIET = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_BRACE = re.compile(r"\{(?!\d+(,\d*)?\}|,\d+\})")


class Pattern:
    """A compiled expression.

    Raises:
        ValueError: it is none, or is longer than ``LENGTH``, or holds a brace that counts nothing (``regex`` takes
            ``(ab){e}`` for "with errors", ``re`` for the letters); on matching: it needs more than ``SECONDS``.
    """

    def __init__(self, text: str) -> None:
        if len(text) > LENGTH:
            raise ValueError(f"{len(text)} characters; an expression has at most {LENGTH}")
        if _BRACE.search(_QUIET.sub("", text)):
            raise ValueError("a brace that is no repetition: write it as \\{")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # what ``re`` will read in another way one day: [[a], [a&&b]
                re.compile(text)
            self._compiled = regex.compile(text, regex.VERSION0)
        except (re.error, regex.error, Warning, OverflowError, RecursionError) as error:
            raise ValueError(str(error) or "nested too deeply") from None

    def starts(self, name: str) -> bool:
        """What ``re.match`` says."""
        return self._within(functools.partial(self._compiled.match, name))

    def fills(self, name: str) -> bool:
        """What ``re.fullmatch`` says."""
        return self._within(functools.partial(self._compiled.fullmatch, name))

    def _within(self, match: functools.partial[object]) -> bool:
        try:
            return match(timeout=SECONDS) is not None
        except TimeoutError:
            name = match.args[0]
            what = f"{self._compiled.pattern!r} needs more than {SECONDS:g} s on a name of {len(name)} characters"
            raise ValueError(what) from None
