"""What a graph of 16-bit floats leaves of the factors, and how a power of two, moved from A to B, saves what it can.

float16 has no normal values below 6e-5: a B of σ 1e-6 would lose 1.7 % of itself. B·2^k and A·2^-k have the same
product, exactly.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.parts import Lora

    Array = npt.NDArray[Any]

__all__ = ["balance"]

_NORMAL = 2.0**-11
"""What rounding a normal float16 changes at most, relative to it."""


def balance(lora: Lora, factor: float, dtype: int) -> tuple[int, float]:
    """(k, the larger relative loss of the two factors): B is multiplied by 2^k, A by 2^-k; 0 where nothing is gained."""
    if dtype not in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
        return 0, 0.0
    kind = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    a = lora.lora_A.astype(np.float32)
    b = lora.lora_B.astype(np.float32) * np.float32(lora.scale * factor)
    plain = max(_loss(a, kind), _loss(b, kind))
    if dtype == onnx.TensorProto.BFLOAT16 or plain <= _NORMAL or not (a.any() and b.any()):
        return 0, plain
    k = round((math.log2(float(np.abs(a).max())) - math.log2(float(np.abs(b).max()))) / 2)
    moved = max(_loss(a * np.float32(2.0**-k), kind), _loss(b * np.float32(2.0**k), kind))
    return (k, moved) if moved < plain else (0, plain)


def _loss(values: Array, kind: np.dtype[Any]) -> float:
    with np.errstate(over="ignore"):
        stored = values.astype(kind).astype(np.float32)
    size = float(np.linalg.norm(values))
    return float(np.linalg.norm(stored - values)) / size if size else 0.0
