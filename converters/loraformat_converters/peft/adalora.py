"""AdaLoRA: ``lora_A`` [r, in], ``lora_B`` [out, r] and ``lora_E`` [r, 1]; ΔW = B · (A ⊙ E) · lora_alpha / (init_r + 1e-5).

Exactly a LoRA, with E folded into A. peft 0.21.2 tuners/adalora/layer.py: ``ranknum`` stays the initial rank when the
budget cuts ranks off (``rank_pattern`` then says which were kept, and the file holds only those); rsLoRA and
``alpha_pattern`` are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.parts import Lora
from loraformat.products import single

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat_converters.peft.draft import Draft
    from loraformat_converters.peft.names import Name

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["ROLES", "read"]

ROLES = frozenset({"lora_A", "lora_B", "lora_E"})


def read(found: Mapping[Name, Roles], draft: Draft) -> None:
    """Every adapted module of ``found``, as parts of ``draft``."""
    alpha, start = draft.setting("lora_alpha"), draft.setting("init_r")
    if alpha is None or start is None:
        draft.say("LF-509", "AdaLoRA's scale is lora_alpha / (init_r + 1e-5), and one of them is not stated", "")
        return
    factor = (alpha if alpha > 0 else float(start)) / (start + 1e-5)
    for name, roles in sorted(found.items(), key=lambda item: item[0].module):
        if missing := ROLES - roles.keys():
            draft.say("LF-303", f"{', '.join(sorted(missing))} is missing", name.module, "the file is incomplete")
        elif name.wrappers:
            draft.say("LF-506", "factors inside another adapted layer", name.module)
        elif kept := _kept(name.module, len(np.atleast_1d(roles["lora_E"])), draft):
            _add(name.module, roles, factor, kept, draft)


def _kept(module: str, rows: int, draft: Draft) -> int:
    """How many ranks the budget left; 0 where it left none: such a module does not change."""
    masks = draft.setting("rank_pattern")
    mask = masks.get(f"{module}.lora_E") if isinstance(masks, dict) else None
    if isinstance(mask, list) and sum(map(bool, mask)) != rows:
        what = f"rank_pattern keeps {sum(map(bool, mask))} ranks, the tensors have {rows}"
        draft.say("LF-507", what, module)
        return 0
    return rows


def _add(module: str, roles: Roles, factor: float, rank: int, draft: Draft) -> None:
    if not draft.sound(module, roles, (2,)):
        return
    a, b, e = roles["lora_A"], roles["lora_B"], roles["lora_E"]
    if a.shape[0] != rank or b.shape[1] != rank or e.shape != (rank, 1):
        what = f"lora_A {list(a.shape)}, lora_B {list(b.shape)} and lora_E {list(e.shape)}: their rank must agree"
        draft.say("LF-309", what, module)
        return
    draft.add(f"{module}.weight", Lora(single(a) * single(e), b, factor, "factor"), assumed=("name",))
