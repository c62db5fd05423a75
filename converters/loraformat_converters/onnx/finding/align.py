"""Names of one witness → names of the adapter's targets, by whole components and one rule for all.

A graph may name its modules from another root than the adapter: a wrapper around the model, a part of it. So the
graph has a prefix more, or the adapter has. Two rules that fit equally well are no evidence, nor is one that fits half of the
targets or fewer; what the rule of most does not reach is not found. A prefix with a number in it may hide a layer, and layer 1 is not layer 2: the adapter never has one
more, and the graph only where several names with layer numbers of their own fit (``0.auto_model.`` around a model).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
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
    fits = {rule: under(rule, wanted, names) for rule in rules_of(wanted, names)}
    most = max((len(found.names) for found in fits.values()), default=0)
    best = [found for found in fits.values() if len(found.names) == most]
    if len(best) == 1 and (most == len(wanted) or _of_most(best[0], wanted)):
        return best[0]
    return Alignment(rivals=tuple(sorted(found.rule for found in best)) if most == len(wanted) else ())


def _of_most(found: Alignment, wanted: Collection[str]) -> bool:
    """Whether a rule that leaves some names out is evidence for the others."""
    layered = sum(map(_numbered, found.names)) > 1
    return 2 * len(found.names) > len(wanted) and (layered or not _numbered("".join(found.prefix or ())))


def rules_of(wanted: Collection[str], names: Collection[str], among: Collection[str] = ()) -> set[Prefix]:
    """Every rule under which one of the wanted names is another name of the graph.

    Args:
        among: what the wanted are some of, where they are not all.
    """
    all_, short = among or wanted, set(wanted)
    layered = len(all_) > 1 and any(map(_numbered, all_))
    more = {prefix for name in names for prefix, rest in _cut(name) if rest in short}
    less = {prefix for name in wanted for prefix, rest in _cut(name) if rest in names}
    rules = {(prefix, "") for prefix in more if layered or not _numbered(prefix)}
    return rules | {("", prefix) for prefix in less if not _numbered(prefix)}


def under(prefix: Prefix, wanted: Iterable[str], names: Collection[str]) -> Alignment:
    """What one rule makes of the wanted names, as far as the graph has them."""
    more, less = prefix
    spelled = ((name, f"{more}{name.removeprefix(less)}") for name in wanted if name.startswith(less))
    return Alignment({name: other for name, other in spelled if other in names}, prefix)


def told(more: str, less: str) -> str:
    """A rule in words."""
    return f"with {more} in front" if more else f"without {less} in front" if less else ""


def _cut(name: str) -> Iterator[Prefix]:
    """A name in two, behind each of its dots.

    >>> list(_cut("a.b.c"))
    [('a.', 'b.c'), ('a.b.', 'c')]
    """
    at = name.find(".") + 1
    while at:
        yield name[:at], name[at:]
        at = name.find(".", at) + 1


def _numbered(name: str) -> bool:
    return any(component.isdigit() for component in name.split("."))
