"""A pair under another scale: what one factor of it becomes where a layout has a single scale for all pairs; and its rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.errors import fault

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.parts import Lora

    Array = npt.NDArray[Any]

__all__ = ["moved", "under_scale"]


def moved(old: Array, new: Array, where: str) -> float:
    """‖new − old‖ / ‖old‖; LF-612 where a value went beyond the dtype."""
    exact = np.asarray(old, np.float64)
    if not np.isfinite(np.asarray(new, np.float64)).all():
        raise fault("LF-612", f"a value up to {np.abs(exact).max():.3g} is beyond {new.dtype}", where=where)
    length = float(np.linalg.norm(exact))
    return float(np.linalg.norm(np.asarray(new, np.float64) - exact)) / length if length else 0.0


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
    return single, moved(exact, single, f"lora_B × {part.scale / scale:g}")
