"""Targets → sites. Every witness is asked; those that speak must agree; a name is matched by whole components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.names import nearest
from loraformat.resolve import Hints
from loraformat_converters.onnx.align import Alignment, align
from loraformat_converters.onnx.index import Index, Site
from loraformat_converters.onnx.names import RUNGS, modules_of, names_of, own_copy, same_module

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["PREFIX", "Found", "climb"]

PREFIX = "prefix: the graph's names are the adapter's"
"""How evidence begins that tells of a prefix which only one side has."""

Table = Mapping[str, Sequence[Site]]


@dataclass(frozen=True)
class Witness:
    """What one rung says about one target: a name, and the sites that go by it.

    ``by`` the user, where he said it; ``rule`` says how the graph's names differ from the adapter's.
    """

    rung: str
    name: str
    sites: tuple[Site, ...]
    by: str = ""
    rule: str = ""

    def __str__(self) -> str:
        return f"{self.by or self.rung}: {self.name}"


@dataclass(frozen=True)
class Found:
    """The sites of one target, all uses of one stored weight by one module, and what says so."""

    sites: tuple[Site, ...]
    evidence: tuple[str, ...]


def climb(index: Index, adapter: Adapter, hints: Hints) -> tuple[dict[str, Found], list[Problem], list[Problem]]:
    """(target → sites, unresolved, ambiguous)."""
    tables = {rung: _table(index.sites, rung) for rung in RUNGS}
    aligned = {rung: align([n for key in adapter if (n := _wanted(key, rung))], tables[rung]) for rung in RUNGS}
    found: dict[str, Found] = {}
    unresolved: list[Problem] = hints.unused(adapter)
    ambiguous: list[Problem] = []
    for key, update in adapter.items():
        try:
            said = _said(index, tables, aligned, key, hints)
            found[key] = _agree(index, key, _of_kind(said, update.op == "embedding"))
        except LoraFormatError as error:
            into = ambiguous if error.problems[0].rule in ("LF-603", "LF-609") else unresolved
            into += error.problems
    _one_target_each(found, ambiguous)
    return found, unresolved, ambiguous


def _wanted(key: str, rung: str) -> str:
    """What a witness would call the target: a tensor the parameter, a module itself, or "".

    A module's operator uses its ``weight``; which operator would use another parameter, no name tells.
    """
    if rung == "initializer":
        return key
    module, _, parameter = key.rpartition(".")
    return module if parameter == "weight" else ""


def _table(sites: Sequence[Site], rung: str) -> Table:
    """Name → sites. The copy that a merge made for a target is its weight, whatever else goes by the old name."""
    stored: dict[str, list[Site]] = {}
    copied: dict[str, list[Site]] = {}
    for site in sites:
        name = names_of(site, rung)
        if name is not None:
            own = rung == "initializer" and own_copy(site.root_name)
            (copied if own else stored).setdefault(name, []).append(site)
    return {**stored, **copied}


def _said(
    index: Index, tables: Mapping[str, Table], aligned: Mapping[str, Alignment], key: str, hints: Hints
) -> list[Witness]:
    """What each witness says about one target; an error if none does, or one cannot choose."""
    said = _by_user(index, tables, key, hints)
    for rung in RUNGS:
        name = aligned[rung].names.get(_wanted(key, rung))
        if name is not None:
            said.append(Witness(rung, name, tuple(tables[rung][name]), rule=aligned[rung].rule))
    if said:
        return said
    for rung in RUNGS:
        if aligned[rung].rivals and _wanted(key, rung):
            what = f"{rung} fits in {len(aligned[rung].rivals)} ways: {', '.join(aligned[rung].rivals)}"
            raise fault("LF-603", what, where=key, fix=_map(key))
    raise _not_found(key, tables)


def _by_user(index: Index, tables: Mapping[str, Table], key: str, hints: Hints) -> list[Witness]:
    """What the user named: a node, or what any rung calls a tensor or module; an error if nothing goes by that name."""
    name = hints.mapped(key)
    if name is None:
        return []
    nodes = tuple(site for site in index.sites if site.node.name == name)
    said = [Witness("node", name, nodes, "user")] if nodes else []
    for rung in RUNGS if not nodes else ():
        spelled = name if name in tables[rung] else _wanted(name, rung)
        if spelled in tables[rung]:
            # A prefix map tells how names are spelled; only a name stated by itself means every use of a tensor.
            by = "user" if key in hints.names else f"user, {rung}"
            said.append(Witness(rung, spelled, tuple(tables[rung][spelled]), by))
    if not said:
        known = [site.node.name for site in index.sites] + list(tables["initializer"])
        close = ", ".join(nearest(name, known)) or "none"
        what = f"--names says {name}, which no weight or node of the graph is called; nearest: {close}"
        raise fault("LF-602", what, where=key)
    return said


def _of_kind(said: Sequence[Witness], embedding: bool) -> list[Witness]:
    """Without the look-ups where the target multiplies, and the other way round: a tied weight is used by both.

    A tensor's name that is left without a site says nothing, unless nobody else speaks.
    """
    left = []
    for witness in said:
        right = tuple(s for s in witness.sites if (s.node.op_type == "Gather") == embedding)
        if right or witness.rung != "initializer":
            left.append(replace(witness, sites=right or witness.sites))
    return left or list(said)


def _agree(index: Index, key: str, said: Sequence[Witness]) -> Found:
    """The sites that every witness means. A tensor's name means all its uses; a module's name only its own."""
    for witness in said:
        roots = sorted({site.root_name for site in witness.sites})
        if len(roots) > 1:
            what = f"{witness} means {len(roots)} weights: {', '.join(roots)}"
            raise fault("LF-603", what, where=key, fix=_map(key))
    common = [site for site in said[0].sites if all(site in witness.sites for witness in said)]
    if not common:
        told = "; ".join(f"{witness} → {witness.sites[0].node.name} ({witness.sites[0].root_name})" for witness in said)
        raise fault("LF-603", f"two witnesses disagree: {told}", where=key, fix=_map(key))
    if all(witness.rung == "initializer" and witness.by != "user" for witness in said):
        _require_one_module(key, common)
    rules = dict.fromkeys(f"{PREFIX} {witness.rule}" for witness in said if witness.rule)
    return Found(tuple(_calls(index.uses(common[0].root_name), common)), (*map(str, said), *rules))


def _require_one_module(key: str, sites: Sequence[Site]) -> None:
    """Only the tensor's name speaks: LF-609 unless all its uses are one, or known to be calls of one module."""
    if len(sites) == 1:
        return
    modules = sorted({name for site in sites for name in modules_of(site)}, key=lambda name: (len(name), name))
    nameless = sum(not modules_of(site) for site in sites)
    if nameless or any(not same_module(modules[0], other) for other in modules):
        names = ", ".join([*modules[:3], *[f"{nameless} without a module's name"][: bool(nameless)]])
        what = (
            f"{sites[0].root_name} is used {len(sites)} times ({names}): which of them the target means, nothing says"
        )
        fix = f'if it means all: --names map.json with {{"{key}": "{sites[0].root_name}"}}; else name the node'
        raise fault("LF-609", what, where=key, fix=fix)


