"""Between numpy and torch, bit for bit: bfloat16 and the 8-bit floats go by their bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["dtype_word", "to_numpy", "to_torch"]

# torch dtype → the numpy dtype that numpy itself lacks, and integers of its width
_BY_BITS: dict[torch.dtype, tuple[Any, Any, torch.dtype]] = {
    torch.bfloat16: (ml_dtypes.bfloat16, np.int16, torch.int16),
    torch.float8_e4m3fn: (ml_dtypes.float8_e4m3fn, np.int8, torch.int8),
    torch.float8_e5m2: (ml_dtypes.float8_e5m2, np.int8, torch.int8),
}
_BACK = {np.dtype(own): (bits, dtype) for dtype, (own, bits, _) in _BY_BITS.items()}
_WORDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL", torch.int8: "I8",
    torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8", torch.uint16: "U16",
    torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
}  # fmt: skip


def dtype_word(dtype: torch.dtype) -> str:
    """As safetensors spells it; torch's own word for what no file holds."""
    return _WORDS.get(dtype, str(dtype).removeprefix("torch."))


def to_numpy(tensor: torch.Tensor) -> Array:
    """The values, of a tensor in this machine's memory a view of them."""
    tensor = tensor.detach().cpu()
    if tensor.dtype not in _BY_BITS:
        return np.asarray(tensor.numpy())
    own, _, integer = _BY_BITS[tensor.dtype]
    return np.asarray(tensor.contiguous().view(integer).numpy()).view(own)


def to_torch(array: Array) -> torch.Tensor:
    """A tensor of its own with the same bits."""
    copied: Array = np.array(array, order="C")
    copied = copied.astype(copied.dtype.newbyteorder("="))
    if copied.dtype not in _BACK:
        return torch.from_numpy(copied)
    bits, dtype = _BACK[copied.dtype]
    return torch.from_numpy(copied.view(bits)).view(dtype)
