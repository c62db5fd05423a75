"""The container: safetensors, unchanged, by a strict reader over mmap. ``serializer`` writes it.

We parse the header ourselves because a fault must name its rule and its tensor, because duplicate keys, holes
and offsets must be seen at all, and because a tensor must be a view of the file and not a copy of it.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat import canonical
from loraformat.dtypes import DTYPES, numpy_dtype
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.mapped import remember

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Container", "TensorInfo", "mistaken_for", "parse_header"]

HEADER_CAP = 100_000_000
"""Bytes: the reference reader's own cap (safetensors 0.8 MAX_HEADER_SIZE)."""

_MOST_AXES = 32  # what every array library holds (numpy 1.x, torch exports)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A header entry: dtype name, shape, and the byte range [start, stop) within the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Container(Mapping[str, "Array"]):
    """A safetensors file: name → array, each a view of the mapped file; ``infos``, ``metadata`` as in the header.

    Raises:
        LoraFormatError: LF-101 … LF-109, every fault of the header at once; LF-701 no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb", opener=_without_waiting) as file:
                info = os.fstat(file.fileno())
                if not stat.S_ISREG(info.st_mode):
                    raise fault("LF-701", f"{self.path} is not a regular file")
                self.size = info.st_size
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
                if isinstance(self._map, mmap.mmap):
                    remember(self._map, file.fileno())
        except OSError as error:
            raise fault("LF-701", f"cannot read {self.path}: {error.strerror or error}") from None
        self.infos, self.metadata, self.data_start = parse_header(self._map, self.size)

    @property
    def bytes(self) -> mmap.mmap | bytes:
        """The whole mapped file."""
        return self._map

    def __getitem__(self, name: str) -> Array:
        import numpy as np

        info = self.infos[name]
        count = (info.stop - info.start) // DTYPES[info.dtype]
        flat = np.frombuffer(self._map, numpy_dtype(info.dtype), count, self.data_start + info.start)
        try:
            return flat.reshape(info.shape)
        except ValueError:  # numpy holds no empty array whose other sizes multiply beyond 2^63
            raise fault("LF-311", f"the tensor is empty: {list(info.shape)}", where=name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def _without_waiting(path: str, flags: int) -> int:
    """Opening a pipe waits for a writer, for ever: a folder of strangers' files may hold one."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def parse_header(data: Any, size: int) -> tuple[dict[str, TensorInfo], dict[str, str], int]:
    """(tensor infos, metadata, offset of the data section) of a safetensors file of ``size`` bytes."""
    if size < 8:
        raise fault("LF-101", f"the file has {size} bytes; a safetensors file begins with 8 bytes of header length")
    length = int.from_bytes(data[:8], "little")
    if length > HEADER_CAP or 8 + length > size:
        limit = "the cap of 100,000,000 bytes" if length > HEADER_CAP else f"the {size} bytes of the file"
        raise fault(
            "LF-102",
            f"the header's length, {length:,} bytes, is beyond {limit}",
            fix=mistaken_for(bytes(data[:24])) or "the file is truncated, or it is not a safetensors file",
        )
    try:
        text = bytes(data[8 : 8 + length]).decode()
        if not text.startswith("{"):  # the reference reader wants it first, so that a header is told at a glance
            raise ValueError("it does not begin with {")
        header = canonical.loads(text)
    except ValueError as error:
        rule = "LF-104" if "duplicate key" in str(error) else "LF-103"
        raise fault(rule, f"the header is not strict JSON: {error}") from None
    problems: list[Problem] = []
    metadata = _metadata(header.pop("__metadata__", {}), problems)
    infos: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        info = _info(name, entry, problems)
        if info is not None:
            infos[name] = info
    if not problems:
        _check_cover(infos, size - 8 - length, problems)
    if problems:
        raise LoraFormatError(problems)
    return infos, metadata, 8 + length


_BEGINNINGS = (
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself: git lfs pull"),
    (b"<", "it is a web page: the download went wrong"),
    (b"{", "it is JSON"),
    (b"GGUF", "it is a GGUF file"),
)


def mistaken_for(data: bytes) -> str:
    """What a file that begins so is, where it is no tensor file; "" where that is not known."""
    return next((text for beginning, text in _BEGINNINGS if data.startswith(beginning)), "")


def _metadata(value: Any, problems: list[Problem]) -> dict[str, str]:
    if value is None:  # safetensors 0.8 reads it as absent, and tools have written it
        return {}
    if isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
        return value
    problems.append(Problem("LF-109", "__metadata__ must map strings to strings", "__metadata__"))
    return {}


def _info(name: str, entry: Any, problems: list[Problem]) -> TensorInfo | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        problems.append(Problem("LF-105", "an entry has exactly dtype, shape and data_offsets", name))
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2 and isinstance(dtype, str)):
        found = f"dtype {dtype!r}, shape {shape!r}, data_offsets {offsets!r}"
        what = f"{found}: a string and two lists of non-negative integers"
        problems.append(Problem("LF-105", what, name))
        return None
    if len(shape) > _MOST_AXES:
        problems.append(Problem("LF-105", f"a tensor has at most {_MOST_AXES} axes, not {len(shape)}", name))
        return None
    if dtype not in DTYPES:
        problems.append(Problem("LF-106", f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}", name))
        return None
    nbytes = DTYPES[dtype]
    for n in shape:
        nbytes *= n
    if offsets[1] - offsets[0] != nbytes:
        what = f"data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes, {dtype} {shape} needs {nbytes}"
        problems.append(Problem("LF-108", what, name))
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_cover(infos: Mapping[str, TensorInfo], size: int, problems: list[Problem]) -> None:
    """Every byte of the data section belongs to exactly one tensor: no room for a second file inside the first."""
    end = 0
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else f"leaves bytes {end} to {info.start} unused"
            problems.append(Problem("LF-107", f"the tensor's data {what}", name))
        end = max(end, info.stop)
    if end != size:
        more = "is truncated" if end > size else "has bytes that no tensor covers"
        problems.append(
            Problem("LF-107", f"tensors end at byte {end:,} of the data section, which {more}: {size:,} bytes")
        )
