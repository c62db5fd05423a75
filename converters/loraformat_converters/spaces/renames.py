"""Other torch names of one model: those of a file, and those that transformers 5 gives them while it loads it.

An adapter that was trained in memory has the new names, the file of the base mostly the old ones. The rules are those of
transformers itself (``transformers.json``, written by ``make.py``), by the model's type and class in its ``config.json``.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraformat.naming.links import Link, Seat
from loraformat.naming.spaces import TORCH, Known

__all__ = ["Renames"]

Rules = Sequence[Sequence[tuple["re.Pattern[str]", str]]]
"""One after the other; of the alternatives of a rule the first that fits."""


class Renames:
    """transformers' own renamings between the versions of a model's code."""

    name = TORCH
    describes = "torch: names of older files, and those of transformers 5"

    def links(self, known: Known) -> Iterator[Link]:
        """See ``loraformat.spaces.Space``: ``here`` is the older name."""
        own, names = set(known.adapter), set(known.names)
        rules = _rules(known.config)
        told = f"transformers: {', '.join(rules)}"
        for older in own | names:
            for newer in _candidates(older, rules.values()):
                if (older in names and newer in own) or (older in own and newer in names):
                    yield Link(Seat(older), Seat(newer), told)


def _candidates(older: str, lists: Iterable[Rules]) -> set[str]:
    """What the name may become by these rules, one list after the other: of a model, or of the one inside it.

    The rules of an inner model see its own names only; which list is whose, transformers knows from the live modules. A
    candidate counts where the model has such a name.
    """
    found = {older}
    for rules in lists:
        for name in tuple(found):
            scope, _, inner = name.partition(".")
            found |= {_renamed(name, rules), f"{scope}.{_renamed(inner, rules)}"}
    return found - {older}


def _renamed(name: str, rules: Rules) -> str:
    """By every rule, each where it first fits (transformers 5.23.0 core_model_loading, rename_source_key)."""
    for alternatives in rules:
        fits = ((pattern, replacement) for pattern, replacement in alternatives if pattern.search(name))
        for pattern, replacement in itertools.islice(fits, 1):
            name = pattern.sub(replacement, name, count=1)
    return name


def _rules(config: Mapping[str, Any]) -> dict[str, Rules]:
    """The rules that may be meant: of the model's class, of its plain model's class, of its type and those inside it."""
    table = _table()
    wanted = list(_types(config))
    for name in config.get("architectures") or ():
        stem = str(name).partition("For")[0]
        wanted += [str(name), f"{stem}Model", stem]
    return {name: table[name] for name in dict.fromkeys(wanted) if name in table}


def _types(config: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for value in config.values():
        if isinstance(value, dict):
            yield from _types(value)


@functools.cache
def _table() -> dict[str, Rules]:
    value = json.loads(Path(__file__).with_name("transformers.json").read_text(encoding="utf-8"))
    lists = [[[(re.compile(old), new) for old, new in rule] for rule in rules] for rules in value["rules"]]
    return {name: lists[index] for name, index in value["of"].items()}
