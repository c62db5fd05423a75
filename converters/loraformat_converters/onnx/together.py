"""One adapter among the parts of one model: every target in every part that has its module, and no part passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from loraformat.errors import Problem
from loraformat.resolve import Hints, Match, Resolution
from loraformat.sketch import ACCEPT, cosine
from loraformat_converters.onnx.base import OnnxBase
from loraformat_converters.onnx.index import Site
from loraformat_converters.onnx.names import RUNGS, modules_of, parameter_of
from loraformat_converters.onnx.part import Part

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.updates import Update

__all__ = ["Model", "together"]


@dataclass(frozen=True)
class Model:
    """One file: its path in the folder, what it holds, and what its name says among the parts of its model."""

    file: str
    base: OnnxBase
    part: Part | None


def together(models: Sequence[Model], adapter: Adapter, hints: Hints) -> Resolution:
    """Where every target lies, in all parts."""
    found = {model.file: model.base.resolve_part(adapter, hints, model.part) for model in models}
    targets = {key: places for key in adapter if (places := tuple(_places(key, found)))}
    unresolved: list[Problem] = []
    ambiguous = [_in(file, p, models) for file, r in found.items() for p in r.ambiguous]
    for key in adapter:
        failures = {f: p for f, r in found.items() for p in r.unresolved if p.where == key}
        told = [_in(file, p, models) for file, p in failures.items() if p.rule != "LF-602"]
        if told or key not in targets:
            unresolved += told or [_nowhere(key, failures, models)]
        elif len(models) > 1:
            ambiguous += [p for m in models if m.file in failures and (p := _doubt(key, m, found, adapter, hints))]
            ambiguous += _strangers(key, targets[key], models)
    return Resolution(targets, tuple(unresolved), tuple(ambiguous))


def _places(key: str, found: Mapping[str, Resolution]) -> list[Match]:
    return [replace(m, file=file) for file, r in found.items() for m in r.targets.get(key, ())]


def _in(file: str, problem: Problem, models: Sequence[Model]) -> Problem:
    return replace(problem, what=f"{file}: {problem.what}") if len(models) > 1 else problem


def _nowhere(key: str, failures: Mapping[str, Problem], models: Sequence[Model]) -> Problem:
    """No part has it: what the parts say that it should be in, or all."""
    likely = [m.file for m in models if m.part is None or m.part.holds(key)] or list(failures)
    problems = [_in(file, failures[file], models) for file in likely if file in failures]
    return replace(problems[0], what="; ".join(dict.fromkeys(p.what for p in problems)))


def _doubt(key: str, model: Model, found: Mapping[str, Resolution], adapter: Adapter, hints: Hints) -> Problem | None:
    """LF-603 where a part in which the target was not found may have it all the same.

    It has not, if its file's name says so, or if its weights were compared by their values. Else every weight that could
    be the target must have a name, and a name that is another target's, or like no target's.
    """
    part = model.part
    if part is None or part.holds(key) is False or _has_values(key, adapter[key], hints):
        return None
    sites, taken = model.base.index.sites, _names(_found_sites(found[model.file]))
    for rung in RUNGS:
        names = {name for site in sites if (name := parameter_of(site, rung))}
        if other := part.doubt(key, list(adapter), names, taken):
            what = f"{model.file} has {other}: whether that is the target, its name does not say"
            return Problem("LF-603", what, key, f'if it is: --names map.json with {{"{key}": "{other}"}}')
    shape = adapter[key].matrix_shape()
    nameless = [site for site in sites if model.base.values.shape(site) == shape and not _named(site)]
    if not nameless or shape is None:
        return None
    what = f"{model.file} has {len(nameless)} weights of its shape without a module's name: it may be one of them"
    return Problem("LF-603", what, key, "--base CHECKPOINT tells by the values, and so do sketches (loraformat bind)")


def _has_values(key: str, update: Update, hints: Hints) -> bool:
    return update.sketch is not None or (hints.base is not None and key in hints.base.parameters())


def _found_sites(resolution: Resolution) -> list[Site]:
    return [match.handle for places in resolution.targets.values() for match in places]


def _names(sites: Sequence[Site]) -> set[str]:
    return {name for site in sites for rung in RUNGS if (name := parameter_of(site, rung))}


def _named(site: Site) -> bool:
    """Whether anything says which module the weight is of; ``onnx::MatMul_12`` and ``val_3`` are no names."""
    return bool(modules_of(site)) or site.root_name.endswith(f".{site.parameter}")


def _strangers(key: str, places: Sequence[Match], models: Sequence[Model]) -> list[Problem]:
    """LF-603 where two parts have different weights by the target's name: then it means one of them, or neither."""
    bases = {model.file: model.base for model in models}
    first = places[0]
    others = {match.file: match for match in places if match.file != first.file}
    return [
        Problem(
            "LF-603", f"{first.file} and {file} have different weights by its name", key, "give the file that is meant"
        )
        for file, match in others.items()
        if not _same(bases[first.file], first.handle, bases[file], match.handle)
    ]


def _same(base: OnnxBase, site: Site, other: OnnxBase, twin: Site) -> bool:
    """Whether two weights are one, up to casts and quantisation."""
    one, two = base.values.sketch(site), other.values.sketch(twin)
    if one is not None and two is not None:
        return cosine(one, two) >= ACCEPT or not (one.any() or two.any())
    first, second = (np.asarray(b.read(s.root_name), np.float32) for b, s in ((base, site), (other, twin)))
    return first.shape == second.shape and bool(np.allclose(first, second, rtol=1e-2, atol=1e-2 * np.abs(first).max()))
