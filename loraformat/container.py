"""The container: safetensors, unchanged. A strict reader over mmap, and the reference serializer's byte order.

We parse the header ourselves because a fault must name its rule and its tensor, because duplicate keys, holes
and offsets must be seen at all, and because a tensor must be a view of the file and not a copy of it.
"""

from __future__ import annotations

import functools
import io
import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loraformat import canonical
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.mapped import place, read_ahead, remember
from loraformat.ranges import append, append_copy

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = [
    "DTYPES",
    "Container",
    "TensorInfo",
    "dtype_name",
    "header_bytes",
    "parse_header",
    "raw",
    "slabs",
    "tensor_order",
]

HEADER_CAP = 100_000_000
"""Bytes: the reference reader's own cap (safetensors 0.8 MAX_HEADER_SIZE)."""

_BLOCK = 128  # values a side
_SLAB = 1 << 20  # bytes

_MOST_AXES = 32  # what every array library holds (numpy 1.x, torch exports)

# The reference serializer orders tensors by dtype, widest first, then by name: the order of its Dtype enum
# (safetensors 0.8 tensor.rs), reversed. Width in bytes beside each.
_WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
DTYPES: Mapping[str, int] = _WIDTHS
_RANKS = {name: i for i, name in enumerate(_WIDTHS)}
_NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4", "U32": "<u4",
    "F32": "<f4", "C64": "<c8", "F64": "<f8", "I64": "<i8", "U64": "<u8",
}  # fmt: skip
_ML = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


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
            "LF-102", f"the header's length, {length:,} bytes, is beyond {limit}", fix=_mistaken_for(bytes(data[:24]))
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


def _mistaken_for(data: bytes) -> str:
    """What a file that begins so is, where it is no safetensors file."""
    known = (text for beginning, text in _BEGINNINGS if data.startswith(beginning))
    return next(known, "the file is truncated, or it is not a safetensors file")


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


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a safetensors dtype; bfloat16 and float8 come from ml_dtypes."""
    import numpy as np

    if name in _NUMPY:
        return np.dtype(_NUMPY[name])
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _ML[name]))
    return dtype


@functools.cache  # numpy takes 10 µs to spell a dtype's name, and a large adapter asks thousands of times
def dtype_name(dtype: np.dtype[Any]) -> str:
    """The safetensors name of a numpy dtype; ValueError where there is none."""
    spelled = {v: k for k, v in _ML.items()}.get(dtype.name) or {
        "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16", "int32": "I32",
        "uint32": "U32", "float32": "F32", "complex64": "C64", "float64": "F64", "int64": "I64", "uint64": "U64",
    }.get(dtype.name)  # fmt: skip
    if spelled is None:
        raise ValueError(f"safetensors has no dtype for {dtype}")
    return spelled


def tensor_order(dtypes: Mapping[str, str]) -> list[str]:
    """The names in the reference serializer's order: widest dtype first, then by name."""
    return sorted(dtypes, key=lambda name: (-_RANKS[dtypes[name]], name.encode()))


def header_bytes(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and header, padded with spaces to 8 bytes, spelled as the reference serializer spells it."""
    import json

    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, info in infos.items():
        offsets = [info.start, info.stop]
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(file: BinaryIO, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Stream a safetensors file: the same tensors and metadata always give the same bytes."""
    dtypes = {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()}
    order, infos, end = tensor_order(dtypes), {}, 0
    for name in order:
        infos[name] = TensorInfo(dtypes[name], tensors[name].shape, end, end + tensors[name].nbytes)
        end += tensors[name].nbytes
    file.write(header_bytes(infos, metadata))
    for name in order:
        if not _copied(file, tensors[name]):
            for slab in slabs(tensors[name]):
                append(file, raw(slab))


def _copied(file: BinaryIO, tensor: Array) -> bool:
    """Whether the kernel has copied the bytes, out of the file that the tensor is a view of."""
    found = place(tensor) if tensor.dtype.byteorder != ">" else None
    if found is None or not isinstance(file, (io.BufferedRandom, io.BufferedWriter)):
        return False
    with open(found[0], "rb", buffering=0, closefd=False) as source:
        append_copy(file, source, found[1], tensor.nbytes)
    return True


def slabs(tensor: Array) -> Iterator[Array]:
    """A tensor, in runs of rows where they are made, or of a transposed matrix turned, and used while they are in the cache."""
    from loraformat.pieced import Pieced

    if isinstance(tensor, Pieced):
        yield from tensor.runs()
        return
    if not _is_turned(tensor):
        yield tensor
        return
    rows = max(_BLOCK, _SLAB // (tensor.shape[1] * tensor.itemsize))
    yield from (tensor[start : start + rows] for start in range(0, tensor.shape[0], rows))


def raw(tensor: Array) -> memoryview:
    """The values as a file holds them: row-major, little-endian; a copy only where they do not lie so already."""
    import numpy as np

    read_ahead(tensor)
    if tensor.dtype.byteorder == ">":
        tensor = tensor.astype(tensor.dtype.newbyteorder("<"))
    # numpy moves values of a dtype that it does not know (bfloat16) one by one; as integers it moves runs of them.
    if tensor.dtype.kind == "V" and not tensor.flags.c_contiguous:
        tensor = tensor.view(f"u{tensor.itemsize}")
    return _row_major(tensor).reshape(-1).view(np.uint8).data


def _row_major(tensor: Array) -> Array:
    """A transposed matrix block by block: its lines are read once, and turned where they lie close together.

    numpy's own copy reads a line again for each value in it where lines are some power of two apart: 8 times slower.
    """
    import numpy as np

    if not _is_turned(tensor):
        return np.ascontiguousarray(tensor)
    out = np.empty(tensor.shape, tensor.dtype)
    for i in range(0, tensor.shape[0], _BLOCK):
        for j in range(0, tensor.shape[1], _BLOCK):
            block = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
            out[block] = tensor[block].copy(order="K")
    return out


def _is_turned(tensor: Array) -> bool:
    """Whether the values of a row do not lie side by side."""
    return (
        tensor.ndim == 2 and tensor.size > 0 and not tensor.flags.c_contiguous and tensor.strides[1] != tensor.itemsize
    )
