"""Writing a merged checkpoint: a file of weights for a file, a complete folder for a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from loraformat import progress
from loraformat.atomic import Writer, write_file, write_folder
from loraformat.checkpoint.folder import Files
from loraformat.checkpoint.merging import Merge
from loraformat.checkpoint.task import Merging
from loraformat.errors import fault
from loraformat.outputs import check_free, check_room
from loraformat.parted import check_outside
from loraformat.ranges import copy_range

__all__ = ["Merging", "Output", "copy_file", "writes_folder"]


def writes_folder(files: Files, out: Path) -> bool:
    """A folder gives a folder; one file of weights in it gives a file where the output's ending asks for one.

    Raises:
        LoraFormatError: LF-703 a file is asked for, and there are several; or the output lies in the base.
    """
    if files.folder is None:
        return False
    check_outside(files.folder, out)
    if out.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
        return True
    endings = {shard.path.suffix for shard in files.shards.values()}
    if len(files.shards) > 1 or out.suffix not in endings:
        found = f"{len(files.shards)} files of weights ({', '.join(sorted(endings))})"
        raise fault("LF-703", f"{out} names a file, the base is a folder with {found}", fix="name a folder")
    return False


@dataclass(frozen=True, slots=True)
class Output:
    """What is written.

    Attributes:
        texts: the small files of the folder that say something else than before; None where the output is a file.
        survival: the least share of ΔW that must survive, else nothing is written.
    """

    merge: Merge
    texts: Mapping[str, bytes] | None
    survival: float = 0.0

    @property
    def reads(self) -> int:
        """Bytes."""
        return sum(shard.size for shard in self.merge.files.shards.values()) + self._copied

    @property
    def writes(self) -> int:
        """Bytes."""
        shards = self.merge.files.shards.items()
        weights = sum(shard.size_with(self.merge.of_shard(name)) for name, shard in shards)
        return weights + self._copied + sum(map(len, (self.texts or {}).values()))

    @property
    def _copied(self) -> int:
        return sum(path.stat().st_size for path in self._copies().values())

    def _copies(self) -> Mapping[str, Path]:
        """The files of the folder that are taken along as they are."""
        folder, index, texts = self.merge.files.folder, self.merge.files.index, self.texts
        if folder is None or texts is None:
            return {}
        found = {**self.merge.files.others, **({index[0]: folder / index[0]} if index else {})}
        return {name: path for name, path in found.items() if name not in texts}

    def write(self, out: Path, force: bool, identity: Callable[[], str]) -> Merging:
        """All of it, or nothing: LF-615 too little of the change survives; LF-702, LF-703."""
        check_free(out, force)
        check_room(out, sum(change.nbytes for change in self.merge.changes.values()))
        writers, task = self.writers(), self.task(identity)
        if self.texts is None:
            (writer,) = writers.values()
            write_file(out, partial(_then, writer, task.check), force=force)
        else:
            write_folder(out, writers, force=force, task=task)
        return task

    def writers(self) -> dict[str, Writer]:
        """File → what writes it; of a folder with all that it takes along."""
        shards = self.merge.files.shards.items()
        weights = {name: partial(shard.write, changes=self.merge.of_shard(name)) for name, shard in shards}
        copies = {name: partial(copy_file, path) for name, path in self._copies().items()}
        return {**weights, **copies, **{name: partial(_write, text) for name, text in (self.texts or {}).items()}}

    def task(self, identity: Callable[[], str]) -> Merging:
        """See ``loraformat.atomic.Task``."""
        return Merging(identity, self.merge, self.survival)


def _then(writer: Writer, check: Callable[[], None], file: BinaryIO) -> None:
    writer(file)
    check()


def copy_file(path: Path, file: BinaryIO) -> None:
    """The bytes of another file, by the system where it can."""
    with open(path, "rb") as source:
        size = path.stat().st_size
        copy_range(source, 0, file, 0, size)
        progress.advance(size)


def _write(text: bytes, file: BinaryIO) -> None:
    file.write(text)
