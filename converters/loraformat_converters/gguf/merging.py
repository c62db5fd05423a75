"""A merge into a model in GGUF: the same file with other bytes in the tensors that change, metadata and all else as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from loraformat.atomic import write_file
from loraformat.checkpoint.change import Change
from loraformat.checkpoint.shard import Stored
from loraformat.checkpoint.survival import too_little
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.outputs import check_room
from loraformat.patch import Patch, write_patched
from loraformat.shapes import shape_problems
from loraformat_converters.gguf.blocks import QUANTISED, Blocks
from loraformat_converters.gguf.file import NUMPY, GgufFile
from loraformat_converters.gguf.read import EMBEDDING

if TYPE_CHECKING:
    from loraformat.base import Options
    from loraformat.plan import Job
    from loraformat.updates import Update

__all__ = ["Merge"]

_PEAK = 48 << 20  # two threads with some tiles each, and the buffers around them
_FIX = "merge into the model in f16, bf16, f32 or q8_0 and quantise the result (llama-quantize), or run the adapter beside it (--lora)"


@dataclass(frozen=True, slots=True)
class Merge:
    """What becomes of the tensors that change, by name."""

    file: GgufFile
    source: BinaryIO
    changes: dict[str, Change]
    survival: float

    @classmethod
    def of(cls, file: GgufFile, jobs: Sequence[Job], options: Options) -> Merge:
        """Everything settled, or every reason why it cannot be.

        Raises:
            LoraFormatError: LF-606, LF-608, LF-609; LF-703 the output is no name of a model.
        """
        if options.out.suffix != ".gguf":
            raise fault("LF-703", f"{options.out} would hold a model in GGUF", fix="call it NAME.gguf")
        merge = cls(file, _opened(file.path), {}, options.survival)
        problems = list(merge._gather(jobs, requantize=options.requantize))
        if problems:
            raise LoraFormatError(problems)
        return merge

    def _gather(self, jobs: Sequence[Job], *, requantize: bool) -> Iterator[Problem]:
        for job in jobs:
            for key, (match, *_) in job.resolution.require().targets.items():
                update = match.turned(job.adapter[key])
                change = self.changes.get(match.weight) or self._change(match.weight, requantize=requantize)
                if why := self._fault(change, update, requantize=requantize):
                    yield Problem(why[0], why[1], key, why[2])
                    continue
                yield from (p for p in shape_problems(key, update) if p.severity == "error")
                keys = tuple(dict.fromkeys((*change.keys, key)))
                self.changes[change.name] = replace(change, updates=(*change.updates, update), keys=keys)

    def _change(self, name: str, *, requantize: bool) -> Change:
        info = self.file.infos[name]
        if info.type in NUMPY:
            stored = Stored(self.source, info.start, info.shape, np.dtype(NUMPY[info.type]))
            return Change(name, info.type, info.shape, stored)
        grid = Blocks(self.file, name) if requantize and info.type in QUANTISED else None
        return Change(name, info.type, info.shape, None, grid=grid)

    def _fault(self, change: Change, update: Update, *, requantize: bool) -> tuple[str, str, str] | None:
        name = change.name
        if name == EMBEDDING and "output.weight" not in self.file.infos:
            what = f"{name} is the head too (there is no output.weight): what changes for one of them changes for both"
            return "LF-609", what, "leave it out with --only"
        if "replace" in update and update["replace"].replace.shape != change.shape:
            return "LF-608", f"the tensor is {list(change.shape)}: nothing in a GGUF file changes its size", ""
        if "rows" in update and (misfit := update["rows"].misfit(change.shape)):
            return "LF-606", misfit, "is this the base that the adapter was trained on?"
        absolute = "replace" in update or "rows" in update
        if change.holds(update) if change.dtype in NUMPY else change.grid is not None and not absolute:
            return None
        what = f"{name} is quantised as {change.dtype}"
        if absolute:
            return "LF-608", f"{what}: only a sum is rounded to that, and the update has values of its own", _FIX
        if change.dtype not in QUANTISED:
            return "LF-608", f"{what}, to which only llama.cpp rounds", _FIX
        return (
            "LF-608",
            f"{what}: a merge would round the change away",
            f"--requantize rounds to it and says what survives; {_FIX}",
        )

    @property
    def steps(self) -> tuple[str, ...]:
        """A line for each tensor that changes."""
        return tuple(f"merge {c.name} {c.dtype} {list(c.shape)}" for c in self.changes.values())

    @property
    def peak(self) -> int:
        """The most memory, in bytes."""
        return _PEAK + sum(sorted(change.held for change in self.changes.values())[-2:])

    def losses(self) -> dict[str, float]:
        """What rounding loses of ΔW in the first run of rows of each tensor."""
        return {change.name: change.sampled() for change in self.changes.values()}

    def write(self, out: Path, *, force: bool) -> None:
        """The file, or nothing: LF-615 too little of the change survives; LF-702, LF-703."""
        check_room(out, self.file.size)
        write_file(out, self._write, force=force)

    def _write(self, target: BinaryIO) -> None:
        places = {name: self.file.infos[name] for name in self.changes}
        patches = [Patch(places[n].start, places[n].stop, c.nbytes, c.tiles) for n, c in self.changes.items()]
        write_patched(target, self.source, patches)
        if problem := too_little(list(self.changes.values()), self.survival):
            raise LoraFormatError(problem)


def _opened(path: Path) -> BinaryIO:
    """Read, not mapped: pages of a mapped file stay in the resident set."""
    return open(path, "rb", buffering=0)
