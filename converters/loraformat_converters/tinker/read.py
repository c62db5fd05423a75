"""Tinker → Adapter, in Tinker's own names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement
from loraformat.errors import fault
from loraformat.layout import Reading, ReadOptions
from loraformat.loose import Loose, by_module
from loraformat.parts import Lora
from loraformat_converters.tinker import NAMES

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.source import Source

    Array = npt.NDArray[Any]

__all__ = ["CONFIG", "PREFIX", "read"]

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
_ENDINGS = {".lora_A.weight": "lora_A", ".lora_B.weight": "lora_B"}
# Settings of PEFT that Tinker's own export and merge never look at: on, they would change what the tensors mean.
_UNKNOWN = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")


def read(source: Source, options: ReadOptions) -> Reading:
    """The adapter.

    Raises:
        LoraFormatError: LF-303 … LF-314 the tensors; LF-503, LF-504 the configuration; LF-506 another tensor; LF-507,
            LF-509 the scale.
    """
    draft = Loose(options, "Tinker")
    text = source.sidecar(CONFIG)
    config = draft.configure(text, CONFIG)
    if on := [name for name in _UNKNOWN if config.get(name)]:
        raise fault("LF-504", f"{', '.join(on)}: Tinker's own tools do not know this setting", where=CONFIG)
    modules, rest = by_module(source.tensors, _ENDINGS)
    for module, roles in modules.items():
        _add(module.removeprefix(PREFIX), roles, draft)
    for name in rest:
        draft.say("LF-506", "no factor of Tinker's", name)
    extensions = {"tinker": text} if text is not None else {}
    return Reading(draft.finish(str(source.path), names=NAMES, extensions=extensions), draft.warnings)


def _add(module: str, roles: dict[str, Array], draft: Loose) -> None:
    experts = ".experts." in module
    if experts and len(roles) == 2 and not any(tensor.size for tensor in roles.values()):
        # tinker-cookbook 0.6.1 weights/_adapter.py: it stands for a projection that the model does not have
        draft.warn("LF-311", "an empty pair, which stands for a projection that the model lacks", module)
        return
    axes = 3 if experts else 2
    if not draft.sound(module, roles, {"lora_A": axes, "lora_B": axes}):
        return
    a, b = roles["lora_A"], roles["lora_B"]
    if (scale := draft.scale(module, a.shape[-2])) is None:
        return
    if not experts:
        draft.add(f"{module}.weight", Lora(a, b, *scale), Placement((b.shape[0], a.shape[1]), (0,), (1,)))
        return
    count = max(a.shape[0], b.shape[0])
    if count == 1:
        draft.say("LF-504", "both factors are shared by all experts, and no tensor says how many there are", module)
        return
    draft.add(f"{module}.weight", Lora(a, b, *scale), Placement((count, b.shape[1], a.shape[2]), (1,), (2,), (0,)))
