"""float32 ↔ the dtype of storage, rounded once to the nearest, ties to even; a float16 is widened by its bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]

__all__ = ["quotient", "rounded", "widened"]

_SIGN_AND_REST = np.uint32(0x8FFFE000)
_REBIASED = np.float32(2.0**112)  # 127 − 15: what the exponents of float32 and float16 differ by
_BEYOND = 65536.0


def widened(stored: Array) -> F32:
    """The values in float32, in an array of their own."""
    if stored.dtype != np.float16 or not stored.size:
        return stored.astype(np.float32)
    # numpy 2.4 converts value by value; whole tiles of sign, exponent and mantissa at their new places are faster.
    bits = stored.view(np.int16).astype(np.int32).view(np.uint32)
    bits <<= np.uint32(13)
    bits &= _SIGN_AND_REST
    values = bits.view(np.float32)
    values *= _REBIASED
    if values.max() >= _BEYOND or values.min() <= -_BEYOND:  # infinity and NaN have an exponent of their own
        return stored.astype(np.float32)
    return values


def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """The values in ``dtype``, each rounded once; what lies beyond its range becomes infinite, NaN stays NaN."""
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def quotient(values: F32, scale: F32) -> F32:
    """The values in steps of ``scale``, which broadcasts; 0 where a block of zeros has no scale."""
    return np.divide(values, scale, out=np.zeros_like(values), where=scale != 0)
