"""A single-file safetensors checkpoint as a base: names are the tensors' own, placement comes by evidence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loraformat import canonical, huggingface, progress
from loraformat.atomic import write_file
from loraformat.axes import Placement
from loraformat.base import Options, Parameter
from loraformat.container import DTYPES, Container, TensorInfo, dtype_name, header_bytes, numpy_dtype
from loraformat.description import describe_checkpoint
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.file import KEY
from loraformat.names import nearest
from loraformat.placing import place
from loraformat.plan import Job, Outcome, Plan
from loraformat.resolve import Hints, Match, Resolution
from loraformat.shapes import FLOATS
from loraformat.tiles import Norms, changed

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Checkpoint", "kind"]

_COPY = 8 << 20


class _Kind:
    """A ``.safetensors`` file that is no adapter, or a folder with one ``model.safetensors``."""

    name = "checkpoint"
    describes = "safetensors checkpoint (one file, or a folder with model.safetensors)"

    def recognises(self, path: Path) -> bool:
        return (path / "model.safetensors").is_file() if path.is_dir() else path.suffix == ".safetensors"

    def open(self, path: Path) -> Checkpoint:
        return Checkpoint(path / "model.safetensors" if path.is_dir() else path)


kind = _Kind()


@dataclass(frozen=True, slots=True)
class _Change:
    """What replaces one tensor: updates placed in the tensor's own axes; ``info`` as it was, or None if added."""

    updates: tuple[Update, ...]
    info: TensorInfo | None
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """An opened checkpoint file, with the ``config.json`` beside it if there is one."""

    verbs = frozenset({"merge"})

    def __init__(self, path: Path) -> None:
        self.path = path
        self.container = Container(path)
        if KEY in self.container.metadata:
            raise fault("LF-601", f"{path} is a loraformat adapter, not a base")
        self.config = _config(path.parent / "config.json")

    def parameters(self) -> Mapping[str, Parameter]:
        """Every tensor under its own name."""
        return {name: Parameter(name, info.shape, info.dtype) for name, info in self.container.infos.items()}

    def describe(self) -> Mapping[str, Any]:
        """See ``loraformat.description``."""
        return describe_checkpoint(self.parameters(), self.config, [self.path])

    def linears(self, hints: Hints) -> Mapping[str, Placement | None]:
        """Every float tensor of two axes; placed by ``--axes`` or by what the configuration says."""
        infos = {n: i for n, i in self.container.infos.items() if len(i.shape) == 2 and i.dtype in FLOATS}
        return {name: self._stated(name, info.shape, hints) for name, info in infos.items()}

    def _stated(self, name: str, shape: tuple[int, ...], hints: Hints) -> Placement | None:
        spec = hints.spec(name) or (huggingface.linear_spec(self.config, name) or (None,))[0]
        return Placement.of(shape, spec) if spec else None

    def read(self, name: str) -> Array:
        """A view of the file."""
        return self.container[name]

    def resolve(self, adapter: Adapter, hints: Hints) -> Resolution:
        """By exact name, or the user's map; the placement by every evidence there is."""
        targets: dict[str, tuple[Match, ...]] = {}
        taken: dict[str, str] = {}
        unresolved: list[Problem] = hints.unused(adapter)
        ambiguous: list[Problem] = []
        for key, update in adapter.items():
            weight = hints.mapped(key) or key
            rung = f"user: {weight}" if hints.mapped(key) else "name: equal"
            try:
                match = Match(self.path.name, None, weight, *self._placed(key, update, weight, rung, hints))
            except LoraFormatError as error:
                unresolved += error.problems
                continue
            if weight in taken:
                ambiguous.append(Problem("LF-603", f"{weight} is meant by {taken[weight]} too", key))
            taken[weight] = key
            targets[key] = (match,)
        return Resolution(targets, tuple(unresolved), tuple(ambiguous))

    def _placed(
        self, key: str, update: Update, weight: str, rung: str, hints: Hints
    ) -> tuple[Placement, tuple[str, ...]]:
        info = self.container.infos.get(weight)
        if info is None:
            if "replace" in update and "add" in update["replace"].allows:
                shape = update["replace"].replace.shape
                return Placement(shape, (0,), tuple(range(1, len(shape)))), (rung, "the adapter adds it")
            raise _missing(key, weight, update, self.container.infos)
        spec = huggingface.linear_spec(self.config, weight) if len(info.shape) == 2 and update.op is None else None
        claims = [*([spec] if spec else []), *hints.claims(key, update)]
        placement, evidence = place(key, update, info.shape, hints.spec(key), claims)
        return placement, (rung, *evidence)

    def plan(self, verb: str, jobs: Sequence[Job], options: Options) -> Plan:
        """What a merge replaces; refuses dtypes that cannot hold a change (LF-608)."""
        if verb not in self.verbs:
            fix = "attach needs an ONNX model; merge works here"
            raise fault("LF-608", f"a checkpoint has no graph to {verb} to", where=str(self.path), fix=fix)
        changes: dict[str, _Change] = {}
        for job in jobs:
            for key, (match,) in job.resolution.require().targets.items():
                change = self._change(key, job.adapter[key], match)
                earlier = changes[match.weight].updates if match.weight in changes else ()
                changes[match.weight] = replace(change, updates=(*earlier, *change.updates))
        total = sum(_nbytes(c.dtype, c.shape) for c in changes.values())
        kept = sum(i.stop - i.start for n, i in self.container.infos.items() if n not in changes)
        steps = tuple(f"merge {w} {c.dtype} {list(c.shape)}" for w, c in changes.items())
        writes = total + kept + self.container.data_start
        return Plan(verb, tuple(jobs), options, steps, self.container.size, writes, 32 << 20, state=changes)

    def _change(self, key: str, update: Update, match: Match) -> _Change:
        info = self.container.infos.get(match.weight)
        placed = update.placed(match.placement)
        if info is None:
            dtype = dtype_name(update["replace"].replace.dtype)
            return _Change((placed,), None, dtype, update["replace"].replace.shape)
        if info.dtype not in FLOATS or DTYPES[info.dtype] < 2:
            fix = "merge into the unquantised checkpoint, or attach the adapter at run time"
            raise fault(
                "LF-608",
                f"{match.weight} is stored as {info.dtype}: a merge would round the change away",
                where=key,
                fix=fix,
            )
        return _Change((placed,), info, info.dtype, match.placement.shape)

    def apply(self, plan: Plan, *, force: bool = False) -> Outcome:
        """Write the merged file: unchanged tensors byte for byte, changed ones with one rounding."""
        changes: Mapping[str, _Change] = plan.state
        names = {match.weight: key for job in plan.jobs for key, (match,) in job.resolution.targets.items()}
        norms = {weight: Norms() for weight in names}
        outcome = Outcome({key: norms[weight] for weight, key in names.items()}, plan.writes, plan.writes - plan.reads)
        write_file(plan.options.out, lambda file: self._write(file, changes, norms), force=force)
        return outcome

    def _write(self, file: BinaryIO, changes: Mapping[str, _Change], norms: Mapping[str, Norms]) -> None:
        old = sorted(self.container.infos.items(), key=lambda item: item[1].start)
        added = [(name, c) for name, c in changes.items() if c.info is None]
        infos: dict[str, TensorInfo] = {}
        end = 0
        items: list[tuple[str, TensorInfo | _Change]] = [*old, *added]
        for name, item in items:
            change = changes.get(name)
            now: _Change | TensorInfo = change or item
            dtype, shape = now.dtype, now.shape
            infos[name] = TensorInfo(dtype, shape, end, end + _nbytes(dtype, shape))
            end = infos[name].stop
        file.write(header_bytes(infos, self.container.metadata))
        for name in infos:
            if name in changes:
                for tile in self._tiles(name, changes[name], norms[name]):
                    file.write(tile)
            else:
                self._copy(file, self.container.infos[name])

    def _tiles(self, name: str, change: _Change, norms: Norms) -> Iterator[memoryview]:
        import numpy as np

        base = None if change.info is None else self.container[name]
        if base is None or base.shape != change.shape:  # added or resized: the adapter has it whole
            whole = base
            for update in change.updates:
                whole = update.apply(whole)
            assert whole is not None
            whole = whole.astype(numpy_dtype(change.dtype))
            norms.delta = float(np.square(whole.astype(np.float32)).sum())
            yield _bytes(whole)
            return
        for tile in changed(change.updates, base, norms):
            yield _bytes(tile)

    def _copy(self, file: BinaryIO, source: TensorInfo) -> None:
        flat = memoryview(self.container.bytes)[self.container.data_start + source.start :][
            : source.stop - source.start
        ]
        for start in range(0, len(flat), _COPY):
            progress.advance(file.write(flat[start : start + _COPY]))


def _missing(key: str, weight: str, update: Update, names: Mapping[str, Any]) -> LoraFormatError:
    close = nearest(weight, names)
    why = " (the name was assumed from the module's path)" if "name" in update.assumed else ""
    stub = f'--names map.json with {{"{key}": "{close[0] if close else "NAME"}"}}'
    return fault(
        "LF-602",
        f"the base has no tensor {weight}{why}; nearest: {', '.join(close) or 'none'}",
        where=key,
        fix=f"if it goes by another name there: {stub}",
    )


def _config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = canonical.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fault("LF-610", f"cannot read {path}: {error}") from None
    return config if isinstance(config, dict) else {}


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return DTYPES[dtype] * math.prod(shape)


def _bytes(array: Array) -> memoryview:
    import numpy as np

    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
