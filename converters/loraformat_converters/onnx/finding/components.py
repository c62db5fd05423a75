"""One adapter among the components of a folder: each gets its share, by the component that a key names or by the names alone."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loraformat.checkpoint.pipeline import Pipeline
from loraformat.errors import Problem
from loraformat.names import join
from loraformat.resolve import Hints, Match, Resolution, in_component
from loraformat_converters.onnx.finding.doubt import Model
from loraformat_converters.onnx.finding.together import together

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["in_components"]

Components = Mapping[str | None, Sequence[Model]]


def in_components(components: Components, adapter: Adapter, hints: Hints) -> Resolution:
    """Where every target lies, in all components; LF-602 one that lies nowhere, LF-603 one that two components have."""
    targets: dict[str, tuple[Match, ...]] = {}
    unresolved: list[Problem] = hints.unused(adapter)
    ambiguous: list[Problem] = []
    for component, own in _shared_out(components, adapter, unresolved):
        prefix = component if adapter.components else None
        found = together(components[component], own, _within(hints, prefix))
        for key, places in found.targets.items():
            if join(prefix, key) in targets:
                what = f"{places[0].file} and {targets[key][0].file} both have it, and they are two components"
                fix = "the adapter's keys must name the component: COMPONENT:NAME"
                ambiguous.append(Problem("LF-603", what, key, fix))
            targets[join(prefix, key)] = places
        named = f"{component}: " if component and not prefix else ""
        unresolved += [in_component(replace(p, what=f"{named}{p.what}"), prefix) for p in found.unresolved]
        ambiguous += [in_component(p, prefix) for p in found.ambiguous]
    if not adapter.components:
        unresolved = _in_none(unresolved, targets)
    order = {key: targets[key] for key in adapter if key in targets}
    return Resolution(order, tuple(_once(unresolved)), tuple(_once(ambiguous)))


def _shared_out(
    components: Components, adapter: Adapter, problems: list[Problem]
) -> Iterator[tuple[str | None, Adapter]]:
    """(component, its share of the adapter, keys without the component)."""
    if not adapter.components:
        yield from ((component, adapter) for component in components)
        return
    for component in adapter.components:
        own = adapter.of_component(component)
        if component in components:
            yield component, own
            continue
        known = ", ".join(str(name) for name in components if name) or "none"
        what = f"the folder has no component {component}; it has: {known}"
        problems += [Problem("LF-602", what, join(component, key)) for key in own]


def _within(hints: Hints, component: str | None) -> Hints:
    """The hints for the keys of one component, without its name; of a pipeline's weights, those of the same component."""
    if component is None:
        return hints
    prefix = f"{component}:"
    names = {key.removeprefix(prefix): name for key, name in hints.names.items() if key.startswith(prefix)}
    axes = {pattern.removeprefix(prefix): spec for pattern, spec in hints.axes.items()}
    base = hints.base.components.get(component) if isinstance(hints.base, Pipeline) else hints.base
    return Hints(names, axes, base)


def _in_none(problems: Sequence[Problem], found: Container[str]) -> list[Problem]:
    """Where no component is named, one that has the target is enough; else one problem tells what all of them say."""
    said: dict[str, list[Problem]] = {}
    for problem in problems:
        said.setdefault(problem.where if problem.rule == "LF-602" else "", []).append(problem)
    others = said.pop("", [])
    missing = {key: told for key, told in said.items() if key not in found}
    return [*others, *(replace(told[0], what="; ".join(p.what for p in told)) for told in missing.values())]


def _once(problems: Iterable[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))
