"""The grammar of the tensors' names: ``<module>.<role>``.

kohya and LyCORIS put a prefix before the module's path and turn its dots into underscores (sd-scripts 48d368f
networks/lora.py create_modules; lycoris-lora 4.1.3 wrapper.py), so that the first dot ends the module. ComfyUI also
takes paths that kept their dots (``diffusion_model.blocks.0.attn.q.lora_down.weight``): the longest role at the end of
a name is its role, whatever stands before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["ROLES", "SPELLED", "Name", "is_own", "parse", "refused"]

SPELLED: Mapping[str, str] = {
    "down": "lora_down.weight",
    "up": "lora_up.weight",
    "mid": "lora_mid.weight",
    **{f"hada_{role}": f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{role}": f"lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{role: role for role in ("alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm")},
}
"""Role, as the readers here call it → how kohya and LyCORIS end a tensor's name."""

# ComfyUI weight_adapter/lora.py takes PEFT's words after any module's name.
_ALSO = {"lora_A.weight": "down", "lora_B.weight": "up"}
ROLES: Mapping[str, str] = {ending: role for role, ending in SPELLED.items()} | _ALSO
"""How a name ends → the role."""

# sd-scripts networks/*.py LORA_PREFIX_…, lycoris-lora wrapper.py, ComfyUI lora.py; then a path without dots.
_MANGLED = re.compile(r"(lora_(unet|te\d?|transformer|prior_unet|prior_te)|lycoris)_[^.]+\.(?P<ending>.+)")
# Endings that no other layout has; PEFT's LoHa and LoKr begin otherwise, and lie beside a configuration.
_OWN = tuple(f".{e}" for e in SPELLED.values() if e.startswith(("lora_", "hada_", "lokr_")))
_PEFT = "base_model."

# What else these files hold and no sum of factors is, by the end of the name → what it is.
_REFUSED = (
    (r"oft_(blocks|diag)|rescale", "OFT or BOFT, which multiplies the base weight"),
    (r"(a1|a2|b1|b2|bm)\.weight", "GLoRA, whose ΔW is made from the base weight"),
    (r"on_input", "IA3, which multiplies the base weight"),
    (r"(base_)?([qp]_layer\.weight|lambda_layer)", "T-LoRA, whose rank is chosen by the time step"),
    (r"scalar", "a scalar of LyCORIS, which folds it into a factor when it saves; its readers take it for 1"),
    (r"lora_(up|down)\.\d+\.weight", "one of several pairs of a live module, which are fused when it is saved"),
    (r"reshape_weight", "a size to which ComfyUI pads the base weight with zeros"),
    (r"set_weight", "a weight that ComfyUI sets in the place of the base's"),
    (r"(string_to_param|clip_[lg])(\.\*)?", "a textual inversion bundled with the adapter"),
)


class Name(NamedTuple):
    """A tensor's name, taken apart."""

    module: str
    role: str


def parse(name: str) -> Name | None:
    """The module and the role, or None where the name has none.

    >>> parse("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight")
    Name(module='lora_te1_text_model_encoder_layers_0_mlp_fc1', role='down')
    """
    parts = name.split(".")
    for length in (2, 1):  # a role has one dot or none
        module, ending = ".".join(parts[:-length]), ".".join(parts[-length:])
        if module and ending in ROLES:
            return Name(module, ROLES[ending])
    return None


def is_own(name: str) -> bool:
    """Whether no other layout spells a tensor's name so: by its ending, or by kohya's prefix before a mangled path."""
    if name.startswith(_PEFT):
        return False
    mangled = _MANGLED.fullmatch(name)
    if mangled and (mangled["ending"] in ROLES or refused(name) is not None):
        return True
    return name.endswith(_OWN)


def refused(name: str) -> str | None:
    """What a tensor is that has no form here, or None.

    >>> refused("lora_unet_mid_block.oft_blocks")
    'OFT or BOFT, which multiplies the base weight'
    """
    return next((what for ending, what in _REFUSED if re.search(rf"\.{ending}$", name)), None)
