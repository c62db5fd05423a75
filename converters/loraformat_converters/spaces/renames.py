"""Other torch names of one model: those of a file, and those that transformers 5 gives them while it loads it.

An adapter that was trained in memory has the new names, the file of the base mostly the old ones. The rules are those of
transformers itself (``transformers.json``, written by ``make.py``), by the model's type and class in its ``config.json``:
first all renamings, then at most one conversion, in which rows are divided or joined, or a list of experts stacked.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraformat.naming.links import Link, Seat
from loraformat.naming.spaces import TORCH, Known
from loraformat_converters.spaces.conversions import Conversion, converted

__all__ = ["Renames", "newer"]

_DEPTH = 3  # an inner model is model.vision_model at most


@dataclass(frozen=True, slots=True)
class Rules:
    """Of one model.

    Attributes:
        rename: one after the other; of the alternatives of each the first that fits.
        convert: at most one, the first that fits.
    """

    rename: Sequence[Sequence[tuple[re.Pattern[str], str]]]
    convert: Sequence[Conversion]


class Renames:
    """transformers' own renamings between the versions of a model's code."""

    name = TORCH
    describes = "torch: names of older files, and those of transformers 5"

    def links(self, known: Known) -> Iterator[Link]:
        """See ``loraformat.spaces.Space``: ``here`` is the older name."""
        own, names = set(known.adapter), set(known.names)
        rules = _rules(known.config)
        told = f"transformers: {', '.join(rules)}"

        def wanted(link: Link) -> bool:
            here, there = link.here.name, link.there.name
            return (here in names and there in own) or (here in own and there in names)

        renamed = {older: _candidates(older, rules.values()) for older in own | names} if rules else {}
        for older, found in renamed.items():
            yield from (link for new in found - {older} if wanted(link := Link(Seat(older), Seat(new), told)))
        tables = [table.convert for table in rules.values() if table.convert]
        for link in converted(renamed, tables, known, told):
            if wanted(link):
                yield link


def newer(older: str, config: Mapping[str, Any]) -> set[str]:
    """What a parameter of an older file may be called in memory, by plain renamings; its own name too."""
    return _candidates(older, _rules(config).values())


def _candidates(older: str, tables: Iterable[Rules]) -> set[str]:
    """What the name may become by these rules, one list after the other: of a model, or of one inside it.

    The rules of an inner model see its own names only; which list is whose, transformers knows from the live modules. A
    candidate counts where the model has such a name.
    """
    found = {older}
    for table in tables:
        for name in tuple(found):
            words = name.split(".")
            for depth in range(min(_DEPTH, len(words))):
                scope, inner = words[:depth], ".".join(words[depth:])
                found.add(".".join([*scope, _renamed(inner, table)]))
    return found


def _renamed(name: str, table: Rules) -> str:
    """By every rule, each where it first fits (transformers 5.23.0 core_model_loading, rename_source_key)."""
    for alternatives in table.rename:
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
    lists = [
        Rules(
            [[(re.compile(old), new) for old, new in rule] for rule in entry["rename"]],
            [Conversion.of(*said) for said in entry["convert"]],
        )
        for entry in value["rules"]
    ]
    return {name: lists[index] for name, index in value["of"].items()}
