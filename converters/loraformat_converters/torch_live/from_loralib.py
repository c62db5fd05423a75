"""loralib's live layers → Adapter: each through the reader of loralib's files, with what the layer itself knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from loraformat import registry
from loraformat.adapter import Adapter
from loraformat.layout import ReadOptions
from loraformat.memory import MemorySource
from loraformat.parts import Replace
from loraformat.resolve import Hints
from loraformat.updates import Update
from loraformat_converters.torch_live.base import ModuleBase
from loraformat_converters.torch_live.tensors import to_numpy

if TYPE_CHECKING:
    from typing import Literal

__all__ = ["layers", "read"]


def layers(module: nn.Module) -> Mapping[str, Any]:
    """Path → layer, of every layer of loralib that has factors; told without importing loralib."""
    return {path: m for path, m in module.named_modules() if _is_loralib(m) and hasattr(m, "lora_A")}


def read(module: nn.Module, bias: Literal["none", "lora_only", "all"]) -> Adapter:
    """The adapter of all layers; with the biases that ``loralib.lora_state_dict(module, bias)`` would hold."""
    base = ModuleBase(module)
    targets: dict[str, Update] = {}
    for path, layer in layers(module).items():
        targets |= _read_layer(path, layer, base)
    for name, at in base.places.items():
        if (bias == "all" and "bias" in name.rpartition(".")[2]) or (bias == "lora_only" and _biases(name, module)):
            targets[name] = Update((Replace(to_numpy(at.stored).copy()),))
    return Adapter({key: targets[key] for key in sorted(targets)})


def _is_loralib(module: nn.Module) -> bool:
    return any(c.__module__ == "loralib.layers" for c in type(module).__mro__)


def _biases(name: str, module: nn.Module) -> bool:
    """Whether it is the bias of a layer that is adapted: the layer's own, which a convolution does not have."""
    path, _, leaf = name.rpartition(".")
    return leaf == "bias" and path in layers(module)


def _read_layer(path: str, layer: Any, base: ModuleBase) -> Mapping[str, Update]:
    stem = f"{path}." if path else ""
    tensors = {f"{stem}{role}": to_numpy(getattr(layer, role)).copy() for role in ("lora_A", "lora_B")}
    # loralib 0.1.2 layers.py: scaling is lora_alpha / r, and may have been set since
    usual = layer.lora_alpha / layer.r
    options = ReadOptions(
        alpha=float(layer.lora_alpha if layer.scaling == usual else layer.scaling * layer.r),
        scale_rule="alpha/r",
        base=base,
        config={"enable_lora": list(layer.enable_lora)} if hasattr(layer, "enable_lora") else {},
    )
    found = registry.read_source(MemorySource(tensors), "loralib", options)[0].adapter
    return {key: _placed(key, update, base, isinstance(layer, nn.Embedding)) for key, update in found.items()}


def _placed(key: str, update: Update, base: ModuleBase, embedding: bool) -> Update:
    if update.placement is None:
        place = base.resolve(Adapter({key: update}), Hints()).require().targets[key][0].placement
        update = update.placed(place)
    return replace(update, op="embedding" if embedding else update.op)
