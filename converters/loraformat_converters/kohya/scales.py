"""What an ``alpha`` tensor means: scale = alpha / r, r the rows of ``lora_down``.

Without one every reader takes alpha for r (sd-scripts 48d368f networks/lora.py create_network_from_weights; ComfyUI
weight_adapter/lora.py; diffusers 0.42.1), but LyCORIS, which stops. Of an alpha of zero sd-scripts and LyCORIS make r, and
ComfyUI the factor zero: it is refused until the user says which. Saved in 16 bits, alpha is rounded like any tensor, and
then the rounded number is what counts. rsLoRA is no rule here: LyCORIS stores alpha · √r, which alpha / r undoes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from loraformat.dtypes import dtype_name
from loraformat.scale import ScaleRule

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat_converters.kohya.draft import Draft

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["LARGEST", "Scale", "read", "value_of"]

LARGEST = float(np.finfo(np.float32).max)
_NUMBERS = ("F", "BF", "I", "U")
_MOST_AXES = 8


class Scale(NamedTuple):
    """alpha and its rule; ``assumed`` names alpha where the file has none."""

    alpha: float
    rule: ScaleRule
    assumed: tuple[str, ...] = ()


def value_of(module: str, roles: Roles, draft: Draft) -> float | None:
    """The number in the alpha tensor, None without one; notes LF-306, LF-309 or LF-314 where it is no number."""
    tensor = roles.get("alpha")
    if tensor is None:
        return None
    if not dtype_name(tensor.dtype).startswith(_NUMBERS):
        draft.say("LF-314", f"alpha is {dtype_name(tensor.dtype)}; it is a number", module)
    elif tensor.size != 1 or tensor.ndim > _MOST_AXES:
        draft.say("LF-309", f"alpha is {list(tensor.shape)}; it is one number", module)
    elif not abs(value := float(tensor.reshape(-1)[0])) <= LARGEST:  # of NaN neither
        draft.say("LF-306", f"alpha is {value}", module)
    else:
        return value
    return None


def read(module: str, roles: Roles, r: int, draft: Draft) -> Scale | None:
    """The scale of factors of rank r, by the file and, where that is silent, by the user; None where it is at fault."""
    options, found = draft.options, value_of(module, roles, draft)
    if "alpha" in roles and found is None:
        return None
    if options.rank is not None and options.rank != r:
        draft.say("LF-507", f"the rank is stated as {options.rank}, and is {r} by the tensors", module)
        return None
    if found is None:
        if options.alpha is not None:
            return Scale(options.alpha, options.scale_rule or "alpha/r")
        draft.without_alpha.append(module)
        return Scale(float(r), "alpha/r", ("alpha",))
    if found == 0.0 and options.alpha is None:
        what = "alpha is 0, which sd-scripts and LyCORIS read as the rank, and ComfyUI as it stands"
        draft.say("LF-507", what, module, f"say which is meant: --alpha {r}, or --alpha 0")
        return None
    said = (("alpha", options.alpha, found or options.alpha), ("scale rule", options.scale_rule, "alpha/r"))
    for what, stated, held in said:
        if stated is not None and stated != held:
            draft.say("LF-507", f"the {what} is stated as {stated}, and is {held} by the file", module)
            return None
    return Scale(found or options.alpha or 0.0, "alpha/r")
