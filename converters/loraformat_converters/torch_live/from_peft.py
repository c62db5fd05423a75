"""PEFT's live layers → Adapter: its own state dict and configuration through the reader of PEFT's files.

What a file cannot say is read off the layers: the scale as it stands (``set_scale``, ``scale_layer`` change it), and by
the class of each base layer how its weight lies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from loraformat import registry
from loraformat.adapter import Adapter
from loraformat.errors import fault
from loraformat.layout import ReadOptions
from loraformat.memory import MemorySource
from loraformat.parts import Delta, Loha, Lokr, Lora
from loraformat.resolve import Hints
from loraformat_converters.torch_live.base import ModuleBase
from loraformat_converters.torch_live.tensors import to_numpy

if TYPE_CHECKING:
    from loraformat.updates import Update

__all__ = ["read"]

# peft 0.21.2 tuners_utils.py, utils/other.py: what PEFT puts between a module and its name
_WRAPPERS = ("base_layer", "original_module", "token_adapter")


def read(module: Any, adapter_name: str | None) -> Adapter:
    """The adapter of that name, or the only active one; see ``from_module``."""
    import peft

    name = _chosen(module, adapter_name)
    config = module.peft_config[name].to_dict() | {"peft_version": peft.__version__}
    # Of the base's own embeddings only what was trained is the adapter's: this module *is* the base.
    tensors = peft.get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
    arrays = {key: to_numpy(tensor).copy() for key, tensor in tensors.items()}
    inner = module.get_base_model() if isinstance(module, peft.PeftModel) else module
    base = ModuleBase(inner, _WRAPPERS)
    text = json.dumps(config, default=_plain, indent=2, sort_keys=True)
    source = MemorySource(arrays, None, {registry.CONFIG: text})
    adapter = registry.read_source(source, "peft", ReadOptions(base=base))[0].adapter
    factors = _live_factors(inner, name)
    targets = {
        key: _placed(key, _scaled(update, factors.get(key, factors.get(_module(key), 1.0))), base)
        for key, update in adapter.items()
    }
    return replace(adapter, targets=targets)


def _chosen(module: Any, wanted: str | None) -> str:
    known = list(module.peft_config)
    if wanted is None:
        active = getattr(module, "active_adapters", None)
        active = active() if callable(active) else active  # transformers has a method of this name
        names = list(active) if active else known
        if len(names) == 1:
            return str(names[0])
        raise fault("LF-705", f"several adapters are active: {', '.join(names)}", fix="say which: adapter_name=…")
    if wanted not in known:
        raise fault("LF-705", f"no adapter is called {wanted!r}; there are {', '.join(known)}")
    return wanted


def _plain(value: Any) -> Any:
    """What PEFT's configuration holds and JSON does not."""
    if isinstance(value, (set, frozenset, tuple)):
        return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    return getattr(value, "value", None) or str(value)


def _module(key: str) -> str:
    """The module that a parameter belongs to."""
    return key.rpartition(".")[0]


def _live_factors(module: nn.Module, name: str) -> Mapping[str, float]:
    """Module, or parameter that is adapted by name → by how much its scale differs from what rank and alpha say."""
    found = {}
    for path, layer in module.named_modules():
        if isinstance(getattr(layer, "scaling", None), dict) and (factor := _factor(layer, name)) != 1.0:
            words = [word for word in path.split(".") if word not in _WRAPPERS]
            leaf = getattr(layer, "parameter_name", None)
            found[".".join([*words, leaf] if leaf else words)] = factor
    return found


def _factor(layer: Any, name: str) -> float:
    """peft 0.21.2: alpha / r or / √r of a LoRA, alpha / r of LoHa and LoKr, alpha itself of AdaLoRA."""
    alphas = getattr(layer, "lora_alpha", None) or getattr(layer, "alpha", None) or {}
    scaling, rank, alpha = (values.get(name) for values in (layer.scaling, getattr(layer, "r", {}), alphas))
    if scaling is None or not rank or not alpha:
        return 1.0
    if hasattr(layer, "ranknum"):
        usual = alpha
    else:
        usual = alpha / (math.sqrt(rank) if getattr(layer, "use_rslora", {}).get(name) else rank)
    return float(scaling / usual)


def _scaled(update: Update, factor: float) -> Update:
    if factor == 1.0:
        return update
    parts = (
        replace(p, alpha=p.scale * factor, scale_rule="factor") if isinstance(p, (Lora, Loha, Lokr, Delta)) else p
        for p in update.parts
    )
    return replace(update, parts=tuple(parts))


def _placed(key: str, update: Update, base: ModuleBase) -> Update:
    """Placed where the class of the module says how; a packed weight of another shape says nothing."""
    found = base.resolve(Adapter({key: update}), Hints()).targets.get(key)
    return update.placed(found[0].placement) if found else update
