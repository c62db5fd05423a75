"""``dora_scale``: the lengths that W + ΔW is scaled to, one an output or one an input.

Its shape has the axes of the weight, all of size 1 but the one that it keeps: [out, 1, …], or [1, in, 1, …] (what
LyCORIS wrote before ``wd_on_output``, and OneTrainer). So it also says what the weight's axes are. LyCORIS adds the
smallest float32 step to the norm (lycoris-lora 4.1.3 functional/general.py weight_decompose).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement
from loraformat.parts import Additive, Lora, Magnitude
from loraformat_converters.kohya.draft import torch_placement

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat_converters.kohya.draft import Draft

    Array = npt.NDArray[Any]

__all__ = ["EPS", "read"]

EPS = 2.0**-23


def read(
    module: str, tensor: Array, part: Additive, place: Placement | None, draft: Draft
) -> tuple[Magnitude, Placement | None] | None:
    """The part, and the placement as far as both together show it.

    Args:
        part: the factors beside it.
        place: as they show it.
    """
    shape, (out, in_) = tensor.shape, part.matrix_shape()
    axes = len(place.shape) if place is not None else 2 if isinstance(part, Lora) else len(shape)
    kept = _kept(shape, out)
    if kept is None or len(shape) != axes:
        said = f" of a weight of {axes} axes" if len(shape) != axes else ""
        draft.say("LF-309", f"dora_scale is {list(shape)}{said}: [out, 1, …] or [1, in, 1, …]", module)
        return None
    place = place or _shown(shape, kept, out, in_)
    if kept == 1 and place is None:
        draft.say("LF-504", "dora_scale has a value an input, and no tensor has the sizes of the kernel", module)
        return None
    wanted = out if place is None else place.shape[kept]
    if shape[kept] != wanted:
        draft.say("LF-309", f"dora_scale is {list(shape)}, the weight has {wanted} of these", module)
        return None
    return Magnitude(tensor.reshape(-1), None if kept == 0 else (1,), EPS), place


def _kept(shape: tuple[int, ...], out: int) -> int | None:
    """The only axis that is not of size 1; of none, the out axis if that has the size 1."""
    if len(shape) < 2 or math.prod(shape) not in shape[:2]:
        return None
    return 0 if math.prod(shape) == shape[0] == out or math.prod(shape) != shape[1] else 1


def _shown(shape: tuple[int, ...], kept: int, out: int, in_: int) -> Placement | None:
    """The placement that a dora_scale of ``shape`` shows beside factors of a matrix [out, in]."""
    if len(shape) == 2:
        return torch_placement((out, in_))
    if kept == 1 and in_ % shape[1] == 0:
        kernel = in_ // shape[1]
        if len(shape) == 3 or kernel == 1:
            return torch_placement((out, shape[1], *([1] * (len(shape) - 3)), kernel))
    return None
