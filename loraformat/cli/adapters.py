"""``[NAME=]ADAPTER[:WEIGHT]`` on a command line: adapters read, checked and given their strength."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraformat.errors import LoraFormatError, Problem, fault

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.base import Base

__all__ = ["Gathered", "Given", "gather", "open_both", "parse", "scales"]

_WEIGHT = re.compile(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")


@dataclass(frozen=True, slots=True)
class Given:
    """One argument, taken apart: a name (``default`` where none is given), a path, a weight."""

    path: str
    name: str = "default"
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Gathered:
    """The adapters by name, in order, and what their readers want said."""

    adapters: list[tuple[str, Adapter]] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


def parse(word: str) -> Given:
    """A path that exists is taken as it is; else a weight is a number after the last colon, a name ends at ``=``.

    Raises:
        LoraFormatError: LF-705 what stands behind the colon of a path that exists is no number.

    >>> parse("style=a.safetensors:0.5")
    Given(path='a.safetensors', name='style', weight=0.5)
    """
    if Path(word).exists():
        return Given(word)
    weighted = _WEIGHT.fullmatch(word)
    path, weight = (weighted[1], float(weighted[2])) if weighted else (word, 1.0)
    before, _, after = word.rpartition(":")
    if not weighted and any(part and Path(part).exists() for part in (before, before.partition("=")[2])):
        raise fault("LF-705", f"{after!r} is no weight of {before}", fix=f"a number, such as {before}:0.5")
    name, equals, rest = path.partition("=")
    if equals and not Path(path).exists():
        return Given(rest, name, weight)
    return Given(path, "default", weight)


def scales(items: Iterable[str], option: str = "--scale") -> dict[str, float]:
    """``PATTERN=NUMBER`` as a mapping; LF-705 where it is none."""
    found = {}
    for item in items:
        pattern, equals, number = item.rpartition("=")
        try:
            found[pattern] = float(number)
        except ValueError:
            equals = ""
        if not equals or not pattern:
            raise fault("LF-705", f"{option} {item!r} is not PATTERN=NUMBER", fix="such as '*.mlp.*=0.5'")
    return found


def open_both(
    words: Sequence[str],
    base_path: str,
    only: Sequence[str] = (),
    scale: Iterable[str] = (),
    origin: Base | None = None,
) -> tuple[Base, Gathered]:
    """The base and the adapters; where the two look swapped, the error says so.

    Args:
        origin: what the adapters were trained on, where it is known apart from the base: its shapes tell whose a tensor is.
    """
    from loraformat import registry

    try:
        base = registry.open_base(base_path)
        return base, gather(words, origin or base, only, scale)
    except LoraFormatError as error:
        raise _swapped(base_path, error) from None


def gather(words: Sequence[str], base: Base, only: Sequence[str] = (), scale: Iterable[str] = ()) -> Gathered:
    """Every adapter, read with the base at hand, its values checked, its strength applied.

    Raises:
        LoraFormatError: what reading says; LF-312 NaN or Inf; LF-705 two adapters of one name.
    """
    from loraformat import registry
    from loraformat.layout import ReadOptions
    from loraformat.strength import strengthen

    factors, out = scales(scale), Gathered()
    given = [parse(word) for word in words]
    if len(given) > 1 and len({g.name for g in given}) == 1:  # unnamed ones are told apart by their order
        given = [Given(g.path, f"{g.name}{i}", g.weight) for i, g in enumerate(given, 1)]
    if len({g.name for g in given}) < len(given):
        raise fault("LF-705", f"two adapters have one name: {', '.join(g.name for g in given)}")
    for item in given:
        reading = registry.read(item.path, options=ReadOptions(base=base))[0]
        out.warnings.extend(reading.warnings)
        _check_values(reading.adapter, item.path)
        out.adapters.append((item.name, strengthen(reading.adapter, item.weight, only, factors)))
    return out


def _swapped(base: str, error: LoraFormatError) -> LoraFormatError:
    """``error``, and, where the path given as the base is an adapter, a word that the two are swapped."""
    from loraformat import registry
    from loraformat.source import open_source

    try:
        _, evidence = registry.detect(open_source(base))
    except (LoraFormatError, OSError):
        return error
    said = Problem("LF-501", f"{base} is an adapter ({evidence})", fix="are adapter and base swapped?")
    return LoraFormatError([*error.problems, said])


def _check_values(adapter: Adapter, path: str) -> None:
    """NaN would spread through the model; an all-zero factor is only worth a word."""
    from loraformat.values import value_problems

    found = list(value_problems(adapter))
    if errors := [p for p in found if p.severity == "error"]:
        raise LoraFormatError(errors)
    if zero := len({p.where.rpartition(".")[0] for p in found}):
        text = f"note: {zero} of {len(adapter)} targets of {path} have a part that is all zero: it changes nothing"
        click.echo(text, err=True)
