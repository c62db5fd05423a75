"""Writing a GGUF file: version 3, little-endian, each tensor aligned, the same content always the same bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from loraformat.dtypes import dtype_name
from loraformat.ranges import append
from loraformat.serializer import raw, slabs
from loraformat_converters.gguf.cursor import ARRAY, SCALARS, STRING, Value
from loraformat_converters.gguf.file import ALIGNMENT, MAGIC, TYPES, aligned

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["DTYPES", "write"]

_NUMBERS = {name: number for number, (name, _) in SCALARS.items()} | {"str": STRING}
_TYPES = {name: number for number, (name, _, _) in TYPES.items()}
DTYPES = frozenset({"F32", "F16", "BF16"})
"""What is written; of these, both spellings are one."""


def write(file: BinaryIO, values: Mapping[str, Value], tensors: Mapping[str, Array]) -> None:
    """Stream a file with this metadata and these tensors, in their order; their dtypes are of ``DTYPES``."""
    head = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(values))
    head += b"".join(_string(key) + _value(value) for key, value in values.items())
    end = 0
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", _TYPES[dtype_name(tensor.dtype)], end)
        end += aligned(tensor.nbytes)
    file.write(head + b"\0" * (-len(head) % ALIGNMENT))
    for tensor in tensors.values():
        for slab in slabs(tensor):
            append(file, raw(slab))
        file.write(b"\0" * (-tensor.nbytes % ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if not value.type.startswith("["):
        return struct.pack("<I", _NUMBERS[value.type]) + _item(value.type, value.value)
    kind = value.type[1:-1]
    head = struct.pack("<IIQ", ARRAY, _NUMBERS[kind], len(value.value))
    return head + b"".join(_item(kind, item) for item in value.value)


def _item(kind: str, value: Any) -> bytes:
    return _string(value) if kind == "str" else struct.pack(f"<{SCALARS[_NUMBERS[kind]][1]}", value)
