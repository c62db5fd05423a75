"""The index of a distributed checkpoint: of which chunks every tensor is made, and where each of them lies.

``.metadata`` is a pickle of the classes of torch.distributed.checkpoint (torch 2.13, metadata.py). Of each object only what
it holds is noted.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraformat.dtypes import DTYPES
from loraformat.errors import fault
from loraformat.pickled.machine import Kind, Record, run
from loraformat.pickled.tensors import DTYPE_NAMES

__all__ = ["Chunk", "Whole", "describe", "places", "read_index", "tensors"]

_CAP = 64 << 20
_MOST_AXES = 32
_CLASSES = ("torch.distributed.checkpoint.", "pathlib.")


@dataclass(frozen=True, slots=True)
class Chunk:
    """The block of a tensor from ``offsets`` on, in the bytes [start, start + length) of a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor, of the chunks that it was cut into."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def read_index(path: Path) -> Record:
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


def tensors(index: Record) -> dict[str, Record]:
    """Name → what is said of it, of every tensor."""
    items = _items(index, "state_dict_metadata")
    kind = ".TensorStorageMetadata"
    return {str(name): told for name, told in items if isinstance(told, Record) and told.name.endswith(kind)}


def places(index: Record) -> dict[tuple[str, tuple[int, ...]], Any]:
    """(name, offsets) → where that chunk lies."""
    found = {}
    for key, place in _items(index, "storage_data"):
        name = _field(key, "fqn")
        offset = key.state.get("offset")  # none of what is no tensor
        if isinstance(name, str) and offset is not None:
            found[name, _numbers(offset)] = place
    return found


def describe(name: str, told: Record, found: Mapping[tuple[str, tuple[int, ...]], Any]) -> Whole:
    """What ``told`` says of the tensor, each chunk where it is ``found``; LF-510 where that does not fit together."""
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
        if (name, offsets) not in found:
            fix = "a file of a rank is missing, or the run ended while it saved"
            raise fault("LF-510", f"no file holds the chunk at {list(offsets)}", where=name, fix=fix)
    return Whole(dtype, shape, tuple(_chunk(name, *block, found[name, block[0]]) for block in blocks))


def _chunk(name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], place: Any) -> Chunk:
    file, start, length = (_field(place, field) for field in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or Path(file).name != file or file == "..":
        raise fault("LF-510", f"a chunk lies in {file!r}, which is no file of the folder", where=name)
    start, length = _numbers((start, length))
    # torch 2.13 _StorageInfo: what a file went through, as compression; absent in earlier versions
    if place.state.get("transform_descriptors"):
        raise fault("LF-510", "the chunk is stored transformed", where=name, fix="save it without an extension")
    return Chunk(offsets, sizes, file, start, length)


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
