"""The bytes of an ``.onnx_adapter`` file: a flatbuffer with the identifier TORT, as ONNX Runtime's LoraAdapter maps it.

It is written by onnxruntime. It is read here, because ``AdapterFormat.read_adapter`` of onnxruntime 1.20 ends the
process where a damaged file leads it out of the buffer (1.32 verifies it). Every offset is checked; tensors are views.

    Adapter   { format_version: int32, adapter_version: int32, model_version: int32, parameters: [Parameter] }
    Parameter { name: string, dims: [int64], data_type: int32 (TensorProto's), raw_data: [uint8] }

(onnxruntime/lora/adapter_format/adapter_schema.fbs, 1.20 to 1.32)
"""

from __future__ import annotations

import hashlib
import math
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import ml_dtypes
import numpy as np

from loraformat.errors import fault

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["DTYPES", "MAGIC", "Contents", "read", "value", "version_of", "write"]

MAGIC = b"TORT"
"""Bytes 4 to 8 of the file."""

DTYPES: Mapping[int, np.dtype[Any]] = {
    1: np.dtype(np.float32),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    16: np.dtype(ml_dtypes.bfloat16),
}
"""TensorProto's data types that a factor can have."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_OURS = 1 << 30


@dataclass(frozen=True)
class Contents:
    """What a file holds; a version is the number that whoever wrote it chose."""

    tensors: Mapping[str, Array]
    adapter_version: int = 0
    model_version: int = 0

    @property
    def stated(self) -> bool:
        """Whether ``adapter_version`` is a digest of ours."""
        return self.adapter_version >= _OURS


def version_of(*facts: bytes) -> int:
    """30 bits of a SHA-256 below a bit that marks them as ours: a version field has 31 bits."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(len(fact).to_bytes(8, "little") + fact)
    return _OURS | int.from_bytes(digest.digest()[:4], "little") >> 2


def content_version(tensors: Mapping[str, Array]) -> int:
    """The digest of names, dtypes, shapes and values."""
    facts = ((name, t) for name, t in sorted(tensors.items()))
    return version_of(
        *(piece for n, t in facts for piece in (n.encode(), f"{t.dtype.name}{t.shape}".encode(), t.tobytes()))
    )


def read(path: Path) -> Contents:
    """The tensors, as views of the mapped file, and the versions.

    Raises:
        LoraFormatError: LF-101 no such file; LF-107 an offset leads out of it; LF-104 a name occurs twice; LF-106 a
            data type that no factor has; LF-108 sizes that do not fit; LF-507 the tensors are not those whose
            digest the file states.
    """
    data = np.memmap(path, np.uint8, "r").view(np.ndarray) if path.stat().st_size else np.empty(0, np.uint8)
    if data[4:8].tobytes() != MAGIC:
        raise fault("LF-101", f"{path} does not begin as an .onnx_adapter file does", fix="truncated?")
    try:
        found = _Buffer(data).contents()
    except (struct.error, IndexError, UnicodeDecodeError):
        what = "an offset or a name of the flatbuffer leads out of the file"
        raise fault("LF-107", what, where=str(path), fix="damaged: write it again") from None
    if found.stated and content_version(found.tensors) != found.adapter_version:
        what = "the tensors are not those whose digest adapter_version states"
        raise fault("LF-507", what, where=str(path), fix="damaged, or changed by another tool: write it again")
    return found


def write(file: BinaryIO, tensors: Mapping[str, Array], model_version: int) -> None:
    """An ``.onnx_adapter``, by onnxruntime; LF-704 where that is not installed."""
    try:
        from onnxruntime import AdapterFormat, OrtValue
    except ImportError as error:
        fix = "pip install 'loraformat[onnx]', with onnxruntime 1.20 or newer"
        raise fault("LF-704", f"an .onnx_adapter is written by onnxruntime: {error}", fix=fix) from None
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    made = AdapterFormat()
    made.set_adapter_version(content_version(whole))
    made.set_model_version(model_version)
    made.set_parameters({name: value(OrtValue, tensor) for name, tensor in whole.items()})
    with tempfile.TemporaryDirectory() as folder:  # onnxruntime writes to paths only
        path = Path(folder, "adapter.onnx_adapter")
        made.export_adapter(str(path))
        file.write(path.read_bytes())


def value(kind: Any, tensor: Array, device: str = "cpu", number: int = 0) -> Any:
    """The tensor as an ``OrtValue`` (``kind`` is that class) in the memory of a device; ``number``: of which of its kind."""
    if not tensor.dtype.isnative:  # whose bytes ONNX Runtime would take as they lie
        tensor = tensor.astype(tensor.dtype.newbyteorder("="))
    if tensor.dtype == ml_dtypes.bfloat16:  # numpy has no such type, so its bits are handed over
        return kind.ortvalue_from_numpy_with_onnx_type(tensor.view(np.uint16), _CODES[tensor.dtype])
    return kind.ortvalue_from_numpy(tensor, device, number)


class _Buffer:
    """Tables and vectors of a flatbuffer. Positions are never negative, so that a slice cannot count from the end."""

    def __init__(self, data: Array) -> None:
        self.data = data

    def contents(self) -> Contents:
        """The root table."""
        root = self._number("<I", 0)
        tensors: dict[str, Array] = {}
        start, count = self._vector(root, 3, 4)
        for i in range(count):
            name, tensor = self._parameter(self._follow(start + 4 * i))
            if name in tensors:
                raise fault("LF-104", "the file has two tensors of one name", where=name)
            tensors[name] = tensor
        return Contents(tensors, self._field(root, 1), self._field(root, 2))

    def _parameter(self, table: int) -> tuple[str, Array]:
        name = self._bytes(*self._vector(table, 0, 1)).tobytes().decode()
        start, count = self._vector(table, 1, 8)
        dims = [self._number("<q", start + 8 * i) for i in range(count)]
        dtype = DTYPES.get(code := self._field(table, 2))
        if dtype is None:
            raise fault("LF-106", f"data type {code} is none of a factor's", where=name)
        raw = self._bytes(*self._vector(table, 3, 1))
        if min(dims, default=0) < 0 or math.prod(dims) * dtype.itemsize != raw.size:
            raise fault("LF-108", f"{raw.size} bytes for {dtype.name} {dims}", where=name)
        return name, raw.view(dtype).reshape(dims) if raw.size else np.empty(dims, dtype)

    def _field(self, table: int, index: int) -> int:
        place = self._place(table, index)
        return self._number("<i", place) if place else 0

    def _vector(self, table: int, index: int, width: int) -> tuple[int, int]:
        """(position, number of items) of a vector; nothing is read beyond the file."""
        place = self._place(table, index)
        if not place:
            return 0, 0
        start = self._follow(place)
        count = self._number("<I", start)
        if start + 4 + count * width > self.data.size:
            raise IndexError
        return start + 4, count

    def _place(self, table: int, index: int) -> int:
        """Where a table keeps a field; 0 where it does not."""
        vtable = table - self._number("<i", table)
        size = self._number("<H", vtable)
        offset = self._number("<H", vtable + 4 + 2 * index) if 4 + 2 * index < size else 0
        return table + offset if offset else 0

    def _follow(self, place: int) -> int:
        return place + self._number("<I", place)

    def _number(self, form: str, place: int) -> int:
        if place < 0:
            raise IndexError
        return int(struct.unpack_from(form, self.data.data, place)[0])

    def _bytes(self, start: int, count: int) -> Array:
        return self.data[start : start + count]
