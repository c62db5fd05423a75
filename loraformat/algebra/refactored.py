"""A pair under another scale: what one factor of it becomes where a layout has a single scale for all pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.errors import fault

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.parts import Lora

    Array = npt.NDArray[Any]

__all__ = ["under_scale"]


def under_scale(part: Lora, scale: float) -> tuple[Array, float]:
    """(lora_B, residual) with which ``scale`` · B @ A is the change of ``part``.

    The ratio of the two scales is multiplied into B: in its own dtype where that is exact (a power of two mostly is),
    else in float32, whose rounding is the residual ‖B' − B·ratio‖ / ‖B·ratio‖.

    Args:
        scale: not zero, unless that of the part is.

    Raises:
        LoraFormatError: LF-612 a value goes beyond single precision.
    """
    if part.scale == scale:
        return part.lora_B, 0.0
    exact = np.asarray(part.lora_B, np.float64) * (part.scale / scale)
    with np.errstate(over="ignore"):
        own, single = exact.astype(part.lora_B.dtype), exact.astype(np.float32)
    if np.array_equal(np.asarray(own, np.float64), exact):
        return own, 0.0
    if not np.isfinite(single).all():
        raise fault("LF-612", f"B × {part.scale / scale:g} goes beyond single precision")
    length = float(np.linalg.norm(exact))
    return single, float(np.linalg.norm(single - exact)) / length if length else 0.0
