"""torchtune → Adapter, in torchtune's own names and order of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.axes import Placement
from loraformat.layout import Reading, ReadOptions
from loraformat.loose import Loose, by_module
from loraformat.parts import Lora, Magnitude
from loraformat_converters.torchtune import NAMES

if TYPE_CHECKING:
    from loraformat.source import Source

__all__ = ["CONFIG", "read"]

CONFIG = "adapter_config.json"
_ENDINGS = {".lora_a.weight": "lora_a", ".lora_b.weight": "lora_b", ".magnitude": "magnitude"}


def read(source: Source, options: ReadOptions) -> Reading:
    """The adapter.

    Raises:
        LoraFormatError: LF-303 … LF-314 the tensors; LF-503 the configuration; LF-506 another tensor; LF-507, LF-509 the
            scale.
    """
    draft = Loose(options, "torchtune")
    text = source.sidecar(CONFIG)
    draft.configure(text, CONFIG)
    modules, rest = by_module(source.tensors, _ENDINGS)
    for module, roles in modules.items():
        axes = {"lora_a": 2, "lora_b": 2} | ({"magnitude": 1} if "magnitude" in roles else {})
        if not draft.sound(module, roles, axes):
            continue
        a, b = roles["lora_a"], roles["lora_b"]
        if (scale := draft.scale(module, a.shape[0])) is None:
            continue
        # torchtune 0.6.1 modules/peft/lora.py, dora.py: the module is a Linear, its weight [out, in]
        place = Placement((b.shape[0], a.shape[1]), (0,), (1,))
        draft.add(f"{module}.weight", Lora(a, b, *scale), place)
        if "magnitude" in roles:
            draft.add(f"{module}.weight", Magnitude(roles["magnitude"]))
    for name in rest:
        draft.say("LF-506", "no tensor of a torchtune adapter", name)
    extensions = {"torchtune": text} if text is not None else {}
    return Reading(draft.finish(str(source.path), names=NAMES, extensions=extensions), draft.warnings)
