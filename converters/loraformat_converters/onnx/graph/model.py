"""An ONNX file as it lies on disk: the graph in memory, its weights where they are.

External data is never loaded: a tensor is a view of the mapped file. Paths in a model are a stranger's input, so
they are checked as onnx ≥ 1.21 checks them: relative, inside the folder, no link of any kind (CVE-2026-27489), within
the file.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from loraformat.errors import fault
from loraformat_converters.onnx.graph.scopes import opset_of

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["FLOATS", "External", "Rows", "array", "external", "is_small", "light", "load", "onnx_dtype", "overlapping"]

FLOATS: Mapping[int, str] = {
    onnx.TensorProto.FLOAT: "F32",
    onnx.TensorProto.FLOAT16: "F16",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.DOUBLE: "F64",
}
"""The weight dtypes that an update is added to, with their safetensors names."""

_PACKED = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
"""Data types of less than a byte, and their bits."""

_KNOWN_KEYS = frozenset({"location", "offset", "length", "checksum", "basepath"})


def load(path: Path) -> onnx.ModelProto:
    """The model without its external data; LF-610 if it is none."""
    model = onnx.ModelProto()
    try:
        with open(path, "rb") as file:
            model.ParseFromString(file.read())
    except OSError as error:
        raise fault("LF-701", f"cannot read {path}: {error.strerror or error}") from None
    except DecodeError as error:
        raise fault(
            "LF-610", f"{path} is not an ONNX model: {error}", fix="truncated, or another kind of file?"
        ) from None
    if not model.graph.node and not model.graph.initializer:
        raise fault("LF-610", f"{path} holds no graph")
    opset = opset_of(model)
    if opset < 7:
        raise fault(
            "LF-610",
            f"{path} uses opset {opset}: Add and Gemm broadcast otherwise before 7",
            fix="convert its opset first",
        )
    return model


def is_small(tensor: onnx.TensorProto) -> bool:
    """Whether it may say something of the graph: a shape, axes, a scale."""
    return math.prod(tensor.dims) <= 64 and tensor.data_location != onnx.TensorProto.EXTERNAL


def light(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for what asks about the graph alone: of its stored tensors only the small ones have their values."""
    kept = {field.name: value for field, value in model.graph.ListFields() if field.name != "initializer"}
    graph = onnx.GraphProto(**kept)
    for tensor in model.graph.initializer:
        if is_small(tensor):
            graph.initializer.append(tensor)
        else:
            graph.initializer.add(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    return onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions, graph=graph
    )


class External:
    """Where a tensor's bytes lie outside the model: a checked path and range."""

    def __init__(self, tensor: onnx.TensorProto, folder: Path) -> None:
        entries = {e.key: e.value for e in tensor.external_data}
        if unknown := entries.keys() - _KNOWN_KEYS:
            raise fault("LF-610", f"unknown external data keys {sorted(unknown)}", where=tensor.name)
        self.path = _checked(entries.get("location", ""), folder, tensor.name)
        self.location = Path(entries["location"]).as_posix()  # one spelling of one file
        try:
            self.offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
        except ValueError:
            raise fault("LF-610", "offset and length of external data must be integers", where=tensor.name) from None
        self.length = _nbytes(tensor)
        size = self.path.stat().st_size
        if min(0, self.offset, *tensor.dims) < 0 or length not in (-1, self.length) or self.offset + self.length > size:
            what = f"bytes {self.offset} to {self.offset + self.length} of {self.location} ({size} bytes; length says {length})"
            raise fault(
                "LF-610", f"external data does not fit the tensor {list(tensor.dims)}: {what}", where=tensor.name
            )

    @property
    def end(self) -> int:
        """The offset after the last byte."""
        return self.offset + self.length


def external(tensor: onnx.TensorProto, folder: Path) -> External | None:
    """The tensor's external place, or None if the model holds its bytes."""
    return External(tensor, folder) if tensor.data_location == onnx.TensorProto.EXTERNAL else None


