"""A file of ``torch.save``, written without torch: a zip archive of one pickle and every tensor's values.

The pickle is put together of the few instructions that ``torch.load`` carries out without trust (``weights_only=True``):
a dict of tensors, each a call of ``_rebuild_tensor_v2`` on a storage that lies in the archive. The same tensors always
give the same bytes.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from loraformat.dtypes import dtype_name
from loraformat.serializer import raw

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["write"]

_ROOT = "archive"
_ALIGNMENT = 64  # torch 2.13 caffe2/serialize/inline_container.h kFieldAlignment: a mapped storage begins on it
_LOCAL, _ZIP64 = 30, 20  # bytes of a local header, and of the field that zipfile puts into that of a large entry
# torch 2.13 storage.py _dtype_to_storage_type_map. What has no storage of its own lies in an untyped one.
_STORAGES = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage",
    "BOOL": "BoolStorage", "C64": "ComplexFloatStorage",
}  # fmt: skip
_UNTYPED = {
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip


def write(file: BinaryIO, tensors: Mapping[str, Array], under: str | None = None) -> None:
    """The tensors as a dict; with ``under`` as the only member of another one, ``{under: tensors}``."""
    with zipfile.ZipFile(file, "w") as archive:
        _put(archive, "data.pkl", _program(tensors, under))
        _put(archive, "byteorder", b"little")
        for i, tensor in enumerate(tensors.values()):
            _put(archive, f"data/{i}", raw(tensor))
        _put(archive, "version", b"3\n")


def _put(archive: zipfile.ZipFile, name: str, data: Any) -> None:
    """A stored entry; a field that no reader looks at moves its data to a boundary."""
    info = zipfile.ZipInfo(f"{_ROOT}/{name}")
    info.file_size = len(data)
    large = info.file_size * 1.05 > zipfile.ZIP64_LIMIT  # as zipfile decides
    assert archive.fp is not None
    start = archive.fp.tell() + _LOCAL + len(info.filename) + 4 + _ZIP64 * large
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w") as entry:
        entry.write(data)


def _program(tensors: Mapping[str, Array], under: str | None) -> bytes:
    """The pickle, of protocol 2: what is put on the stack, and what is made of it."""
    items = b"".join(_text(name) + _tensor(str(i), tensor) for i, (name, tensor) in enumerate(tensors.items()))
    value = _ORDERED + pickle.MARK + items + pickle.SETITEMS
    if under is not None:
        value = pickle.EMPTY_DICT + _text(under) + value + pickle.SETITEM
    return pickle.PROTO + b"\x02" + value + pickle.STOP


def _tensor(key: str, tensor: Array) -> bytes:
    """``_rebuild_tensor_v2(storage, offset, sizes, strides, requires_grad, hooks)``; ``_v3`` is told the dtype too."""
    dtype = dtype_name(tensor.dtype)
    kind = ("torch", _STORAGES[dtype]) if dtype in _STORAGES else ("torch.storage", "UntypedStorage")
    count = tensor.size if dtype in _STORAGES else tensor.nbytes
    storage = _tuple([_text("storage"), _global(*kind), _text(key), _text("cpu"), _integer(count)]) + pickle.BINPERSID
    sizes = [_tuple(map(_integer, numbers)) for numbers in (tensor.shape, _strides(tensor.shape))]
    arguments = [storage, _integer(0), *sizes, pickle.NEWFALSE, _ORDERED]
    if dtype in _STORAGES:
        return _call("torch._utils", "_rebuild_tensor_v2", arguments)
    return _call("torch._utils", "_rebuild_tensor_v3", [*arguments, _global("torch", _UNTYPED[dtype])])


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Of a row-major tensor, in values."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * max(1, shape[axis])
    return strides


def _call(module: str, name: str, arguments: Iterable[bytes]) -> bytes:
    return _global(module, name) + _tuple(arguments) + pickle.REDUCE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(items: Iterable[bytes]) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _integer(number: int) -> bytes:
    """Of at most 2^31, or as a long."""
    if number < 2**31:
        return pickle.BININT + struct.pack("<i", number)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", number)


_ORDERED = _call("collections", "OrderedDict", ())
