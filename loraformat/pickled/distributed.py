"""A distributed checkpoint of torch: ``.metadata`` says of which chunks a tensor is made, ``*.distcp`` hold their values.

Each rank of a run writes its own files. A chunk is a range of one of them, and that range a whole file of
``torch.save`` that holds one tensor (torch 2.13, torch/distributed/checkpoint/filesystem.py). Read as everything of
torch's is here: nothing is run. ``index`` is ``.metadata``.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.dtypes import DTYPES, numpy_dtype
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.pickled import INDEX
from loraformat.pickled.archive import read_archive
from loraformat.pickled.index import Chunk, Whole, describe, places, read_index, tensors
from loraformat.pickled.tensors import read_view

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Distributed"]


class Distributed(Mapping[str, "Array"]):
    """Name → array, put together of its chunks when it is asked for. What is no tensor is not in it.

    Raises:
        LoraFormatError: LF-510 an index that is damaged or names what it does not hold; LF-701 a file is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file, self._whole = cache(self._mapped), cache(self._described)
        try:
            index = read_index(folder / INDEX)
            self._told, self._places = tensors(index), places(index)
        except LoraFormatError as error:
            raise LoraFormatError([_located(problem, INDEX) for problem in error.problems]) from None
        moved = index.state.get("mcore_data")
        self._moved = moved if isinstance(moved, dict) else {}

    def __getitem__(self, name: str) -> Array:
        import numpy as np

        whole = self._whole(name)
        array = np.empty(whole.shape, numpy_dtype(whole.dtype))
        filled = np.zeros(whole.shape, bool)
        for chunk in whole.chunks:
            block = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            array[block] = self._read(name, whole, chunk)
            filled[block] = True
        if not filled.all():  # their sizes add up, so that two of them overlap
            raise fault("LF-510", "two chunks of the tensor overlap, and a part of it is in none", where=name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._told)

    def __len__(self) -> int:
        return len(self._told)

    def cuts(self, name: str, axis: int) -> int:
        """Into how many pieces the ranks of the run cut an axis of a tensor."""
        return len({chunk.offsets[axis] for chunk in self._whole(name).chunks})

    def _described(self, name: str) -> Whole:
        """What the index says of a tensor, once it is asked for: a run saves more than what is read."""
        try:
            # Megatron-Core 0.16 strategies/torch.py: of flattened tensors, as those of an optimizer are
            if self._moved.get(name):
                raise fault("LF-510", "Megatron-Core stored the tensor under another shape than its own", where=name)
            found = describe(name, self._told[name], self._places)
            self._check(name, found)
        except LoraFormatError as error:
            raise LoraFormatError([_located(problem, INDEX) for problem in error.problems]) from None
        return found

    def _check(self, name: str, whole: Whole) -> None:
        """That the chunks add up to the tensor, and that the files are long enough for them."""
        missing = math.prod(whole.shape) - sum(math.prod(chunk.sizes) for chunk in whole.chunks)
        if missing:
            much = "few" if missing > 0 else "many"
            what = f"the chunks of {list(whole.shape)} hold {abs(missing):,} values too {much}"
            raise fault("LF-510", what, where=name, fix="a file of a rank is missing, or the run ended while it saved")
        for chunk in whole.chunks:
            size = len(self._file(chunk.file))
            if chunk.start + chunk.length > size:
                what = f"{chunk.file} has {size:,} bytes; a chunk ends at {chunk.start + chunk.length:,}"
                raise fault("LF-510", what, where=name)
            if math.prod(chunk.sizes) * DTYPES[whole.dtype] > chunk.length:
                what = f"a chunk {list(chunk.sizes)} is larger than its {chunk.length:,} bytes"
                raise fault("LF-510", what, where=name)

    def _mapped(self, name: str) -> memoryview:
        path = self.folder / name
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
        except OSError as error:
            fix = "every rank of the run wrote files of its own: copy all of the folder"
            raise fault("LF-701", f"cannot read {path}: {error.strerror or error}", fix=fix) from None

    def _read(self, name: str, whole: Whole, chunk: Chunk) -> Array:
        import numpy as np

        data = self._file(chunk.file)[chunk.start : chunk.start + chunk.length]
        try:
            program, storages = read_archive(data, chunk.length)
            view = read_view(program)
        except LoraFormatError as error:
            raise LoraFormatError([_located(p, f"{name} in {chunk.file}") for p in error.problems]) from None
        start, stop = storages.get(view.storage.key, (0, -1))
        if (view.dtype, view.shape, stop - start) != (whole.dtype, chunk.sizes, view.storage.nbytes):
            what = f"{chunk.file} holds {view.dtype} {list(view.shape)} for a chunk {whole.dtype} {list(chunk.sizes)}"
            raise fault("LF-510", what, where=name)
        if 0 in view.shape:
            return np.empty(view.shape, numpy_dtype(view.dtype))
        return np.ndarray(view.shape, numpy_dtype(view.dtype), data, start + view.offset, view.strides)


def _located(problem: Problem, where: str) -> Problem:
    inner = f"{where}: {problem.where}" if problem.where else where
    return Problem(problem.rule, problem.what, inner, problem.fix, problem.severity)
