"""Take the adapter out of a module that a training tool has wrapped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from loraformat.errors import fault

if TYPE_CHECKING:
    from torch import nn

    from loraformat.adapter import Adapter

__all__ = ["from_module"]


def from_module(
    module: nn.Module, adapter_name: str | None = None, *, bias: Literal["none", "lora_only", "all"] = "none"
) -> Adapter:
    """The adapter that is in ``module``: ranks, scales and orientations as the live layers have them.

    Args:
        module: a PEFT model, a model into which PEFT injected adapters, or one built of loralib's layers.
        adapter_name: of PEFT, which of several; by default the one that is active.
        bias: of loralib, which trained biases belong to the adapter, as ``loralib.lora_state_dict`` has it.

    Returns:
        The adapter under the names of the unwrapped model, every target placed where the class of its module says how.

    Raises:
        LoraFormatError: LF-501 there is none; LF-504 a method that has no exact form here, by its name; LF-705 several
            adapters and no name, or a name that none has.
    """
    if getattr(module, "peft_config", None):
        from loraformat_converters.torch_live.from_peft import read

        return read(module, adapter_name)
    from loraformat_converters.torch_live import from_loralib

    if from_loralib.layers(module):
        return from_loralib.read(module, bias)
    what = f"the {type(module).__name__} holds no adapter"
    raise fault("LF-501", what, fix="known are the layers of PEFT and of loralib")
