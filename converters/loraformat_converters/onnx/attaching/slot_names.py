"""What the inputs for an adapter are called, and its file. Three styles of names are in use:

native   lora/model.layers.0.self_attn.q_proj.weight/A, …/B; …/gain for the magnitude of a DoRA
olive    model.layers.0.self_attn.q_proj.lora_A.weight          (olive-ai 0.13 convert-adapters)
genai    model.layers.0.attn.q_proj.lora_A.MatMul.weight        (onnxruntime-genai 0.18, its model builder)
"""

from __future__ import annotations

import re
from typing import Literal

from loraformat.errors import fault

__all__ = ["STYLES", "Style", "file_of", "gain_of", "inputs_of", "is_olives", "key_of"]

Style = Literal["native", "olive", "genai"]
STYLES: tuple[Style, ...] = ("native", "olive", "genai")

_NATIVE = re.compile(r"lora/(?P<key>.+)/(?P<side>A|B|gain)", re.S)
_LISTED = re.compile(r"(base_model\.model\.)?(?P<key>.+)\.lora_(?P<side>[AB])(\.default)?(\.MatMul)?\.weight", re.S)


def inputs_of(key: str, style: Style) -> tuple[str, str]:
    """What the inputs of A and B are called. LF-705 of a parameter that a style has no name for.

    >>> inputs_of("h.0.self_attn.q.weight", "genai")
    ('h.0.attn.q.lora_A.MatMul.weight', 'h.0.attn.q.lora_B.MatMul.weight')
    """
    if style == "native":
        return f"lora/{key}/A", f"lora/{key}/B"
    module = key.removesuffix(".weight")
    if module == key:
        raise fault("LF-705", f"{style} names slots after modules, and this is no module's weight", where=key)
    if style == "olive":
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    module = module.replace(".self_attn.", ".attn.")
    return f"{module}.lora_A.MatMul.weight", f"{module}.lora_B.MatMul.weight"


def gain_of(key: str, style: Style) -> str:
    """What the input for m/‖V‖ − 1 of a DoRA is called. LF-705 of the styles of others, which have no name for it.

    Olive's lora_magnitude_vector is m itself (olive-ai 0.13, passes/onnx/extract_adapters.py).
    """
    if style != "native":
        fix = "--slot-names native; or loraformat convert --to-lora R, whose residual is printed"
        raise fault(
            "LF-705", f"{style} has no name for a slot that the magnitude of a DoRA acts by", where=key, fix=fix
        )
    return f"lora/{key}/gain"


def key_of(name: str) -> tuple[str, str] | None:
    """(key, A, B or gain) of a tensor's name in any style; None where it is of none. What genai renamed stays renamed.

    >>> key_of("base_model.model.h.0.q.lora_B.default.weight"), key_of("lora/wte/A"), key_of("h.bias")
    (('h.0.q.weight', 'B'), ('wte', 'A'), None)
    """
    if found := _NATIVE.fullmatch(name):
        return found["key"], found["side"]
    if found := _LISTED.fullmatch(name):
        return f"{found['key']}.weight", found["side"]
    return None


def is_olives(name: str) -> bool:
    """Whether a tensor goes by Olive's style: that of PEFT's modules, which is no slot of ours by itself.

    >>> is_olives("h.0.q.lora_A.weight"), is_olives("h.0.q.lora_A.MatMul.weight"), is_olives("lora/h.0.q.weight/A")
    (True, False, False)
    """
    found = _LISTED.fullmatch(name)
    return found is not None and not name.endswith(".MatMul.weight") and not _NATIVE.fullmatch(name)


def file_of(model: str, name: str) -> str:
    """What an adapter's file is called beside its model.

    >>> file_of("model.onnx", "style")
    'model.style.onnx_adapter'
    """
    return f"{model.removesuffix('.onnx')}.{name}.onnx_adapter"
