"""Live ``torch.nn.Module``s: take an adapter out of a model that a tool has wrapped, put one on a plain model.

    from loraformat_converters import torch_live

    adapter = torch_live.from_module(peft_model)           # PEFT's or loralib's own layers
    handle = torch_live.apply(adapter, model)              # beside the weights; PEFT need not be installed
    handle.weight, handle.enabled = 0.5, False
    handle.remove()                                        # the model is what it was, bit for bit

``tensors`` leads between numpy and torch, ``base`` says which parameter a target is and how it lies there; ``factors``
is the arithmetic of an update in torch, ``beside`` runs a pair beside its module, ``stack`` holds all that acts on one
parameter while the module runs, ``merged`` what stands in its place, ``handle`` puts on and takes off; ``take`` reads
what tools built, by ``from_peft`` and ``from_loralib``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraformat_converters.torch_live.base import ModuleBase
    from loraformat_converters.torch_live.handle import Handle, apply
    from loraformat_converters.torch_live.take import from_module

__all__ = ["Handle", "ModuleBase", "apply", "from_module"]

_HOMES = {"Handle": "handle", "ModuleBase": "base", "apply": "handle", "from_module": "take"}


def __getattr__(name: str) -> Any:
    """Load a public name with its module, the first time it is asked for (PEP 562): torch is slow to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
