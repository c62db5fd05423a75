"""A distributed checkpoint of torch: ``.metadata`` says of which chunks a tensor is made, ``*.distcp`` hold their values.

Each rank of a run writes its own files. A chunk is a range of one of them, and that range a whole file of
``torch.save`` that holds one tensor (torch 2.13, torch/distributed/checkpoint/filesystem.py). Read as everything of
torch's is here: nothing is run, and of the classes that ``.metadata`` names only what they hold is noted.
"""

from __future__ import annotations

import io
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.container import DTYPES, numpy_dtype
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.pickled import INDEX
from loraformat.pickled.archive import read_archive
from loraformat.pickled.machine import Kind, Record, run
from loraformat.pickled.tensors import DTYPE_NAMES, read_view

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Distributed"]

_CAP = 64 << 20
_MOST_AXES = 32
_CLASSES = ("torch.distributed.checkpoint.", "pathlib.")


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The block of a tensor from ``offsets`` on, in the bytes [start, start + length) of a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class _Whole:
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[_Chunk, ...]


class Distributed(Mapping[str, "Array"]):
    """Name → array, put together of its chunks when it is asked for. What is no tensor is not in it.

    Raises:
        LoraFormatError: LF-510 an index that is damaged or names what it does not hold; LF-701 a file is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = cache(self._mapped)
        try:
            self._tensors = _tensors(_index(folder / INDEX))
            for name, whole in self._tensors.items():
                self._check(name, whole)
        except LoraFormatError as error:
            raise LoraFormatError([_located(problem, INDEX) for problem in error.problems]) from None

    def __getitem__(self, name: str) -> Array:
        import numpy as np

        whole = self._tensors[name]
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
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def cuts(self, name: str, axis: int) -> int:
        """Into how many pieces the ranks of the run cut an axis of a tensor."""
        return len({chunk.offsets[axis] for chunk in self._tensors[name].chunks})

    def _check(self, name: str, whole: _Whole) -> None:
        """That the chunks add up to the tensor, and that the files are long enough for them."""
        missing = math.prod(whole.shape) - sum(math.prod(chunk.sizes) for chunk in whole.chunks)
        if missing:
            what = (
                f"the chunks of {list(whole.shape)} hold {abs(missing):,} values too {'few' if missing > 0 else 'many'}"
            )
            raise fault("LF-510", what, where=name, fix="a file of a rank is missing, or the run ended while it saved")
        for chunk in whole.chunks:
            size = len(self._file(chunk.file))
            if chunk.start + chunk.length > size:
                what = f"{chunk.file} has {size:,} bytes; a chunk ends at {chunk.start + chunk.length:,}"
                raise fault("LF-510", what, where=name)
            if math.prod(chunk.sizes) * DTYPES[whole.dtype] > chunk.length:
                raise fault(
                    "LF-510", f"a chunk {list(chunk.sizes)} is larger than its {chunk.length:,} bytes", where=name
                )

    def _mapped(self, name: str) -> memoryview:
        path = self.folder / name
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
        except OSError as error:
            fix = "every rank of the run wrote files of its own: copy all of the folder"
            raise fault("LF-701", f"cannot read {path}: {error.strerror or error}", fix=fix) from None

    def _read(self, name: str, whole: _Whole, chunk: _Chunk) -> Array:
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


def _index(path: Path) -> Record:
    """What ``.metadata`` holds: one object of torch.distributed.checkpoint.metadata.Metadata."""
    try:
        with open(path, "rb") as file:
            program = file.read(_CAP + 1)
    except OSError as error:
        raise fault("LF-701", f"cannot read {path}: {error.strerror or error}") from None
    if len(program) > _CAP:
        raise fault("LF-510", f"the index has more than {_CAP:,} bytes")
    found = run(io.BytesIO(program), _known, _persistent)
    if not isinstance(found, Record) or not found.name.endswith(".Metadata"):
        raise fault("LF-510", "the index is none of torch.distributed.checkpoint")
    return found


def _known(name: str) -> Any:
    module, _, last = name.rpartition(".")
    if module == "torch" and last in DTYPE_NAMES:
        return DTYPE_NAMES[last]
    if name == "torch.Size":
        return Kind(name, tuple)
    if name == "torch.serialization._get_layout" or name.startswith(_CLASSES):
        return Kind(name, lambda *_: Record(name))
    raise fault("LF-510", f"the index asks for {name}, which no index of torch.distributed.checkpoint needs")


def _persistent(pid: Any) -> Any:
    raise fault("LF-510", "the index refers to a storage")


def _tensors(index: Record) -> dict[str, _Whole]:
    """Name → tensor with its chunks, each where the index says that it lies."""
    places = {}
    for key, place in _items(index, "storage_data"):
        name = _field(key, "fqn")
        offset = key.state.get("offset")  # none of what is no tensor
        if isinstance(name, str) and offset is not None:
            places[name, _numbers(offset)] = place
    found = {}
    for name, told in _items(index, "state_dict_metadata"):
        if isinstance(told, Record) and told.name.endswith(".TensorStorageMetadata"):
            found[str(name)] = _whole(str(name), told, places)
    if moved := [name for name in found if _of_another_shape(index, name)]:
        raise fault("LF-510", "Megatron-Core stored the tensor under another shape than its own", where=moved[0])
    return found


def _whole(name: str, told: Record, places: Mapping[Any, Any]) -> _Whole:
    properties, chunks = _field(told, "properties"), _field(told, "chunks")
    held = properties.state if isinstance(properties, Record) else None
    dtype = held[0] if isinstance(held, tuple) and held else None
    if not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(chunks, list):
        raise fault("LF-510", "a tensor without a known dtype or without chunks", where=name)
    shape = _numbers(_field(told, "size"))
    blocks = [(_numbers(_field(chunk, "offsets")), _numbers(_field(chunk, "sizes"))) for chunk in chunks]
    for offsets, sizes in blocks:
        if not len(offsets) == len(sizes) == len(shape) <= _MOST_AXES:
            raise fault("LF-510", "a chunk of other axes than its tensor", where=name)
        if any(at + size > end for at, size, end in zip(offsets, sizes, shape, strict=True)):
            raise fault("LF-510", f"a chunk reaches beyond its tensor {list(shape)}", where=name)
        if (name, offsets) not in places:
            fix = "a file of a rank is missing, or the run ended while it saved"
            raise fault("LF-510", f"no file holds the chunk at {list(offsets)}", where=name, fix=fix)
    return _Whole(dtype, shape, tuple(_chunk(name, *block, places[name, block[0]]) for block in blocks))


def _chunk(name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], place: Any) -> _Chunk:
    file, start, length = (_field(place, field) for field in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or Path(file).name != file or file == "..":
        raise fault("LF-510", f"a chunk lies in {file!r}, which is no file of the folder", where=name)
    start, length = _numbers((start, length))
    # torch 2.13 _StorageInfo: what a file went through, as compression; absent in earlier versions
    if place.state.get("transform_descriptors"):
        raise fault("LF-510", "the chunk is stored transformed", where=name, fix="save it without an extension")
    return _Chunk(offsets, sizes, file, start, length)


def _of_another_shape(index: Record, name: str) -> bool:
    """Megatron-Core 0.16 strategies/torch.py ``mcore_data``: of flattened tensors, which no model has."""
    told = index.state.get("mcore_data")
    return isinstance(told, dict) and bool(told.get(name))


def _items(index: Record, field: str) -> list[tuple[Any, Any]]:
    value = _field(index, field)
    if not isinstance(value, dict):
        raise fault("LF-510", f"the index has no {field}")
    return list(value.items())


def _field(record: Any, name: str) -> Any:
    """A field of a noted object; LF-510 where there is none."""
    if not isinstance(record, Record) or not isinstance(record.state, dict) or name not in record.state:
        raise fault("LF-510", f"the index is damaged: something in it has no {name}")
    return record.state[name]


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and 0 <= n < 2**62 for n in value):
        raise fault("LF-510", "the index is damaged: sizes or offsets are no numbers")
    return value


def _located(problem: Problem, where: str) -> Problem:
    inner = f"{where}: {problem.where}" if problem.where else where
    return Problem(problem.rule, problem.what, inner, problem.fix, problem.severity)
