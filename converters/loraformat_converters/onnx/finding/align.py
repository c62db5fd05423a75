"""Names of one witness → names of the adapter's targets, by whole components and one rule for all.

A graph may name its modules from another root than the adapter: a wrapper around the model, a part of it. So the
graph has a prefix more, or the adapter has. Two rules that fit equally well, or a rule that fits some targets only,
are no evidence. A prefix with a number in it may hide a layer, and layer 1 is not layer 2: the adapter never has one
more, and the graph only where several names with layer numbers of their own fit (``0.auto_model.`` around a model).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["Alignment", "Prefix", "align", "rules_of", "told", "under"]

Prefix = tuple[str, str]
"""(what the graph's names have more, what the adapter's have more); two empty texts where they are equal."""


@dataclass(frozen=True)
class Alignment:
    """Wanted name → name in the graph, with the rule; or the rules that fit equally well, in words."""

    names: Mapping[str, str] = field(default_factory=dict)
    prefix: Prefix | None = None
    rivals: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        """The rule in words; "" where the names are equal."""
        return "" if self.prefix is None else told(*self.prefix)


def align(wanted: Collection[str], known: Iterable[str]) -> Alignment:
    """The names of the graph that mean the wanted ones. Where some are equal, none is aligned.

    >>> align(["enc.q", "enc.k"], ["m.enc.q", "m.enc.k", "m.head"]).names
    {'enc.q': 'm.enc.q', 'enc.k': 'm.enc.k'}
    >>> align(["q"], ["encoder.q", "decoder.q"]).rivals
    ('with decoder. in front', 'with encoder. in front')
    """
    names = set(known)
    if any(name in names for name in wanted):
        return under(("", ""), wanted, names)
    if not wanted:
        return Alignment()
    first = next(iter(wanted))
    fits = [rule for rule in rules_of(first, wanted, names) if len(under(rule, wanted, names).names) == len(wanted)]
    if len(fits) == 1:
        return under(fits[0], wanted, names)
    return Alignment(rivals=tuple(sorted(told(*rule) for rule in fits)))


def rules_of(name: str, wanted: Collection[str], names: Iterable[str]) -> set[Prefix]:
    """Every rule under which ``name``, one of the wanted, is a name of the graph."""
    layered = len(wanted) > 1 and any(_numbered(other) for other in wanted)
    return {rule for other in names if (rule := _rule(name, other, layered)) is not None}


def under(prefix: Prefix, wanted: Iterable[str], names: Collection[str]) -> Alignment:
    """What one rule makes of the wanted names, as far as the graph has them."""
    more, less = prefix
    spelled = ((name, f"{more}{name.removeprefix(less)}") for name in wanted if name.startswith(less))
    return Alignment({name: other for name, other in spelled if other in names}, prefix)


def told(more: str, less: str) -> str:
    """A rule in words."""
    return f"with {more} in front" if more else f"without {less} in front" if less else ""


def _rule(wanted: str, name: str, layered: bool) -> Prefix | None:
    """The rule that makes two different names equal, where one ends with the other."""
    for longer, shorter in ((name, wanted), (wanted, name)):
        if longer.endswith(f".{shorter}"):
            prefix = longer.removesuffix(shorter)
            if _numbered(prefix) and not (layered and longer is name):
                return None
            return (prefix, "") if longer is name else ("", prefix)
    return None


def _numbered(name: str) -> bool:
    return any(component.isdigit() for component in name.split("."))
