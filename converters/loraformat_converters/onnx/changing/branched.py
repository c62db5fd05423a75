"""The adapter that somebody else put into a graph, found by what its nodes compute and not by what they are called.

PEFT's layers compute such branches when they are exported un-merged, and so do the models of Olive and of ONNX Runtime GenAI's
builder.
Each use of a weight has factors of its own here, though exporters store all B that are still zero as one tensor (measured
with torch 2.13's both exporters). Names only tell what the target is called.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator

from loraformat.adapter import Adapter
from loraformat.errors import LoraFormatError, Problem
from loraformat.updates import Update
from loraformat_converters.onnx.attaching.slot_names import key_of
from loraformat_converters.onnx.changing.computed import FIX, Branch, Branches
from loraformat_converters.onnx.finding.folded import recomputed
from loraformat_converters.onnx.finding.names import MODULES, modules_of, names_of, parameter_of
from loraformat_converters.onnx.finding.paths import stored_paths, unwrapped, wrapper
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.values import Values

__all__ = ["branched", "pairs"]

_FACTOR = re.compile(r"lora_(embedding_)?[AB]\b|lora_(down|up)\b")
"""How everybody names a factor; one that is found in no branch is told."""

_MAGNITUDE = re.compile(r"\blora_magnitude_vector\b")

_LAYER = re.compile(r"\.base_layer(_\d+)?$")
"""What PEFT (0.21.2) calls the layer that it puts its own around."""


def branched(index: Index, values: Values) -> Adapter | None:
    """The pairs beside the weights of a graph, with the scale as a ``factor``; None where there is none.

    Raises:
        LoraFormatError: LF-613 a tensor is called a factor and lies in no such branch, or one weight has two branches.
    """
    graph = Branches(index, values)
    found = _named(index, graph.found())
    used = {site.number for _, _, branch in found for site in (branch.a, branch.b)}
    problems = [*_lost(index, used), *_lengthless(index, found), *_rescaled(found), *_twice(found)]
    if problems:
        raise LoraFormatError(problems)
    targets: dict[str, Update] = {}
    for key, site, branch in found:  # a module that is called twice has two uses of one weight and of one pair
        targets.setdefault(key, graph.update(site, branch))
    return Adapter(dict(sorted(targets.items())), provenance={"verb": "extract"}) if targets else None


def pairs(index: Index, values: Values) -> list[tuple[str, Site, Branch]]:
    """(what the target is called, a use of its weight, the branch beside it); LF-613 where one weight has two branches."""
    found = _named(index, Branches(index, values).found())
    if problems := list(_twice(found)):
        raise LoraFormatError(problems)
    return found


def _lost(index: Index, used: Container[int]) -> Iterator[Problem]:
    """What goes by the name of a factor and was not found to be one: leaving it out would be another adapter."""
    for name in dict.fromkeys(value.name for value in index.graph.input):  # olive-ai 0.13 lists each twice
        root = index.roots.get(name)
        if _FACTOR.search(name) and (root is None or 0 in root.dims):
            what, fix = "it is fed to the model, which does not hold it", "convert the file that is fed"
            yield Problem("LF-613", what, name, fix)
    for site in index.sites:
        called = next((name for name in (site.root_name, *modules_of(site)) if _FACTOR.search(name)), None)
        made = site.scope.home(site.node.output[0], "constant") is None  # not for the norm of a DoRA
        if called and made and site.number not in used and site.known_operator and not site.vector:
            what = "it is called a factor, and is in no branch s·B·A·x beside a weight"
            yield Problem("LF-613", what, called, FIX)


def _lengthless(index: Index, found: list[tuple[str, Site, Branch]]) -> Iterator[Problem]:
    """Magnitudes by PEFT's name (0.21.2) that no DoRA has: without them a target would be left out, or be a plain pair."""
    stored = sorted(name for name in index.roots if _MAGNITUDE.search(name))
    doras = {key for key, _, branch in found if branch.ratio is not None}
    if len(stored) > len(doras):
        what = f"{len(stored)} magnitudes of DoRAs are stored, and {len(doras)} DoRAs are found"
        yield Problem("LF-613", what, stored[0], FIX)


def _rescaled(found: list[tuple[str, Site, Branch]]) -> Iterator[Problem]:
    """Pairs beside a kernel that a tool multiplied: onnxsim (0.8) does so with the g of a DoRA, and no name tells any more."""
    for key, site, branch in found:
        if branch.ratio is None and recomputed(site):
            what = (
                f"{site.node.name}: its weight is {site.root_name}, computed of W and, if this is a DoRA, its magnitude"
            )
            yield Problem("LF-613", what, key, FIX)


def _twice(found: list[tuple[str, Site, Branch]]) -> Iterator[Problem]:
    """Two adapters at once, or two weights by one name: which is meant, the graph does not say."""
    owners: dict[str, tuple[str, str, str]] = {}
    for key, site, branch in found:
        pair = (site.root_name, branch.a.root_name, branch.b.root_name)
        if (first := owners.setdefault(key, pair)) != pair:
            one = first[0] == pair[0]
            what = "two branches run beside this weight" if one else "two weights with branches go by this name"
            yield Problem("LF-613", what, key, FIX)


def _named(index: Index, found: Iterator[tuple[Site, Branch]]) -> list[tuple[str, Site, Branch]]:
    """Each with what its target is called: by the weight's own module, by the factors' names, else as the weight is stored."""
    scopes = filter(None, (names_of(site, "name_scopes") for site in index.sites))
    whole, outside = stored_paths(index), wrapper([*index.roots, *scopes])

    def key(site: Site, branch: Branch) -> str:
        stored = names_of(site, "initializer") or site.root_name
        full, called = (parameter_of(site, rung) for rung in MODULES)
        said = full or whole.get(site.number) or called or stored
        if said.endswith(f".{site.parameter}"):
            module = unwrapped(said.removesuffix(f".{site.parameter}"), outside)
            return f"{_LAYER.sub('', module)}.{site.parameter}"
        listed = key_of(branch.a.root_name)
        return listed[0] if listed else stored

    return [(key(site, branch), site, branch) for site, branch in found]