def array(tensor: onnx.TensorProto, folder: Path) -> Array:
    """The values; a read-only view where the bytes are external."""
    place = external(tensor, folder)
    if place is None:
        try:
            return numpy_helper.to_array(tensor)
        except (ValueError, TypeError) as error:
            raise fault("LF-610", f"the tensor's data does not fit its shape: {error}", where=tensor.name) from None
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if not place.length:  # nothing cannot be mapped
        return np.empty(tuple(tensor.dims), dtype)
    if onnx.TensorProto.DataType.Name(tensor.data_type) in _PACKED:  # several to a byte: there is no view of them
        stored = np.fromfile(place.path, np.uint8, place.length, offset=place.offset).tobytes()
        return numpy_helper.to_array(onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=stored))
    return np.memmap(place.path, dtype, "r", place.offset, tuple(tensor.dims))


class Rows:
    """The values of an external tensor, read where they are sliced: a mapping would cost a page fault for each page."""

    def __init__(self, place: External, tensor: onnx.TensorProto) -> None:
        self.place = place
        self.shape = tuple(tensor.dims)
        self.dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)

    def __getitem__(self, rows: slice) -> Array:
        start, stop, _ = rows.indices(self.shape[0])
        row = math.prod(self.shape[1:])
        offset, count = self.place.offset + start * row * self.dtype.itemsize, (stop - start) * row
        values = np.fromfile(self.place.path, self.dtype, count, offset=offset)
        if values.size < count:
            raise OSError(f"the data file {self.place.location} became shorter while it was read")
        return values.reshape(stop - start, *self.shape[1:])


def overlapping(stored: Iterable[onnx.TensorProto], folder: Path) -> set[tuple[str, int]]:
    """(location, offset) of the external tensors that share bytes with another: to write to one changes the other."""
    places = [place for tensor in stored if (place := external(tensor, folder)) is not None and place.length]
    places.sort(key=lambda place: (place.location, place.offset))
    shared: set[tuple[str, int]] = set()
    furthest: External | None = None
    for place in places:
        if furthest and place.location == furthest.location and place.offset < furthest.end:
            shared |= {(p.location, p.offset) for p in (furthest, place)}
        if not furthest or place.location != furthest.location or place.end > furthest.end:
            furthest = place
    return shared


def onnx_dtype(values: Array) -> int:
    """The TensorProto data type of an array."""
    return int(onnx.helper.np_dtype_to_tensor_dtype(values.dtype))


def _nbytes(tensor: onnx.TensorProto) -> int:
    """Bytes that the values take outside the model; 4-bit values lie two to a byte, 2-bit values four."""
    kind = tensor.data_type
    if kind not in onnx.TensorProto.DataType.values() or kind in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        raise fault("LF-610", f"a tensor of data type {kind} cannot be external", where=tensor.name)
    whole = 8 * int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)
    bits = _PACKED.get(onnx.TensorProto.DataType.Name(kind), whole)
    values: int = math.prod(tensor.dims)
    return -(-values * bits // 8)


def _checked(location: str, folder: Path, name: str) -> Path:
    parts = Path(location).parts
    if not location or os.path.isabs(location) or ".." in parts or "\\" in location:
        raise fault("LF-610", f"external data at {location!r} is outside the model's folder", where=name)
    path = folder / location
    try:
        info = os.lstat(path)
    except OSError as error:
        raise fault(
            "LF-610",
            f"external data {location}: {error.strerror}",
            where=name,
            fix="the data file belongs beside the model",
        ) from None
    if not stat.S_ISREG(info.st_mode) or path.resolve().parent != (folder.resolve() / Path(location).parent):
        raise fault(
            "LF-610",
            f"external data {location} is a link or no file: onnx and ONNX Runtime refuse it too",
            where=name,
            fix="copy the file into the folder",
        )
    if info.st_nlink > 1:  # onnx 1.23.2 and onnx_ir 1.1 refuse it; ONNX Runtime 1.32 does not
        what = f"external data {location} has {info.st_nlink} names (hard links): onnx refuses it"
        raise fault("LF-610", what, where=name, fix="copy the file, and give the copy its name")
    return path
