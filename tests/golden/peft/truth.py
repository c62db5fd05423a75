"""What PEFT itself computes of an adapter: deltas, merged weights, outputs."""

from __future__ import annotations

from typing import Any

import peft
import torch
from case import Case
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def forward(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        y = model.eval()(x.to(dtype) if x.is_floating_point() else x)
    return (y if isinstance(y, Tensor) else y.logits).float()


def tuner_layers(model: PeftModel, paths: dict[int, str]) -> list[tuple[str, Any]]:
    """Pairs of base parameter name and PEFT layer, matched by the identity of the base module."""
    found: list[tuple[str, Any]] = []
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            which = getattr(module, "parameter_name", None)
            if which is None:
                which = "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight"
            found.append((f"{paths[id(base)]}.{which}", module))
    return sorted(found, key=lambda pair: pair[0])


def own_delta(layer: Any, adapter: str) -> Tensor | None:
    """What get_delta_weight says, where that is a tensor to add to the base weight."""
    multiplies = isinstance(layer, peft.tuners.oft.layer.OFTLayer)
    grouped = getattr(layer.get_base_layer(), "groups", 1) > 1
    variant = adapter in getattr(layer, "lora_variant", {})
    if multiplies or grouped or variant or not hasattr(layer, "get_delta_weight"):
        return None
    with torch.no_grad():
        delta: Tensor = layer.get_delta_weight(adapter)
        return delta.float()


def truth_of(
    case: Case, model: PeftModel, layers: list[tuple[str, Any]], base: dict[str, Tensor], x: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Merge the model; the tensors of truth.safetensors and the entries of golden.json that go with them."""
    adapter = case.adapter_name
    targets: dict[str, dict[str, Any]] = {}
    deltas: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for name, layer in layers:
        known = {field: getattr(layer, field, {}) for field in ("r", "scaling")}
        entry = {field: value[adapter] for field, value in known.items() if adapter in value}
        if entry:
            targets[name] = entry
        delta = own_delta(layer, adapter)
        if delta is not None:
            (extra if case.near_init else deltas)[f"pissa_delta.{name}" if case.near_init else name] = delta
    y = forward(model, x, case.dtype)
    try:
        merged = model.merge_and_unload().state_dict()
    except NotImplementedError as error:
        return {}, {"targets": targets, "refused_by_peft": str(error)}

    tensors = {"x": x.float() if x.is_floating_point() else x, "y": y, **extra}
    source: dict[str, str] = {}
    for name, value in merged.items():
        if name in base and torch.equal(value, base[name]):
            assert name not in deltas or not deltas[name].any(), f"{case.name}: {name} did not change"
            deltas.pop(name, None)
            continue
        tensors[f"merged.{name}"] = value.float()
        if name in deltas:
            tensors[f"delta.{name}"] = deltas[name]
            source[name] = "get_delta_weight"
        elif name in base and base[name].shape == value.shape:
            tensors[f"delta.{name}"] = (value.double() - base[name].double()).float()
            source[name] = "merged minus base"
    if missing := set(deltas) - set(merged):
        raise AssertionError(f"{case.name}: no merged {missing}")
    return tensors, {"targets": targets, "delta_from": source}
