"""A file of ``torch.save`` as weights: changed values take the place of the old ones, the pickle stays as it is."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from loraformat.checkpoint.change import Change
from loraformat.checkpoint.shard import Stored
from loraformat.container import TensorInfo
from loraformat.dtypes import numpy_dtype
from loraformat.errors import Problem
from loraformat.patch import Patch, write_patched
from loraformat.pickled import archive
from loraformat.pickled.file import TorchFile
from loraformat.ranges import read_range, write_range
from loraformat.tiles import Tensor

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["TorchShard"]

_CHUNK = 8 << 20
_FIX = "save it as safetensors first (save_pretrained, or safetensors.torch.save_model): those can be written anew"


class TorchShard:
    """An open file of ``torch.save`` that holds a state dict."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held = TorchFile(path)
        self.size = self.held.size
        self.infos = {
            name: TensorInfo(view.dtype, view.shape, self.held.start(name), self.held.start(name) + _length(view))
            for name, view in self.held.views.items()
        }

    @cached_property
    def _file(self) -> BinaryIO:
        return open(self.path, "rb", buffering=0)

    def tensor(self, name: str) -> Tensor:
        """The values, read where they are sliced; a transposed or cut-out tensor is a view of the mapped file."""
        if not self.held.views[name].contiguous:
            return self.held[name]
        return Stored.of(self._file, self.infos[name].start, self.infos[name])

    def whole(self, name: str) -> Array:
        """A view of the mapped file."""
        return self.held[name]

    def obstacles(self, changes: Sequence[Change]) -> list[Problem]:
        """LF-608 what needs another pickle; LF-609 bytes that another tensor has too."""
        found = []
        for change in changes:
            where, info = change.name, self.infos.get(change.name)
            if info is None or info.shape != change.shape:
                what = f"{self.path.name} is a PyTorch file: a tensor in it can neither be added nor change its size"
                found.append(Problem("LF-608", what, where, _FIX))
            elif not self.held.views[where].contiguous:
                found.append(Problem("LF-608", f"{self.path.name} stores the tensor not row by row", where, _FIX))
            elif sharing := self._sharing(where):
                what = f"{self.path.name} stores {', '.join(sharing[:3])} in the same bytes"
                found.append(Problem("LF-609", what, where, _FIX))
        return found

    def _sharing(self, name: str) -> list[str]:
        own, key = self.infos[name], self.held.views[name].storage.key
        others = ((n, i) for n, i in self.infos.items() if n != name and self.held.views[n].storage.key == key)
        return [other for other, info in others if info.start < own.stop and own.start < info.stop]

    def size_with(self, changes: Sequence[Change]) -> int:
        """The same."""
        return self.size

    def write(self, target: BinaryIO, changes: Sequence[Change]) -> None:
        """Write the file with the changes, and the checksums of an archive that follow from them."""
        places = [self.infos[change.name] for change in changes]
        patches = [Patch(i.start, i.stop, c.nbytes, c.tiles) for i, c in zip(places, changes, strict=True)]
        write_patched(target, self._file, patches)
        for entry in self._entries(places):
            total = 0
            for start in range(entry.start, entry.stop, _CHUNK):
                chunk = bytearray(min(_CHUNK, entry.stop - start))
                read_range(target, memoryview(chunk), start)
                total = zlib.crc32(chunk, total)
            for place in entry.checksums:
                write_range(target, memoryview(total.to_bytes(4, "little")), place)

    def _entries(self, places: Sequence[TensorInfo]) -> Iterator[archive.Entry]:
        """The entries of an archive that these places lie in; none in a stream."""
        if self.held.bytes[:4] == archive.MAGIC:
            for entry in archive.entries(self.held.bytes, self.size).values():
                if any(entry.start <= place.start and place.stop <= entry.stop for place in places):
                    yield entry


def _length(view: Any) -> int:
    """Bytes from the first value to the end of the last."""
    if 0 in view.shape:
        return 0
    steps = sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
    return int(steps + np.dtype(numpy_dtype(view.dtype)).itemsize)
