"""A safetensors file of weights; its header is written anew only where a size changes or a tensor is added."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loraformat.checkpoint.change import Change
from loraformat.checkpoint.shard import Stored
from loraformat.container import Container, TensorInfo
from loraformat.errors import Problem, fault
from loraformat.file import KEY
from loraformat.patch import Patch, patched_size, write_patched
from loraformat.serializer import header_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["SafetensorsShard"]


class SafetensorsShard:
    """An open safetensors file that is no adapter."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.container = Container(path)
        if KEY in self.container.metadata:
            raise fault("LF-601", f"{path} is a loraformat adapter, not a base")
        self.infos, self.size = self.container.infos, self.container.size

    @cached_property
    def _file(self) -> BinaryIO:
        return open(self.path, "rb", buffering=0)

    def tensor(self, name: str) -> Stored:
        """The values, read where they are sliced."""
        info = self.infos[name]
        return Stored.of(self._file, self.container.data_start + info.start, info)

    def whole(self, name: str) -> Array:
        """A view of the mapped file."""
        return self.container[name]

    def obstacles(self, changes: Sequence[Change]) -> list[Problem]:
        """None: a tensor may have any size, and another may follow the last."""
        return []

    def size_with(self, changes: Sequence[Change]) -> int:
        """Bytes of the file with the changes."""
        return patched_size(self.size, self._patches(changes))

    def write(self, target: BinaryIO, changes: Sequence[Change]) -> None:
        """Write the file with the changes."""
        write_patched(target, self._file, self._patches(changes))

    def _patches(self, changes: Sequence[Change]) -> list[Patch]:
        begin = self.container.data_start
        patches = []
        for change in changes:
            info = self.infos.get(change.name)
            start, stop = (begin + info.start, begin + info.stop) if info else (self.size, self.size)
            patches.append(Patch(start, stop, change.nbytes, change.tiles))
        if any(c.name not in self.infos or c.shape != self.infos[c.name].shape for c in changes):
            header = self._header(changes)
            patches.append(Patch(0, begin, len(header), lambda: [memoryview(header)]))
        return patches

    def _header(self, changes: Sequence[Change]) -> bytes:
        """The header for tensors in the order of the old file, the added ones last."""
        now = {change.name: change for change in changes}
        ordered = sorted(self.infos, key=lambda name: (self.infos[name].start, self.infos[name].stop))
        infos: dict[str, TensorInfo] = {}
        end = 0
        for name in (*ordered, *(name for name in now if name not in self.infos)):
            if name in now:
                dtype, shape, count = now[name].dtype, now[name].shape, now[name].nbytes
            else:
                old = self.infos[name]
                dtype, shape, count = old.dtype, old.shape, old.stop - old.start
            infos[name] = TensorInfo(dtype, shape, end, end + count)
            end += count
        return header_bytes(infos, self.container.metadata)
