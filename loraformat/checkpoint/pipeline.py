"""A pipeline of diffusers as one base: a checkpoint a folder beside ``model_index.json``, each with names of its own.

An adapter's keys name the component (``unet:…``), and so does every name here. A merge writes a complete pipeline: the
components that change, and everything else as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat import canonical
from loraformat.atomic import Writer, write_folder
from loraformat.base import Options, Parameter
from loraformat.checkpoint.base import Checkpoint
from loraformat.checkpoint.folder import is_weights, json_object
from loraformat.checkpoint.output import Output, copy_file
from loraformat.checkpoint.task import Merging, identity, seen
from loraformat.errors import Problem
from loraformat.folders import files_in
from loraformat.names import join
from loraformat.outputs import check_free, check_room
from loraformat.parted import check_outside, norms_by_key, plans_of, share, whole_plan
from loraformat.plan import Job, Outcome, Plan
from loraformat.resolve import Hints, Match, Resolution, in_component

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.axes import Placement
    from loraformat.tiles import Norms, Tensor
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Pipeline", "kind"]

INDEX = "model_index.json"


class _Kind:
    """A folder with ``model_index.json`` and checkpoints in the folders that it lists."""

    name = "pipeline"
    describes = "pipeline of diffusers (a folder with model_index.json and a checkpoint for each component)"

    def recognises(self, path: Path) -> bool:
        return (path / INDEX).is_file() and any(is_weights(path / name) for name in _listed(path))

    def open(self, path: Path) -> Pipeline:
        return Pipeline(path)


kind = _Kind()


def _listed(path: Path) -> Iterator[str]:
    """The components of ``model_index.json`` that have a folder."""
    names = (name for name in json_object(path / INDEX) if not name.startswith("_"))
    return (name for name in names if name.isidentifier() and (path / name).is_dir())


class Pipeline:
    """An opened pipeline; ``components``: name → its checkpoint."""

    verbs = frozenset({"merge"})

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = files_in(path)
        self.components = {name: Checkpoint(path / name) for name in _listed(path) if is_weights(path / name)}

    def parameters(self) -> Mapping[str, Parameter]:
        """Every tensor, as ``COMPONENT:NAME``."""
        found = ((join(c, name), p) for c, base in self.components.items() for name, p in base.parameters().items())
        return {name: replace(parameter, name=name) for name, parameter in found}

    def stored(self) -> Iterator[Path]:
        """See ``loraformat.base.Stored``."""
        return (path for base in self.components.values() for path in base.stored())

    def ties(self) -> Mapping[str, str]:
        """See ``loraformat.base.Tying``."""
        return {join(c, one): join(c, two) for c, base in self.components.items() for one, two in base.ties().items()}

    def describe(self) -> Mapping[str, Any]:
        """kind, components (name → its folder), models (component → see ``loraformat.description``)."""
        models = {name: dict(base.describe()) for name, base in self.components.items()}
        return {"kind": "pipeline", "components": {name: [name] for name in models}, "models": models}

    def linears(self, hints: Hints) -> Mapping[str, Placement | None]:
        """As each component has them."""
        return {
            join(c, name): place
            for c, base in self.components.items()
            for name, place in base.linears(_within(hints, c)).items()
        }

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """The values of ``COMPONENT:NAME``."""
        component, _, tensor = name.partition(":")
        return self.components[component].read(tensor, rows)

    def dequantised(self, name: str) -> Tensor | None:
        """See ``loraformat.base.FewBits``."""
        component, _, tensor = name.partition(":")
        return self.components[component].dequantised(tensor)

    def requantised(
        self, name: str, updates: Sequence[Update], norms: Norms | None = None
    ) -> Iterator[tuple[tuple[int, int], Array]] | None:
        """See ``loraformat.base.FewBits``."""
        component, _, tensor = name.partition(":")
        return self.components[component].requantised(tensor, updates, norms)

    def resolve(self, adapter: Adapter, hints: Hints) -> Resolution:
        """Every target in the component that its key names; of keys that name none, in the one that has all of them."""
        if not adapter.components:
            return self._resolve_unnamed(adapter, hints)
        targets: dict[str, tuple[Match, ...]] = {}
        unresolved, ambiguous = hints.unused(adapter), []
        for component in adapter.components:
            own = adapter.of_component(component)
            if component not in self.components:
                what = f"the pipeline has no component {component}; it has: {', '.join(self.components) or 'none'}"
                unresolved += [Problem("LF-602", what, join(component, key)) for key in own]
                continue
            found = self._in(component, own, _within(hints, component))
            targets |= {join(component, key): places for key, places in found.targets.items()}
            unresolved += [in_component(p, component) for p in found.unresolved]
            ambiguous += [in_component(p, component) for p in found.ambiguous]
        order = {key: targets[key] for key in adapter if key in targets}
        return Resolution(order, tuple(unresolved), tuple(ambiguous))

    def _resolve_unnamed(self, adapter: Adapter, hints: Hints) -> Resolution:
        found = {c: self._in(c, adapter, hints) for c in self.components}
        whole = [c for c, own in found.items() if not own.unresolved and not own.ambiguous]
        if len(whole) == 1:
            return found[whole[0]]
        fix = "the adapter's keys must name the component: COMPONENT:NAME"
        if whole:
            what = f"{' and '.join(whole)} have each of the adapter's targets"
            return Resolution({}, (), (Problem("LF-603", what, fix=fix),))
        nearest = max(found, key=lambda c: len(found[c].targets), default=None)
        said = found[nearest].unresolved if nearest is not None else ()
        return Resolution({}, tuple(replace(p, what=f"{nearest}: {p.what}") for p in said))

    def _in(self, component: str, own: Adapter, hints: Hints) -> Resolution:
        """The resolution of one component, weights by their full names."""
        found = self.components[component].resolve(own, hints)
        targets = {
            key: tuple(replace(m, file=component, weight=join(component, m.weight)) for m in places)
            for key, places in found.targets.items()
        }
        return replace(found, targets=targets)

    def plan(self, verb: str, jobs: Sequence[Job], options: Options) -> Plan:
        """The plans of the components that change; the other files are copied."""
        check_outside(self.path, options.out)
        plans = plans_of(verb, jobs, options, self.components, _part)
        rest = [self.path / name for name in self._rest(plans)]
        note = f"{len(plans)} of {len(self.components)} components change, the rest is copied as it is"
        whole = whole_plan(verb, jobs, options, plans, rest, note)
        return replace(whole, estimate=partial(_losses, plans))

    def apply(self, plan: Plan, *, force: bool = False) -> Outcome:
        """Write the whole pipeline, or nothing."""
        out, plans = plan.options.out, plan.state
        check_free(out, force)
        check_room(out, plan.writes)
        outputs: dict[str, Output] = {name: own.state for name, own in plans.items()}
        rest = {name: self.path / name for name in self._rest(plans)}
        tasks = {name: outputs[name].task(identity(plans[name], outputs[name].merge.files)) for name in plans}
        task = _Together(tasks, seen(rest.values()))
        writers: dict[str, Writer] = {name: partial(copy_file, path) for name, path in rest.items()}
        for name, output in outputs.items():
            writers |= {f"{name}/{file}": writer for file, writer in output.writers().items()}
        write_folder(out, writers, force=force, task=task)
        norms = norms_by_key(plan, {name: output.merge.norms() for name, output in outputs.items()})
        return Outcome(norms, plan.writes, plan.writes - plan.reads, tuple(task.names))

    def _rest(self, plans: Mapping[str, Plan]) -> list[str]:
        """The files outside the components that change."""
        return [name for name in self.files if name.partition("/")[0] not in plans]


@dataclass(slots=True)
class _Together:
    """The merges of several components as one task: files by their paths in the pipeline."""

    tasks: Mapping[str, Merging]
    rest: Sequence[Sequence[str | int]]

    def identity(self) -> str:
        """SHA-256 of those of all of them, and of the files that are taken along."""
        own = {name: task.identity() for name, task in self.tasks.items()}
        return hashlib.sha256(canonical.dumps([own, self.rest]).encode()).hexdigest()

    @property
    def names(self) -> list[str]:
        """The files that were finished already."""
        return [f"{name}/{file}" for name, task in self.tasks.items() for file in task.names]

    def note(self, name: str) -> Mapping[str, Any]:
        """See ``loraformat.atomic.Task``."""
        component, _, file = name.partition("/")
        return self.tasks[component].note(file) if component in self.tasks else {}

    def resume(self, name: str, note: Mapping[str, Any]) -> None:
        """See ``loraformat.atomic.Task``."""
        component, _, file = name.partition("/")
        if component in self.tasks:
            self.tasks[component].resume(file, note)

    def check(self) -> None:
        """LF-615 where too little of the change survives in one of them."""
        for task in self.tasks.values():
            task.check()


def _part(job: Job, component: str) -> Job:
    """What of a job lies in one component, by the names that it has there."""
    own = share(job, component)
    targets = {
        key: tuple(replace(match, weight=match.weight.removeprefix(f"{component}:")) for match in places)
        for key, places in own.resolution.targets.items()
    }
    return replace(own, resolution=Resolution(targets))


def _within(hints: Hints, component: str) -> Hints:
    """The hints for the keys of one component, without its name; patterns that name another are not its own."""
    prefix = f"{component}:"
    names = {
        key.removeprefix(prefix): name.removeprefix(prefix) for key, name in hints.names.items() if _own(key, prefix)
    }
    axes = {pattern.removeprefix(prefix): spec for pattern, spec in hints.axes.items() if _own(pattern, prefix)}
    return replace(hints, names=names, axes=axes)


def _own(key: str, prefix: str) -> bool:
    return key.startswith(prefix) or ":" not in key


def _losses(plans: Mapping[str, Plan]) -> dict[str, float]:
    """What rounding loses, by full names; see ``Plan.estimate``."""
    estimates = ((name, plan.estimate()) for name, plan in plans.items() if plan.estimate is not None)
    return {join(name, weight): lost for name, found in estimates for weight, lost in found.items()}
