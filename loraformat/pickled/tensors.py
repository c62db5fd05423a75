"""What a pickle of torch says of its tensors: dtype, sizes, strides, and where in which storage. No values yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from loraformat.dtypes import DTYPES
from loraformat.errors import fault
from loraformat.pickled.machine import Function, run

__all__ = ["DTYPE_NAMES", "Storage", "View", "read_view", "read_views"]

# torch 2.13 storage.py _dtype_to_storage_type_map; an untyped one is bytes, and the tensor says what they are.
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip
DTYPE_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "complex64": "C64", "uint16": "U16", "uint32": "U32",
    "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_MOST_AXES = 32
_NESTED = ("state_dict", "model_state_dict", "model", "module")


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of values of one dtype, known by its key; on which device it lay does not matter."""

    key: str
    dtype: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor: values of a storage from ``offset`` on; offset and strides in bytes."""

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def contiguous(self) -> bool:
        """Whether the values lie row-major, without gaps."""
        wanted = DTYPES[self.dtype]
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != wanted:
                return 0 in self.shape
            wanted *= size
        return True


@dataclass(frozen=True, slots=True)
class _Dtype:
    name: str


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: str


def read_views(program: BinaryIO) -> dict[str, View]:
    """Tensor name → view, from the pickle at the position of ``program``.

    Raises:
        LoraFormatError: LF-510, naming the global, the tensor or the member that is not understood.
    """
    return _state_dict(run(program, _known, _persistent))


def read_view(program: BinaryIO) -> View:
    """The view of a pickle that holds one tensor and nothing else; LF-510 as ``read_views``."""
    value = run(program, _known, _persistent)
    if not isinstance(value, View):
        raise fault("LF-510", f"the pickle holds a {type(value).__name__}, not a tensor")
    return value


def _known(name: str) -> Any:
    module, _, last = name.rpartition(".")
    if module in ("torch", "torch.cuda", "torch.storage") and last in _STORAGES:
        return _StorageType(_STORAGES[last])
    if module == "torch" and last in DTYPE_NAMES:
        return _Dtype(DTYPE_NAMES[last])
    if name not in _FUNCTIONS:
        fix = "load it where you trust it, and save the tensors alone: safetensors.torch.save_file"
        raise fault("LF-510", f"the pickle asks for {name}, which could run code or has no tensor form here", fix=fix)
    return Function(name, _FUNCTIONS[name])


def _persistent(pid: Any) -> Storage:
    """('storage', type, key, device, numel), and in a stream a view of another storage as the sixth."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
        raise ValueError("a persistent id that is no storage")
    kind, key, numel = pid[1], pid[2], pid[4]
    if not isinstance(kind, _StorageType) or not isinstance(key, str) or not _natural(numel):
        raise ValueError("a storage of unknown form")
    if len(pid) == 6 and pid[5] is not None:
        raise fault("LF-510", "a storage that is a view of another storage, as torch 0.3 wrote it", where=key)
    return Storage(key, kind.dtype, numel * DTYPES[kind.dtype])


def _tensor(storage: Any, offset: Any, sizes: Any, strides: Any, *rest: Any) -> View:
    return _view(storage, storage.dtype if isinstance(storage, Storage) else "", offset, sizes, strides)


def _tensor_of_dtype(
    storage: Any, offset: Any, sizes: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> View:
    return _view(storage, dtype.name if isinstance(dtype, _Dtype) else "", offset, sizes, strides)


def _view(storage: Any, dtype: str, offset: Any, sizes: Any, strides: Any) -> View:
    if not isinstance(storage, Storage) or dtype not in DTYPES:
        raise ValueError("a tensor without storage or dtype")
    lists = isinstance(sizes, tuple) and isinstance(strides, tuple) and len(sizes) == len(strides) <= _MOST_AXES
    if not lists or not all(_natural(n) for n in (offset, *sizes, *strides)):
        raise ValueError("a tensor whose sizes, strides or offset are no numbers")
    width, count, last = DTYPES[dtype], 1, offset
    for size, stride in zip(sizes, strides, strict=True):
        count *= size
        last += (size - 1) * stride
    if count and (last + 1) * width > storage.nbytes:
        raise fault("LF-510", f"a tensor {list(sizes)} reaches beyond its storage of {storage.nbytes:,} bytes")
    if count * width > storage.nbytes:  # a few bytes, seen again and again: as an array it could fill the memory
        raise fault("LF-510", f"a tensor {list(sizes)} is larger than its storage of {storage.nbytes:,} bytes")
    return View(storage, dtype, sizes, tuple(s * width for s in strides), offset * width)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _ordered(items: Any = ()) -> dict[Any, Any]:
    """``OrderedDict()``, filled later, or ``OrderedDict([[key, value], …])`` as Python 2 wrote it."""
    found = {}
    for key, value in items:
        if not isinstance(key, (str, int)):
            raise ValueError("a key that is no text")
        found[key] = value
    return found


_FUNCTIONS: Mapping[str, Any] = {
    "collections.OrderedDict": _ordered,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch.nn.parameter.Parameter": lambda data, *rest: data,
}


def _state_dict(value: Any) -> dict[str, View]:
    """The tensors of a state dict, or of the one that lies under its usual name in a training checkpoint."""
    if not isinstance(value, dict):
        raise fault("LF-510", f"the pickle holds a {type(value).__name__}, not a dict of tensors")
    if not any(isinstance(item, View) for item in value.values()):
        nested = [name for name in _NESTED if isinstance(value.get(name), dict)]
        if len(nested) == 1:
            value = value[nested[0]]
    others = [name for name, item in value.items() if not isinstance(name, str) or not isinstance(item, View)]
    if others or not value:
        some = ", ".join(map(repr, others[:3])) or "nothing"
        fix = "save the state dict of the model alone"
        raise fault("LF-510", f"the file is no dict of tensors: it holds {some} beside them", fix=fix)
    return dict(value)
