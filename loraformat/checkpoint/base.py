"""A checkpoint as a base: names are the tensors' own, placement comes by evidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat import huggingface
from loraformat.axes import Placement
from loraformat.base import Options, Parameter
from loraformat.checkpoint import tied as ties
from loraformat.checkpoint.change import Change
from loraformat.checkpoint.folder import Files, find, is_weights, json_object
from loraformat.checkpoint.grids import grid_of, laid, meant, requantised_rows
from loraformat.checkpoint.merging import Merge
from loraformat.checkpoint.output import Output, writes_folder
from loraformat.checkpoint.places import Places
from loraformat.checkpoint.requantised import Values
from loraformat.checkpoint.task import identity
from loraformat.checkpoint.texts import texts
from loraformat.description import describe_checkpoint
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.plan import Job, Outcome, Plan
from loraformat.quantised import form_of
from loraformat.resolve import Hints, Match, Resolution
from loraformat.shapes import FLOATS

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.container import TensorInfo
    from loraformat.tiles import Norms
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Checkpoint", "kind"]

_PEAK = 48 << 20
"""Two threads with some tiles each, and the buffers around them."""


class _Kind:
    """Weights by their first bytes, or a folder that holds them under one of the usual names."""

    name = "checkpoint"
    describes = "checkpoint (safetensors or PyTorch, a file or a folder with an index or a single file of weights)"

    def recognises(self, path: Path) -> bool:
        return is_weights(path)

    def open(self, path: Path) -> Checkpoint:
        return Checkpoint(path)


kind = _Kind()


class Checkpoint:
    """An opened checkpoint, with the ``config.json`` beside it if there is one.

    Attributes:
        tied: a name that is not stored → the stored tensor that is meant.
    """

    verbs = frozenset({"merge"})

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: Files = find(path)
        folder = self.files.folder or path.parent
        self.config = json_object(folder / "config.json") if (folder / "config.json").is_file() else {}
        self.tied = ties.tied(self.files.homes, self.config)
        self.places = Places(path.name, self.files, self.tied, self.config)

    @property
    def infos(self) -> Iterator[tuple[str, TensorInfo]]:
        """Every stored tensor."""
        return ((name, self.files.shards[home].infos[name]) for name, home in self.files.homes.items())

    def parameters(self) -> Mapping[str, Parameter]:
        """Every tensor under its own name, and those that are tied to one under theirs."""
        found = {name: Parameter(name, info.shape, info.dtype) for name, info in self.infos}
        return found | {name: Parameter(name, found[e].shape, found[e].dtype) for name, e in self.tied.items()}

    def ties(self) -> Mapping[str, str]:
        """Head → embedding, where the configuration ties them or only one is stored."""
        return {**self.tied, **ties.paired(self.files.homes, self.config)}

    def stored(self) -> Iterator[Path]:
        """See ``loraformat.base.Stored``."""
        return (shard.path for shard in self.files.shards.values())

    def describe(self) -> Mapping[str, Any]:
        """See ``loraformat.description``."""
        stored = {name: Parameter(name, info.shape, info.dtype) for name, info in self.infos}
        return describe_checkpoint(stored, self.config, list(self.stored()), self.tied)

    def linears(self, hints: Hints) -> Mapping[str, Placement | None]:
        """Every float tensor of two axes, and every weight in few bits; placed by ``--axes`` or by the configuration."""
        infos = {n: i for n, i in self.infos if len(i.shape) == 2 and i.dtype in FLOATS and not self._describes(n)}
        return {name: self._stated(name, info.shape, hints) for name, info in infos.items()} | self._few(hints)

    def _describes(self, name: str) -> bool:
        """Whether a tensor stands beside a weight in few bits, and only says what its numbers mean."""
        weight = f"{name.rpartition('.')[0]}.weight"
        return name != weight and form_of(weight, self.files.homes, self.config) is not None

    def _few(self, hints: Hints) -> dict[str, Placement | None]:
        found: dict[str, Placement | None] = {}
        for name, info in self.infos:
            own = laid(name, self.files) if info.dtype not in FLOATS else None
            grid = grid_of(name, self.files, self.config) if own else None
            if own is not None and grid is not None:
                key = meant(name)
                spec = hints.spec(key) or (huggingface.linear_spec(self.config, key) or own)[0]
                found[key] = Placement.of(grid.shape if spec == own[0] else grid.shape[::-1], spec)
        return found

    def _stated(self, name: str, shape: tuple[int, ...], hints: Hints) -> Placement | None:
        spec = hints.spec(name) or (huggingface.linear_spec(self.config, name) or (None,))[0]
        return Placement.of(shape, spec) if spec else None

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """All values as a view of the file; of a run of rows as an array of its own, which leaves no page behind."""
        stored = self.tied.get(name, name)
        shard = self.files.shards[self.files.homes[stored]]
        return shard.whole(stored) if rows is None else shard.tensor(stored)[slice(*rows)]

    def dequantised(self, name: str) -> Values | None:
        """The values of a weight that is stored in few bits, by the name of the tensor; None of any other."""
        grid = grid_of(self.tied.get(name, name), self.files, self.config)
        return Values(grid) if grid is not None else None

    def requantised(
        self, name: str, updates: Sequence[Update], norms: Norms | None = None
    ) -> Iterator[tuple[tuple[int, int], Array]] | None:
        """(rows, stored values) of a merge into a weight that is stored in few bits; None of any other."""
        return requantised_rows(self.tied.get(name, name), updates, self.files, self.config, norms)

    # Where a target lies.

    def resolve(self, adapter: Adapter, hints: Hints) -> Resolution:
        """By exact name, the user's map, or a tie; the placement by every evidence there is."""
        targets: dict[str, tuple[Match, ...]] = {}
        taken: dict[str, str] = {}
        unresolved: list[Problem] = hints.unused(adapter)
        ambiguous: list[Problem] = []
        meant = {hints.mapped(key) or key for key in adapter}
        for key, update in adapter.items():
            weight = hints.mapped(key) or key
            rung = f"user: {weight}" if hints.mapped(key) else "name: equal"
            try:
                match = self.places.match(key, update, weight, rung, hints)
            except LoraFormatError as error:
                unresolved += error.problems
                continue
            if weight in taken:
                ambiguous.append(Problem("LF-603", f"{weight} is meant by {taken[weight]} too", key))
            taken[weight] = key
            parts = self._moving(weight, update)
            others = [n for n in self._partners(weight) if n not in meant] if parts else []
            if others and "replace" in parts and ties.trained_apart(update):
                ambiguous.append(_size_only(key, others))
            matches = (self.places.match(key, update, n, f"tied: {n} is {weight}", hints) for n in others)
            targets[key] = (match, *(replace(m, parts=parts) for m in matches))
        return Resolution(targets, tuple(unresolved), tuple(ambiguous))

    def _moving(self, weight: str, update: Update) -> tuple[str, ...]:
        """The kinds of parts that change the modules tied to this one too; none of a tensor that the base lacks."""
        stored = self.tied.get(weight, weight)
        home = self.files.homes.get(stored)
        return ties.moving(update, self.files.shards[home].infos[stored].shape) if home else ()

    def _partners(self, weight: str) -> list[str]:
        """The other names of the same tensor."""
        pairs = self.ties()
        partners = [head for head, e in pairs.items() if e == weight] + [
            e for head, e in pairs.items() if head == weight
        ]
        return [name for name in partners if name in self.tied or weight in self.tied or self._equal(name, weight)]

    def _equal(self, one: str, other: str) -> bool:
        import numpy as np

        from loraformat.tiles import runs

        shape = self.parameters()[one].shape
        if shape != self.parameters()[other].shape:
            return False
        return all(np.array_equal(self.read(one, rows), self.read(other, rows)) for rows in runs(shape))

    # What a merge does.

    def plan(self, verb: str, jobs: Sequence[Job], options: Options) -> Plan:
        """What a merge replaces and adds; every obstacle at once (LF-606, LF-608, LF-609, LF-703)."""
        if verb not in self.verbs:
            fix = "attach needs an ONNX model; merge works here"
            raise fault("LF-608", f"a checkpoint has no graph to {verb} to", where=str(self.path), fix=fix)
        folder = writes_folder(self.files, options.out)
        merge = Merge.of(self.files, self.tied, self.config, jobs, requantize=options.requantize)
        output = Output(merge, texts(merge, self.config) if folder else None, options.survival)
        if not folder and merge.config != self.config:
            merge.notes.append("the output is a file: config.json, which must change with it, is not written")
        changes = merge.changes.values()
        steps = tuple(
            f"merge {c.name} {c.form} {list(c.grid.shape if c.grid else c.shape)}" for c in changes if c.updates
        )
        estimate = partial(_losses, [c for c in changes if c.updates])
        peak = _PEAK + sum(sorted(c.held for c in changes)[-2:])
        sizes = (output.reads, output.writes, peak)
        return Plan(verb, tuple(jobs), options, steps, *sizes, tuple(merge.notes), output, estimate)

    def apply(self, plan: Plan, *, force: bool = False) -> Outcome:
        """Write the merged checkpoint: unchanged tensors byte for byte, changed ones with one rounding."""
        output: Output = plan.state
        resumed = output.write(plan.options.out, force, identity(plan, self.files))
        norms = output.merge.norms()
        ordered = {key: norms[key] for job in plan.jobs for key in job.resolution.targets}
        return Outcome(ordered, plan.writes, plan.writes - plan.reads, tuple(resumed.names))


def _losses(changes: Sequence[Change]) -> dict[str, float]:
    return {change.name: change.sampled() for change in changes}


def _size_only(key: str, others: Sequence[str]) -> Problem:
    # peft 0.21.2 saves a module of modules_to_save, and not the rows that its partner got when the model was resized.
    what = f"trained apart from {', '.join(others)}, to which it is tied, in another size: the rows of those are in no file"
    fix = "save the adapter with all of them in modules_to_save, or merge it with PEFT"
    return Problem("LF-609", what, key, fix)
