"""What some reader of these files will not read as it is meant, though another does: said when one is written.

sd-scripts 48d368f knows ``lora_down`` and ``lora_up`` alone (networks/lora.py); diffusers 0.42.1 drops every
``dora_scale`` (loaders/lora_pipeline.py); of a DoRA over the outputs ComfyUI takes the norm of W and not of W + ΔW
(weight_adapter/base.py). What LyCORIS 4.1.3 does not load it writes itself (measured).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from loraformat.errors import Problem
from loraformat_converters.kohya import form, magnitudes

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.updates import Update

__all__ = ["warnings"]

_SAID: tuple[tuple[Callable[[Update], bool], str], ...] = (
    (
        lambda u: "magnitude" in u,
        "ComfyUI normalises DoRA otherwise than LyCORIS; sd-scripts and diffusers drop dora_scale",
    ),
    (
        lambda u: "magnitude" in u and u["magnitude"].eps != magnitudes.EPS,
        f"LyCORIS adds {magnitudes.EPS:.3g} to a norm that here is taken as it is",
    ),
    (
        lambda u: "magnitude" in u and u["magnitude"].magnitude_axes == (1,),
        "LyCORIS 4.1.3 does not load a DoRA over the inputs out of a file",
    ),
    (
        lambda u: "lora" in u and u["lora"].mid is not None,
        "sd-scripts knows no lora_mid: LyCORIS and ComfyUI read the core",
    ),
    (
        lambda u: "lora" in u and u["lora"].mid is not None and u["lora"].mid.ndim == 3,
        "ComfyUI 0.3.52 stops at a core of a one-dimensional kernel",
    ),
    (lambda u: "lokr" in u and u["lokr"].t2 is not None, "LyCORIS 4.1.3 does not load a LoKr around a core"),
    (
        lambda u: not u.additive or u.additive[0].kind != "lora",
        "sd-scripts reads pairs alone: LyCORIS and ComfyUI read the rest",
    ),
)


def warnings(adapter: Adapter) -> list[Problem]:
    """One a kind, at the first target of it."""
    found = ((next((key for key, u in adapter.items() if holds(u)), None), what) for holds, what in _SAID)
    said = [Problem("LF-508", what, key, severity="warning") for key, what in found if key is not None]
    if lost := _lost_by_diffusers(adapter):
        what = "diffusers 0.42.1 loses the alpha of an attention's projection that is not the commonest alpha"
        said.append(Problem("LF-508", what, lost[0], severity="warning"))
    return said


def _lost_by_diffusers(adapter: Adapter) -> list[str]:
    """Projections of a U-Net's attention whose alpha diffusers looks up under a name that no module has.

    0.42.1 loaders/lora_conversion_utils.py names them ``attn1.processor.to_q_lora``; utils/peft_utils.py get_peft_kwargs
    puts every alpha but the commonest into ``alpha_pattern`` by that name (measured).
    """
    alphas = {key: form.alpha(update.additive[0]) for key, update in adapter.items() if "lora" in update}
    usual = Counter(alphas.values()).most_common(1)[0][0] if alphas else None
    attention = (key for key in alphas if key.startswith("lora_unet_") and ("_attn1_" in key or "_attn2_" in key))
    return [key for key in attention if alphas[key] != usual]
