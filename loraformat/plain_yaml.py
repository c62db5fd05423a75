"""The plain members of a YAML file that a tool dumped: numbers, booleans and words, each on a line of its own.

That is all that a layout asks of such a file, and no reason for a parser of YAML: what is written in another way is not
found, and then asked for.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["scalars", "section"]

_SCALAR = re.compile(r"^(\w+): *(?:(true|false)|(-?\d+)|(-?\d+\.\d*(?:e[+-]?\d+)?)|([\w./-]+)) *$", re.MULTILINE)


def scalars(text: str | None) -> dict[str, Any]:
    """Name → value of the plain members of a YAML mapping.

    >>> scalars("rank: 8\\nname: a.b\\nnested:\\n  rank: 9\\n")
    {'rank': 8, 'name': 'a.b'}
    """
    found: dict[str, Any] = {}
    for name, boolean, integer, number, word in _SCALAR.findall(text or ""):
        found[name] = boolean == "true" if boolean else int(integer) if integer else float(number) if number else word
    return found


def section(text: str | None, name: str) -> str:
    """The mapping that is the member ``name``, as a text of its own; empty where there is none.

    >>> section("a:\\n  rank: 8\\n  of:\\n    rank: 9\\nb: 1\\n", "a")
    'rank: 8\\nof:\\n  rank: 9\\n'
    """
    match = re.search(rf"^{re.escape(name)}:\n((?:  .*\n)*)", text or "", re.MULTILINE)
    return re.sub(r"^  ", "", match[1], flags=re.MULTILINE) if match else ""
