"""Targets → sites. Every witness is asked, names first, then values; those that speak must agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.resolve import Hints
from loraformat_converters.onnx.finding.fingerprint import Finder
from loraformat_converters.onnx.finding.folded import require_own_values
from loraformat_converters.onnx.finding.names import MODULES, modules_of, names_of, of_one_module, same_module
from loraformat_converters.onnx.finding.part import Part
from loraformat_converters.onnx.finding.witness import Names, Witness, map_stub
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.site import Order
from loraformat_converters.onnx.graph.values import Values

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["PREFIX", "Found", "climb"]

PREFIX = "prefix: the graph's names are the adapter's"
"""How evidence begins that tells of a prefix which only one side has."""

_OF_TENSORS = frozenset({"initializer", "fingerprint", "sketch"})
"""The rungs that know the tensor only, and not which of the modules that share it is meant."""


@dataclass(frozen=True)
class Found:
    """The sites of one target, all uses of one stored weight by one module, or of its copies, and what says so.

    ``confidence`` is 1.0, or the cosine where nothing but a sketch speaks; ``rows`` are those of the target, where the
    weight holds several; ``order`` how they stand there, where values told it.
    """

    sites: tuple[Site, ...]
    evidence: tuple[str, ...]
    confidence: float = 1.0
    rows: tuple[int, int] | None = None
    order: Order = None


def climb(
    index: Index, adapter: Adapter, hints: Hints, values: Values, part: Part | None = None
) -> tuple[dict[str, Found], list[Problem], list[Problem]]:
    """(target → sites, unresolved, ambiguous).

    Args:
        part: where the graph is one of several that are one model, what its file's name says.
    """
    names, finder = Names(index, adapter, hints, part), Finder(index.sites, values, adapter, hints)
    found: dict[str, Found] = {}
    unresolved: list[Problem] = []
    ambiguous: list[Problem] = []
    for key, update in adapter.items():
        try:
            said = names.own(key) or _said(names, finder, key, embedding=update.op == "embedding")
            if not said:
                raise names.silence(key, finder.silence(key))
            found[key] = _agree(index, values, key, said)
        except LoraFormatError as error:
            into = ambiguous if error.problems[0].rule in ("LF-603", "LF-609") else unresolved
            into += error.problems
    _one_target_each(found, ambiguous)
    return found, unresolved, ambiguous


def _said(names: Names, finder: Finder, key: str, *, embedding: bool) -> list[Witness]:
    """What names say of a target, then values."""
    said = names.of(key, embedding=embedding)
    seen = finder.look(key, [site for witness in said for site in witness.sites])
    return said + [Witness(s.rung, s.told, s.sites, cosine=s.cosine, rows=s.rows, order=s.order) for s in seen]


def _agree(index: Index, values: Values, key: str, said: Sequence[Witness]) -> Found:
    """The sites that every witness means. A tensor's name means all its uses; a module's name only its own."""
    common = [site for site in said[0].sites if all(site in witness.sites for witness in said)]
    roots = sorted({site.root_name for site in common})
    if not common:
        told = "; ".join(f"{witness} → {witness.sites[0].node.name} ({witness.sites[0].root_name})" for witness in said)
        raise fault("LF-603", f"two witnesses disagree: {told}", where=key, fix=map_stub(key))
    if len(roots) > 1 and not _copies(values, common, said):
        what = f"{'; '.join(map(str, said))} means {len(roots)} weights: {', '.join(roots)}"
        raise fault("LF-603", what, where=key, fix=map_stub(key))
    require_own_values(key, common[0], said)
    if all(witness.rung in _OF_TENSORS and witness.by != "user" for witness in said):
        _require_one_module(index, key, common)
    rules = dict.fromkeys(f"{PREFIX} {witness.rule}" for witness in said if witness.rule)
    if any(witness.rung == "initializer" and witness.by == "user" for witness in said):
        sites = tuple(site for site in index.uses(roots[0]) if site.looks_up == common[0].looks_up)
    else:
        sites = tuple(site for root in roots for site in _calls(index, key, index.uses(root), common))
    rows = next((witness.rows for witness in said if witness.rows), None)
    order = next((witness.order for witness in said if witness.order), None)
    return Found(sites, (*map(str, said), *rules), max(witness.cosine for witness in said), rows, order)


def _copies(values: Values, sites: Sequence[Site], said: Sequence[Witness]) -> bool:
    """Whether a module has its weight in several copies: dynamo (torch 2.13) folds a turned one for each call of the module."""
    one_module = any(witness.rung in MODULES and not witness.by for witness in said)
    prints = {values.fingerprint(site) for site in sites}
    return one_module and len(prints) == 1 and None not in prints


def _require_one_module(index: Index, key: str, sites: Sequence[Site]) -> None:
    """Only the tensor's name speaks: LF-609 unless all its uses are one, or known to be calls of one module."""
    if len(sites) == 1 or _later_calls(index, sites):
        return
    modules = sorted({name for site in sites for name in modules_of(site)}, key=lambda name: (len(name), name))
    nameless = sum(not modules_of(site) for site in sites)
    if nameless or not any(all(of_one_module(first, site) for site in sites) for first in sites):
        names = ", ".join([*modules[:3], *[f"{nameless} without a module's name"][: bool(nameless)]])
        what = (
            f"{sites[0].root_name} is used {len(sites)} times ({names}): which of them the target means, nothing says"
        )
        fix = f'if it means all: --names map.json with {{"{key}": "{sites[0].root_name}"}}; else name the node'
        raise fault("LF-609", what, where=key, fix=fix)


