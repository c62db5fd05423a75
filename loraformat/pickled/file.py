"""A file of ``torch.save`` as a mapping of tensors, each a view of the mapped file."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.dtypes import numpy_dtype
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.pickled import archive, stream
from loraformat.pickled.tensors import View, read_views

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["TorchFile"]

_PLAIN_CAP = 32 << 20


class TorchFile(Mapping[str, "Array"]):
    """Name → array; ``views`` say how each lies in its storage, ``start`` where that lies in the file.

    Raises:
        LoraFormatError: LF-510 anything that is not a dict of tensors; LF-701 no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        except OSError as error:
            raise fault("LF-701", f"cannot read {self.path}: {error.strerror or error}") from None
        try:
            self.views, self.storages = self._read()
        except LoraFormatError as error:
            raise LoraFormatError([_located(problem, self.path) for problem in error.problems]) from None

    def _read(self) -> tuple[dict[str, View], dict[str, tuple[int, int]]]:
        if self._map[:4] == archive.MAGIC:
            program, storages = archive.read_archive(self._map, self.size)
            views = read_views(program)
        elif self._map[: len(stream.MAGIC)] == stream.MAGIC:
            views, storages = stream.read_stream(self._map, self.size)
        else:
            read_views(io.BytesIO(self._map[:_PLAIN_CAP]))  # tells what it would run
            fix = "save the tensors with torch.save or, better, as safetensors"
            raise fault("LF-510", "the file is a pickle, and none that torch.save writes", fix=fix)
        for name, view in views.items():
            start, stop = storages.get(view.storage.key, (0, -1))
            if stop - start != view.storage.nbytes:
                what = f"its storage {view.storage.key} has {max(0, stop - start):,} bytes, not {view.storage.nbytes:,}"
                raise fault("LF-510", what, where=name)
        return views, storages

    @property
    def bytes(self) -> mmap.mmap | bytes:
        """The whole mapped file."""
        return self._map

    def start(self, name: str) -> int:
        """The byte of the file at which the tensor's first value lies."""
        view = self.views[name]
        return self.storages[view.storage.key][0] + view.offset

    def __getitem__(self, name: str) -> Array:
        import numpy as np

        view = self.views[name]
        if 0 in view.shape:
            return np.empty(view.shape, numpy_dtype(view.dtype))
        return np.ndarray(view.shape, numpy_dtype(view.dtype), self._map, self.start(name), view.strides)

    def __iter__(self) -> Iterator[str]:
        return iter(self.views)

    def __len__(self) -> int:
        return len(self.views)


def _located(problem: Problem, path: Path) -> Problem:
    where = f"{path.name}: {problem.where}" if problem.where else path.name
    return Problem(problem.rule, problem.what, where, problem.fix, problem.severity)
