"""A GGUF file: metadata and tensors. Read by code of our own, because a hostile one must be refused by a rule.

The form is that of the GGUF specification, version 3, as ggml reads it (gguf.cpp of the
llama.cpp in llama-cpp-python 0.3.36): magic, version, two
counts, the metadata, a description of each tensor, and their data one after the other, each aligned. A shape is stored
with the fastest axis first; here it is the other way round, as numpy has it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat_converters.gguf.cursor import Cursor, Value, unsound

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["ALIGNMENT", "LONGEST_NAME", "MAGIC", "NUMPY", "TYPES", "GgufFile", "TensorInfo", "aligned", "dequantised"]

MAGIC = b"GGUF"
ALIGNMENT = 32
LONGEST_NAME = 63
"""Bytes of a tensor's name: ggml keeps 64 with the zero at the end (GGML_MAX_NAME)."""

TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""ggml's number of a type → its name, how many values a block has and how many bytes (gguf 0.19.0 GGML_QUANT_SIZES)."""

NUMPY: Mapping[str, Any] = {
    "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "F64": "<f8",
    "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8",
}  # fmt: skip

_MOST_AXES = 4
_MOST_TENSORS, _MOST_VALUES = 2**20, 2**16
_WIDEST_ALIGNMENT = 2**16
_MOST_PROBLEMS = 100  # a hostile file may have a million


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's type, its shape as numpy has it, and its bytes [start, stop) in the file."""

    type: str
    shape: tuple[int, ...]
    start: int
    stop: int


class GgufFile(Mapping[str, "Array"]):
    """Name → array, each a view of the mapped file where its type is one of numpy's; quantised as float32.

    Attributes:
        metadata: key → value, in the order of the file.
        infos: name → description.
        size: of the file, in bytes.

    Raises:
        LoraFormatError: LF-511 the file is not sound, with every fault of its tensors; on reading one, LF-704 where its
            type needs the package gguf.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = size = file.seek(0, 2)
                self._map: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise fault("LF-701", f"cannot read {path}: {error.strerror or error}") from None
        cursor = Cursor(self._map, size)
        tensors = _begin(cursor)
        self.metadata = _metadata(cursor)
        self.infos = _infos(cursor, tensors, _alignment(self.metadata))

    def __getitem__(self, name: str) -> Array:
        return self.read(name)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """A tensor, or the rows [start, stop) of its first axis; blocks lie along the last."""
        info = self.infos[name]
        whole = rows is None or (len(info.shape) == 1 and info.type not in NUMPY)
        data = self.stored(name, None if whole else rows)
        values: Array = data.view(NUMPY[info.type]) if info.type in NUMPY else dequantised(name, info.type, data)
        if rows is None or whole:
            return values.reshape(info.shape)[... if rows is None else slice(*rows)]
        return values.reshape(rows[1] - rows[0], *info.shape[1:])

    def stored(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """The bytes of a tensor, or of the rows [start, stop) of its first axis: uint8 [rows, bytes of a row]."""
        info = self.infos[name]
        first, last = rows or (0, info.shape[0] if info.shape else 1)
        width = (info.stop - info.start) // (info.shape[0] if info.shape else 1)
        data = np.frombuffer(self._map, np.uint8, width * (last - first), info.start + width * first)
        return data.reshape(last - first, width)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def aligned(offset: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple."""
    return offset + -offset % alignment


def dequantised(name: str, kind: str, data: Array) -> Array:
    """The values of a quantised tensor as float32: of Q8_0, which adapters have, here; of others by the package gguf."""
    if kind == "Q8_0":
        return _q8_0(data)
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        what = f"the tensor is quantised as {kind}, which the package gguf reads"
        raise fault("LF-704", what, where=name, fix="pip install 'loraformat[gguf]'") from None
    try:
        return np.asarray(quants.dequantize(data, GGMLQuantizationType[kind]), np.float32)
    except (KeyError, NotImplementedError) as error:
        raise fault("LF-504", f"the tensor is quantised as {kind}, which nobody reads: {error}", where=name) from None


def _q8_0(data: Array) -> Array:
    """Blocks of 32 values: a float16 and 32 bytes that it multiplies (ggml-quants.c dequantize_row_q8_0)."""
    blocks = data.reshape(-1, 34)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return scales * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)


