"""Writing safetensors: the reference serializer's byte order, streamed.

The same tensors and metadata always give the same bytes. What lies in another file as it is to be written is copied by
the kernel; what lies transposed is turned block by block.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from loraformat.container import TensorInfo
from loraformat.dtypes import dtype_name, tensor_order
from loraformat.mapped import place, read_ahead
from loraformat.ranges import append, append_copy

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["header_bytes", "raw", "slabs", "write"]

_BLOCK = 128  # values a side
_SLAB = 1 << 20  # bytes


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
