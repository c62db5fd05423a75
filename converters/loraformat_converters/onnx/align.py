"""Names of one witness → names of the adapter's targets, by whole components and one rule for all.

A graph may name its modules from another root than the adapter: a wrapper around the model, a part of it. So the
graph has a prefix more, or the adapter has. Two rules that fit equally well, or a rule that fits some targets only,
are no evidence. A prefix with a number in it may hide a layer, and layer 1 is not layer 2: the adapter never has one
more, and the graph only where several names with layer numbers of their own fit (``0.auto_model.`` around a model).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["Alignment", "align"]


@dataclass(frozen=True)
class Alignment:
    """Wanted name → name in the graph, with the rule in words; or the rules that fit equally well."""

    names: Mapping[str, str] = field(default_factory=dict)
    rule: str = ""
    rivals: tuple[str, ...] = ()


def align(wanted: Collection[str], known: Iterable[str]) -> Alignment:
    """The names of the graph that mean the wanted ones. Where some are equal, none is aligned.

    >>> align(["enc.q", "enc.k"], ["m.enc.q", "m.enc.k", "m.head"]).names
    {'enc.q': 'm.enc.q', 'enc.k': 'm.enc.k'}
    >>> align(["q"], ["encoder.q", "decoder.q"]).rivals
    ('with decoder.', 'with encoder.')
    """
    names = set(known)
    exact = {name: name for name in wanted if name in names}
    if exact or not wanted:
        return Alignment(exact)
    first = next(iter(wanted))
    layered = len(wanted) > 1 and any(_numbered(name) for name in wanted)
    rules = {rule for name in names if (rule := _rule(first, name, layered)) is not None}
    fits = [rule for rule in rules if all(_under(name, *rule) in names for name in wanted)]
    told = sorted(f"with {more}" if more else f"without {less}" for more, less in fits)
    if len(fits) == 1:
        return Alignment({name: str(_under(name, *fits[0])) for name in wanted}, told[0])
    return Alignment(rivals=tuple(told))


def _rule(wanted: str, name: str, layered: bool) -> tuple[str, str] | None:
    """(prefix that the graph has more, prefix that the adapter has more), where one name ends with the other."""
    for longer, shorter in ((name, wanted), (wanted, name)):
        if longer.endswith(f".{shorter}"):
            prefix = longer.removesuffix(shorter)
            if _numbered(prefix) and not (layered and longer is name):
                return None
            return (prefix, "") if longer is name else ("", prefix)
    return None


def _numbered(name: str) -> bool:
    return any(component.isdigit() for component in name.split("."))


def _under(name: str, more: str, less: str) -> str | None:
    """``name`` with the graph's prefix ``more``, or without its own prefix ``less``."""
    return f"{more}{name.removeprefix(less)}" if name.startswith(less) else None
