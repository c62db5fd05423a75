"""The dtypes of safetensors: their names, their widths, their order, and what numpy calls them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DTYPES", "dtype_name", "dtype_names", "numpy_dtype", "tensor_order"]

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


def dtype_names(tensors: Iterable[np.ndarray[Any, Any]]) -> str:
    """The dtypes of several tensors, as a person reads them: ``BF16/F32``."""
    return "/".join(sorted({dtype_name(tensor.dtype) for tensor in tensors}))


def tensor_order(dtypes: Mapping[str, str]) -> list[str]:
    """The names in the reference serializer's order: widest dtype first, then by name."""
    return sorted(dtypes, key=lambda name: (-_RANKS[dtypes[name]], name.encode()))
