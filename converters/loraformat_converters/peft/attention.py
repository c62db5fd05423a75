"""nn.MultiheadAttention: ``attn.lora_A`` adapts ``in_proj_weight``, ``attn.base_layer.out_proj.lora_A`` the output.

PEFT adapts both projections or none, with one rank and one alpha. They are placed: torch's own module multiplies by
both as [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement

if TYPE_CHECKING:
    from loraformat.parts import Lora
    from loraformat_converters.peft.draft import Draft
    from loraformat_converters.peft.names import Name

__all__ = ["OUT_PROJ_TWICE", "add", "modules"]

# NOTE: PEFT merges out_proj's ΔW itself and then calls ``out_proj.merge``, which adds it once more; its forward pass
# merges and unmerges in the same way (peft 0.21.2 tuners/lora/layer.py 2085-2089, 2223; the same since 0.15.0, the
# first version that has it). So training, inference and merging all see W + 2·s·BA: that is what these tensors mean.
# A later version may have been cured of it (huggingface/peft#3774), and is refused.
OUT_PROJ_TWICE = 2.0
_LAST_TWICE = (0, 21, 2)


def modules(names: Iterable[Name]) -> set[str]:
    """The paths of which an output projection stands inside PEFT's wrapper."""
    inside = (n.module for n in names if n.wrappers == ("base_layer",) and not n.depth)
    return {module.removesuffix(".out_proj") for module in inside if module.endswith(".out_proj")}


def add(module: str, lora: Lora, others: Iterable[str], outer: bool, draft: Draft) -> None:
    """One projection; ``others`` are the roles beside its factors, ``outer`` where the module is ``out_proj``."""
    if why := lora.fault() or ("" if lora.lora_A.ndim == 2 else f"lora_A is {list(lora.lora_A.shape)}"):
        draft.say("LF-309", why, module)
        return
    place = Placement(lora.matrix_shape(), (0,), (1,))
    if others := sorted(others):
        draft.say("LF-504", f"{', '.join(others)} in an nn.MultiheadAttention, where PEFT knows it not", module)
    elif not outer:
        draft.add(f"{module}.in_proj_weight", lora, place)
    elif _later(version := draft.setting("peft_version")):
        what = f"peft_version {version}: up to 0.21.2 PEFT adds the change of an attention's out_proj twice"
        draft.say("LF-504", what, module, "whether this version still does is not known here")
    else:
        draft.add(f"{module}.weight", lora, place)


def _later(version: Any) -> bool:
    """Whether a version (``0.21.3.dev0@…``) comes after ``_LAST_TWICE``; False of a file that has none."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return numbers is not None and tuple(map(int, numbers.groups())) > _LAST_TWICE