def _calls(uses: Sequence[Site], sites: Sequence[Site]) -> list[Site]:
    """The named sites, and the further calls of the same module with the same weight."""
    names = {name for site in sites for name in modules_of(site)}

    def belongs(site: Site) -> bool:
        return any(same_module(name, other) for other in modules_of(site) for name in names)

    return [site for site in uses if site in sites or belongs(site)]


def _one_target_each(found: Mapping[str, Found], ambiguous: list[Problem]) -> None:
    owners: dict[int, str] = {}
    for key, place in found.items():
        for site in place.sites:
            other = owners.setdefault(site.number, key)
            if other != key:
                ambiguous.append(Problem("LF-603", f"{other} means the node {site.node.name} too", key))


def _map(key: str) -> str:
    return f'say which: --names map.json with {{"{key}": "NODE OR WEIGHT"}}'


def _not_found(key: str, tables: Mapping[str, Table]) -> LoraFormatError:
    spoken = ", ".join(f"{len(table)} {rung}" for rung, table in tables.items() if table) or "it has no weights"
    close = [n for rung, table in tables.items() if (name := _wanted(key, rung)) for n in nearest(name, table, 2)]
    what = f"no node or weight of the graph goes by this name ({spoken}); nearest: {', '.join(close) or 'none'}"
    return fault("LF-602", what, where=key, fix=_map(key))