def _begin(cursor: Cursor) -> int:
    """Magic and version; how many tensors there are."""
    start = cursor.skip(4, "the magic")
    if (magic := bytes(cursor.data[start : start + 4])) != MAGIC:
        raise unsound(f"a GGUF file begins with GGUF, this one with {magic!r}")
    version = cursor.scalar(4, "the version")
    if version & 0xFFFF == 0:
        raise fault("LF-504", f"the file is big-endian (version {version:#x})", fix="convert it without --bigendian")
    if version not in (2, 3):
        raise fault("LF-504", f"GGUF version {version}; read are 2 and 3", fix="convert the adapter again")
    count: int = cursor.scalar(10, "the number of tensors")
    if count > _MOST_TENSORS:
        raise unsound(f"the file states {count:,} tensors; the most is {_MOST_TENSORS:,}")
    return count


def _metadata(cursor: Cursor) -> dict[str, Value]:
    count = cursor.scalar(10, "the number of values")
    if count > _MOST_VALUES:
        raise unsound(f"the file states {count:,} metadata values; the most is {_MOST_VALUES:,}")
    values: dict[str, Value] = {}
    for n in range(count):
        key = cursor.key(f"the key of value {n}")
        if key in values:
            raise unsound("the key stands twice", key)
        values[key] = cursor.value(key)
    return values


def _alignment(values: Mapping[str, Value]) -> int:
    found = values.get("general.alignment", Value("u32", ALIGNMENT))
    if found.type != "u32" or not 0 < found.value <= _WIDEST_ALIGNMENT or found.value & (found.value - 1):
        raise unsound(f"{found.value!r} ({found.type}) is no power of two up to 65,536", "general.alignment")
    alignment: int = found.value
    return alignment


def _infos(cursor: Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    """Every description; the tensors lie one after the other, in this order, with no room between or behind them."""
    problems: list[Problem] = []
    found: dict[str, TensorInfo] = {}
    end = 0
    for n in range(count):
        name = cursor.string(f"the name of tensor {n}", LONGEST_NAME)
        shape = _shape(cursor, name)
        kind, offset = cursor.scalar(4, f"the type of {name}"), cursor.scalar(10, f"the offset of {name}")
        size = _size(kind, shape)
        why = _fault(name, found, kind, shape, size, offset, aligned(end, alignment))
        end = offset + (size or 0)
        if why is None:
            found[name] = TensorInfo(TYPES[kind][0], shape, offset, end)
            continue
        problems.append(Problem("LF-511", why, name))
        if len(problems) == _MOST_PROBLEMS:
            break
    start = aligned(cursor.at, alignment)
    if not problems and not (start + end if found else cursor.at) <= cursor.size <= aligned(start + end, alignment):
        what = f"the tensors end at byte {start + end:,}, the file at {cursor.size:,}"
        problems.append(Problem("LF-511", what, fix="is the file whole? download or convert it again"))
    if problems:
        raise LoraFormatError(problems)
    return {name: TensorInfo(i.type, i.shape, start + i.start, start + i.stop) for name, i in found.items()}


def _shape(cursor: Cursor, name: str) -> tuple[int, ...]:
    axes = cursor.scalar(4, f"the number of axes of {name}")
    if axes > _MOST_AXES:
        raise unsound(f"{axes} axes; the most is {_MOST_AXES}", name)
    return tuple(reversed([cursor.scalar(10, f"the shape of {name}") for _ in range(axes)]))


def _size(kind: int, shape: tuple[int, ...]) -> int | None:
    """The bytes of a tensor; None of an unknown type, or where its rows are no whole blocks."""
    if kind not in TYPES:
        return None
    _, values, width = TYPES[kind]
    count = 1
    for n in shape:
        count *= n
    return None if (shape[-1] if shape else 1) % values else count // values * width


def _fault(
    name: str,
    found: Mapping[str, TensorInfo],
    kind: int,
    shape: tuple[int, ...],
    size: int | None,
    offset: int,
    wanted: int,
) -> str | None:
    """What is wrong with one description, or None."""
    if name in found:
        return "the name stands twice"
    if size is None:
        return f"{list(shape)} of type {TYPES[kind][0] if kind in TYPES else kind} is nothing that ggml knows"
    if 0 in shape:
        return f"the tensor is empty: {list(shape)}"
    if offset != wanted:
        return f"the data begins at {offset:,} of the data section, and would at {wanted:,} without overlap or hole"
    return None
