"""A checkpoint of a JAX program as a base: parameters by path. Merged in memory.

No name tells how a square array lies: a kernel of nnx.Linear is [in, out], one of nnx.Einsum what its equation says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.atomic import write_file, write_folder
from loraformat.base import Options, Parameter
from loraformat.checkpoint.folder import json_object
from loraformat.description import dtype_table
from loraformat.dtypes import dtype_name
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.names import nearest
from loraformat.placing import place
from loraformat.plan import Job, Outcome, Plan
from loraformat.resolve import Hints, Match, Resolution
from loraformat.rounding import rounded
from loraformat.shapes import FLOATS
from loraformat.source import Source
from loraformat.tiles import Norms
from loraformat_converters.flax import orbax
from loraformat_converters.flax.tree import open_tree, output

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.axes import Placement
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["TreeBase", "kind"]


class _Kind:
    """Orbax folders, flax's msgpack and npz archives that hold no factors."""

    name = "tree"
    describes = "JAX checkpoint (an Orbax folder, flax's .msgpack, or .npz)"

    def recognises(self, path: Path) -> bool:
        return orbax.recognises(path) or (path.is_file() and path.suffix in (".msgpack", ".npz"))

    def open(self, path: Path) -> TreeBase:
        return TreeBase(path)


kind = _Kind()


class TreeBase:
    """An opened tree, with the model's ``config.json`` if there is one in it or beside it.

    A Linen collection ``params`` around all of it is no part of the names.
    """

    verbs = frozenset({"merge"})
    names = "flax"

    def __init__(self, path: Path) -> None:
        self.path = path
        tree = open_tree(Source(path))
        if tree is None:
            raise fault("LF-610", f"{path} holds no tree of arrays")
        self.tree = tree
        places = (folder / "config.json" for folder in (path, path.parent))
        self.config = next((json_object(file) for file in places if file.is_file()), {})

    def parameters(self) -> Mapping[str, Parameter]:
        """Every array by its path."""
        return {n: Parameter(n, tuple(a.shape), dtype_name(a.dtype)) for n, a in self.tree.items()}

    def describe(self) -> Mapping[str, Any]:
        """See ``loraformat.description``."""
        stored = self.parameters()
        values = sum(int(np.prod(p.shape)) for p in stored.values())
        size = sum(array.nbytes for array in self.tree.values())
        about: dict[str, Any] = {
            "kind": "checkpoint",
            "architectures": [],
            "model_type": None,
            "tied": None,
            "stored_head": None,
        }
        return {
            **about,
            "tensors": len(stored),
            "parameters": values,
            "bytes": size,
            "dtypes": dtype_table(stored.values()),
            "ties": {},
            "files": [{"file": self.path.name, "bytes": size}],
        }

    def linears(self, hints: Hints) -> Mapping[str, Placement | None]:
        """Every float array of two axes; placed by ``--axes``."""
        from loraformat.axes import Placement

        found: dict[str, Placement | None] = {}
        for name, parameter in self.parameters().items():
            if len(parameter.shape) == 2 and parameter.dtype in FLOATS:
                spec = hints.spec(name)
                found[name] = Placement.of(parameter.shape, spec) if spec else None
        return found

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """The values; of a run of rows a view of them."""
        array = self.tree[name]
        return array if rows is None else array[slice(*rows)]

    def resolve(self, adapter: Adapter, hints: Hints) -> Resolution:
        """By exact path or the user's map; the placement by every evidence there is."""
        known, targets = self.parameters(), {}
        unresolved, ambiguous, taken = hints.unused(adapter), [], dict[str, str]()
        for key, update in adapter.items():
            name = hints.mapped(key) or key
            try:
                targets[key] = (self._match(key, update, name, known, hints),)
            except LoraFormatError as error:
                unresolved += error.problems
                continue
            if name in taken:
                ambiguous.append(Problem("LF-603", f"{name} is meant by {taken[name]} too", key))
            taken[name] = key
        return Resolution(targets, tuple(unresolved), tuple(ambiguous))

    def _match(self, key: str, update: Update, name: str, known: Mapping[str, Parameter], hints: Hints) -> Match:
        if name not in known:
            near = nearest(name, known)
            what = f"the base has no array {name}; nearest: {', '.join(near) or 'none'}"
            fix = (
                f'if it goes by another name there: --names map.json with {{"{key}": "{near[0] if near else "NAME"}"}}'
            )
            raise fault("LF-602", what, where=key, fix=fix)
        shape = known[name].shape
        where, evidence = place(key, update, shape, hints.spec(key), hints.claims(key, update))
        rung = f"user: {name}" if hints.mapped(key) else "name: equal"
        return Match(self.path.name, None, name, where, (rung, *evidence))

    def plan(self, verb: str, jobs: Sequence[Job], options: Options) -> Plan:
        """What a merge changes. The whole tree is held in memory twice: once as read, once as written."""
        if verb not in self.verbs:
            raise fault(
                "LF-608", f"a checkpoint has no graph to {verb} to", where=str(self.path), fix="merge works here"
            )
        changes: dict[str, list[tuple[str, Update]]] = {}
        problems: list[Problem] = []
        for job in jobs:
            for key, places in job.resolution.require().targets.items():
                for match in places:
                    update = match.turned(job.adapter[key])
                    problems += self._obstacles(key, match.weight, update)
                    changes.setdefault(match.weight, []).append((key, update))
        if problems:
            raise LoraFormatError(problems)
        size = sum(array.nbytes for array in self.tree.values())
        steps = tuple(f"merge {name}" for name in changes)
        return Plan(verb, tuple(jobs), options, steps, size, size, 2 * size, state=changes)

    def _obstacles(self, key: str, name: str, update: Update) -> Iterator[Problem]:
        array = self.tree[name]
        if dtype_name(array.dtype) not in FLOATS:
            what = f"{name} is stored as {dtype_name(array.dtype)}: a merge would round the change away"
            yield Problem("LF-608", what, key, "merge into the unquantised checkpoint")
        if "replace" in update and update["replace"].replace.shape != array.shape:
            yield Problem("LF-606", f"{list(array.shape)} cannot become {list(update['replace'].replace.shape)}", key)

    def apply(self, plan: Plan, *, force: bool = False) -> Outcome:
        """Write the tree in the container that the output's name asks for; changed arrays with one rounding."""
        arrays, norms = dict(self.tree.items()), {}
        for name, updates in plan.state.items():
            before = arrays[name]
            value = before.astype(np.float32)
            for _, update in updates:
                value = update.apply(value)
            after = rounded(value, before.dtype)
            if not np.isfinite(after.astype(np.float32)).all():
                raise fault("LF-612", f"W + ΔW is beyond {dtype_name(before.dtype)}", where=name)
            arrays[name] = after
            for key, _ in updates:
                norms[key] = _norms(before, value, after)
        made = output(arrays, plan.options.out.suffix, value=self.tree.value, root=self.tree.root)
        if made.folder:
            write_folder(plan.options.out, made.files, force=force)
        else:
            (writer,) = made.files.values()
            write_file(plan.options.out, writer, force=force)
        return Outcome(norms, plan.writes, 0)


def _norms(before: Array, wanted: Array, after: Array) -> Norms:
    old, new, kept = (np.asarray(t, np.float64) for t in (before, wanted, after))
    return Norms(float(np.sum(old**2)), float(np.sum((new - old) ** 2)), float(np.sum((kept - new) ** 2)))