def _later_calls(index: Index, sites: Sequence[Site]) -> bool:
    """Whether nodes are named as calls of the module that the tensor is named after, and no other parameter as theirs."""
    module, paths = sites[0].root_name.rpartition(".")[0], _paths(sites)
    owners = {name.rpartition(".")[0] for name in index.roots} - {module}
    return all(path and path not in owners and same_module(module, path) for path in paths)


def _calls(index: Index, key: str, uses: Sequence[Site], sites: Sequence[Site]) -> list[Site]:
    """The named sites, and the further calls of the same module with the same weight.

    Raises:
        LoraFormatError: LF-609 TorchScript (torch 2.13) calls the second call of ``fc`` as it calls a module ``fc_1``, and
            the graph has parameters of that; or a call has no name, as dynamo's (2.13) in the body of an If or a Loop.
    """
    alike = (use for use in uses if use not in sites and use.looks_up == sites[0].looks_up)
    nameless = next((use for use in alike if use.known_operator and not modules_of(use)), None)
    if nameless is not None and all(map(modules_of, sites)):
        what = f"{nameless.node.name or nameless.operator} reads {nameless.root_name} too, and has no module's name"
        fix = f'if the target means all its uses: --names map.json with {{"{key}": "{nameless.root_name}"}}'
        raise fault("LF-609", f"{what}: as another call of the target's, or of one that shares it", where=key, fix=fix)
    more = [use for use in uses if use not in sites and any(of_one_module(named, use) for named in sites)]
    owners = {name.rpartition(".")[0] for name in index.roots}
    doubtful = next((use for use in more if names_of(use, "node_name") in owners - _paths(sites)), None)
    if doubtful is not None:
        path = names_of(doubtful, "node_name")
        what = f"{doubtful.node.name} reads {doubtful.root_name} too: as a second call of the target's module, or as {path}"
        raise fault(
            "LF-609", what, where=key, fix="export with dynamo=True, which says which, or untie the two modules first"
        )
    return [use for use in uses if use in sites or use in more]


def _paths(sites: Sequence[Site]) -> set[str | None]:
    return {names_of(site, "node_name") for site in sites}


def _one_target_each(found: Mapping[str, Found], ambiguous: list[Problem]) -> None:
    owners: dict[int, list[str]] = {}
    for key, place in found.items():
        for site in place.sites:
            mine = owners.setdefault(site.number, [])
            both = [other for other in mine if _meet(place.rows, found[other].rows)]
            ambiguous += [Problem("LF-603", f"{other} means the node {site.node.name} too", key) for other in both]
            mine.append(key)


def _meet(one: tuple[int, int] | None, other: tuple[int, int] | None) -> bool:
    """Whether two targets of one weight have rows in common."""
    return one is None or other is None or (one[0] < other[1] and other[0] < one[1])
