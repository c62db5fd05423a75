"""What a terminal shows and a pipe carries: problems, tables, JSON."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import click

from loraformat.errors import Problem

__all__ = [
    "alike",
    "command",
    "counted",
    "echo_json",
    "echo_line",
    "lines_of",
    "lost",
    "printable",
    "starred",
    "table",
    "warn",
]

_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(\.\d+)?(e[+-]?\d+)?(?![A-Za-z0-9])")
_SHOWN = 3


def echo_json(value: Any) -> None:
    """JSON on stdout, for people and programs: two spaces, keys as given."""
    _echo(value, indent=2)


def echo_line(value: Any) -> None:
    """JSON on one line of stdout, there at once."""
    _echo(value, indent=None)


def _echo(value: Any, indent: int | None) -> None:
    """Beyond ASCII only where stdout takes all of Unicode: its own escapes are not those of JSON."""
    import json

    spelled = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    click.echo(json.dumps(value, indent=indent, ensure_ascii=not spelled, allow_nan=False))


def counted(number: int, noun: str) -> str:
    """``1 target``, ``18 targets``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """A stranger's text on one line of a terminal: its control characters are shown, not obeyed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def starred(text: str) -> str:
    """The text with every number as ``*``: what the layers of a model have in common.

    >>> starred("layers.11.q_proj is off by 1.5e-03")
    'layers.*.q_proj is off by *'
    """
    return _NUMBER.sub("*", text)


def command(*words: str) -> str:
    """A command to go on with, as it is typed.

    >>> command("info", "my adapter")
    "loraformat info 'my adapter'"
    """
    return shlex.join(("loraformat", *words))


def alike(texts: Iterable[str]) -> Iterator[str]:
    """Texts that differ only in their numbers as one.

    >>> list(alike(["h.0.q is tied", "h.1.q is tied", "1 file is copied"]))
    ['2 × h.*.q is tied', '1 file is copied']
    """
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(starred(text), []).append(text)
    for text, group in groups.items():
        yield f"{len(group)} × {text}" if len(group) > 1 else group[0]


def lines_of(problems: Iterable[Problem]) -> list[str]:
    """Problems for a terminal, those of one kind told once, with the first of the other places."""
    return [_told(group) for group in _kinds(list(problems))]


def warn(problems: Iterable[Problem]) -> None:
    """Warnings on stderr."""
    for line in lines_of(problems):
        click.echo(line, err=True)


def lost(share: float) -> str:
    """What a result lacks of what was asked for; nothing where that is only the rounding of its dtype.

    >>> lost(0.12345), lost(3e-8)
    ('lost 12.3 %', 'exact')
    """
    return f"lost {share * 100:.3g} %" if share > 1e-7 else "exact"


def table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows of equal length as lines, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _kinds(problems: Sequence[Problem]) -> list[list[Problem]]:
    """One fault of a weight that every layer has, with the layer's own numbers; or one text at places of any kind."""
    texts: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for problem in problems:
        texts.setdefault(_fault(problem), set()).add(_text(problem))
    kinds: dict[tuple[str, ...], list[Problem]] = {}
    for problem in problems:
        fault = _fault(problem)
        kinds.setdefault(fault if len(texts[fault]) > 1 else ("one text", *_text(problem)), []).append(problem)
    return list(kinds.values())


def _fault(problem: Problem) -> tuple[str, ...]:
    return problem.rule, problem.severity, starred(problem.what.partition(";")[0]), starred(problem.where)


def _text(problem: Problem) -> tuple[str, ...]:
    return problem.rule, problem.severity, problem.what, problem.fix


def _told(group: Sequence[Problem]) -> str:
    first, *more = group
    if not more:
        return _shown(first)
    if {_text(problem) for problem in more} == {_text(first)}:
        return _shown(replace(first, where=_places(group)))
    others = ", ".join(printable(problem.where) for problem in more[:_SHOWN])
    return f"{_shown(first)}\n        and {len(more)} more like it: {others}{'…' if len(more) > _SHOWN else ''}"


def _places(group: Sequence[Problem]) -> str:
    count = len(group) if len(group) <= _SHOWN else _SHOWN - 1
    rest = len(group) - count
    return ", ".join(problem.where for problem in group[:count]) + (f" and {rest} more" if rest else "")


def _shown(problem: Problem) -> str:
    """None of its fields can begin a line of its own. click takes the colour off a pipe."""
    what, where, fix = map(printable, (problem.what, problem.where, problem.fix))
    text = str(replace(problem, what=what, where=where, fix=fix))
    colour = "red" if problem.severity == "error" else "yellow"
    return click.style(problem.rule, fg=colour) + text.removeprefix(problem.rule)
