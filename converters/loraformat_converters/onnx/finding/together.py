"""One adapter among the parts of one model: every target in every part that has its module, and no part passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from loraformat.errors import Problem
from loraformat.likeness import compare
from loraformat.resolve import Hints, Match, Resolution
from loraformat_converters.onnx.base import OnnxBase
from loraformat_converters.onnx.finding.doubt import Doubts, Model
from loraformat_converters.onnx.graph.index import Site

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["together"]


def together(models: Sequence[Model], adapter: Adapter, hints: Hints) -> Resolution:
    """Where every target lies, in all parts."""
    found = {model.file: model.base.resolve_part(adapter, hints, model.part) for model in models}
    targets = {key: places for key in adapter if (places := tuple(_places(key, found)))}
    doubts = {model.file: Doubts(model, found[model.file], adapter, hints) for model in models}
    unresolved: list[Problem] = []
    ambiguous = [_in(file, p, models) for file, r in found.items() for p in r.ambiguous]
    for key in adapter:
        failures = {f: p for f, r in found.items() for p in r.unresolved if p.where == key}
        told = [_in(file, p, models) for file, p in failures.items() if p.rule != "LF-602"]
        if told or (key not in targets and not any(p.where == key for p in ambiguous)):
            unresolved += told or [_nowhere(key, failures, models)]
        elif len(models) > 1:
            ambiguous += [problem for file in failures if (problem := doubts[file].of(key))]
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
        like = compare(one, two)
        return (like.same_weight and like.same_scale) or not (one.any() or two.any())
    first, second = (np.asarray(b.read(s.root_name), np.float32) for b, s in ((base, site), (other, twin)))
    return first.shape == second.shape and bool(np.allclose(first, second, rtol=1e-2, atol=1e-2 * np.abs(first).max()))
