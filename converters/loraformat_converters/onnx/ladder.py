"""Targets → sites. Every witness is asked; those that speak must agree; a name is matched by whole components.

A graph may name its modules from another root than the adapter (a wrapper around the model, a part of it). So the
names of one witness are aligned by one rule for all targets: the graph has a prefix more, or the adapter has.
Two rules that fit equally well, or a rule that fits some targets only, are no evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.names import nearest
from loraformat.resolve import Hints
from loraformat_converters.onnx.index import Index, Site
from loraformat_converters.onnx.names import RUNGS, names_of, same_module

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["Found", "climb"]


@dataclass(frozen=True)
class Found:
    """The sites of one target, all uses of one stored weight by one module, and what says so."""

    sites: tuple[Site, ...]
    evidence: tuple[str, ...]


def climb(index: Index, adapter: Adapter, hints: Hints) -> tuple[dict[str, Found], list[Problem], list[Problem]]:
    """(target → sites, unresolved, ambiguous)."""
    tables = {rung: _table(index.sites, rung) for rung in RUNGS}
    aligned = {rung: _align([_wanted(key, rung) for key in adapter], tables[rung].keys()) for rung in RUNGS}
    found: dict[str, Found] = {}
    unresolved: list[Problem] = hints.unused(adapter)
    ambiguous: list[Problem] = []
    for key, update in adapter.items():
        try:
            by_rung = _by_user(index, tables, key, hints)
            for rung in RUNGS:
                name = aligned[rung].get(_wanted(key, rung))
                if name is not None:
                    by_rung[f"{rung}: {name}"] = tables[rung][name]
            if not by_rung:
                raise _not_found(key, tables)
            found[key] = _agree(index, key, by_rung, embedding=update.op == "embedding")
        except LoraFormatError as error:
            into = ambiguous if error.problems[0].rule in ("LF-603", "LF-609") else unresolved
            into += error.problems
    _one_target_each(found, ambiguous)
    return found, unresolved, ambiguous


def _wanted(key: str, rung: str) -> str:
    """What a witness would call the target: the parameter for initializers, the module for the others."""
    return key if rung == "initializer" else key.rpartition(".")[0]


def _table(sites: Iterable[Site], rung: str) -> dict[str, list[Site]]:
    table: dict[str, list[Site]] = {}
    for site in sites:
        name = names_of(site, rung)
        if name is not None:
            table.setdefault(name, []).append(site)
    return table


def _align(wanted: list[str], known: Iterable[str]) -> dict[str, str]:
    """Wanted name → name in the graph, under the one rule that fits; exact names need not fit all."""
    names = set(known)
    exact = {name: name for name in wanted if name in names}
    if exact or not wanted:
        return exact
    first, rules = wanted[0], set()
    for name in names:
        if name.endswith(f".{first}"):
            rules.add((name.removesuffix(first), ""))
        elif first.endswith(f".{name}") and not any(c.isdigit() for c in first.removesuffix(name).split(".")):
            rules.add(("", first.removesuffix(name)))
    fits = [(more, less) for more, less in rules if all(_under(w, more, less) in names for w in wanted)]
    if len(fits) != 1:
        return {}
    return {name: str(_under(name, *fits[0])) for name in wanted}


def _under(name: str, more: str, less: str) -> str | None:
    """``name`` with the graph's prefix ``more``, or without its own prefix ``less``."""
    return f"{more}{name.removeprefix(less)}" if name.startswith(less) else None


def _by_user(
    index: Index, tables: Mapping[str, Mapping[str, list[Site]]], key: str, hints: Hints
) -> dict[str, list[Site]]:
    """The sites of the node, tensor or module that the user named; an error if there is none."""
    name = hints.mapped(key)
    if name is None:
        return {}
    sites = [site for site in index.sites if site.node.name == name]
    for table in tables.values():
        sites = sites or table.get(name, table.get(name.rpartition(".")[0], []))
    if not sites:
        known = [site.node.name for site in index.sites] + list(tables["initializer"])
        close = ", ".join(nearest(name, known)) or "none"
        raise fault(
            "LF-602",
            f"--names says {name}, which no weight or node of the graph is called; nearest: {close}",
            where=key,
        )
    return {f"user: {name}": sites}


def _agree(index: Index, key: str, by_rung: Mapping[str, list[Site]], *, embedding: bool) -> Found:
    """The sites that every witness means. A tensor's name means all its uses; a module's name only its own."""
    roots = {rung: {site.root_name for site in sites} for rung, sites in by_rung.items()}
    for rung, names in roots.items():
        if len(names) > 1:
            raise fault(
                "LF-603", f"{rung} means {len(names)} weights: {', '.join(sorted(names))}", where=key, fix=_map(key)
            )
    if len({next(iter(names)) for names in roots.values()}) > 1:
        said = "; ".join(f"{rung} → {next(iter(names))}" for rung, names in roots.items())
        raise fault("LF-603", f"two witnesses disagree: {said}", where=key, fix=_map(key))
    root = next(iter(next(iter(roots.values()))))
    by_module = [sites for rung, sites in by_rung.items() if not rung.startswith("initializer")]
    if by_module:
        sites = [s for s in by_module[0] if all(s in other for other in by_module[1:])] or by_module[0]
        return Found(tuple(_calls(index.uses(root), sites)), tuple(by_rung))
    sites = [s for s in index.uses(root) if (s.node.op_type == "Gather") == embedding]
    modules = {name for s in sites for rung in RUNGS if rung != "initializer" and (name := names_of(s, rung))}
    if len(modules) > 1 and not _one_module(modules):
        what = f"{root} is shared by {len(modules)} modules, {', '.join(sorted(modules)[:3])}"
        raise fault("LF-609", what, where=key, fix=_map(key))
    if not sites:
        uses = ", ".join(s.node.op_type for s in index.uses(root))
        raise fault("LF-608", f"{root} is used by {uses} only", where=key)
    return Found(tuple(sites), tuple(by_rung))


def _calls(uses: list[Site], sites: list[Site]) -> list[Site]:
    """The named sites, and the further calls of the same module with the same weight."""
    names = {name for s in sites for rung in RUNGS if rung != "initializer" and (name := names_of(s, rung))}

    def belongs(site: Site) -> bool:
        others = (names_of(site, rung) for rung in RUNGS if rung != "initializer")
        return any(other and same_module(name, other) for other in others for name in names)

    return [site for site in uses if site in sites or belongs(site)]


def _one_module(modules: set[str]) -> bool:
    first = min(modules, key=len)
    return all(same_module(first, other) for other in modules)


def _one_target_each(found: dict[str, Found], ambiguous: list[Problem]) -> None:
    owners: dict[int, str] = {}
    for key, place in list(found.items()):
        for site in place.sites:
            other = owners.setdefault(id(site), key)
            if other != key:
                ambiguous.append(Problem("LF-603", f"{other} means the node {site.node.name} too", key))


def _map(key: str) -> str:
    return f'say which: --names map.json with {{"{key}": "NODE OR WEIGHT"}}'


def _not_found(key: str, tables: Mapping[str, Mapping[str, list[Site]]]) -> LoraFormatError:
    spoken = {rung: len(table) for rung, table in tables.items() if table}
    close = [name for rung, table in tables.items() for name in nearest(_wanted(key, rung), table, 2)]
    what = f"no node or weight of the graph goes by this name ({spoken or 'the graph has no weights'} names); nearest: {', '.join(close) or 'none'}"
    return fault("LF-602", what, where=key, fix=_map(key))
