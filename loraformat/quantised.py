"""Checkpoints whose weights are stored as something else than floats: which form it is, by its own tensors, and the way out.

A merge would round ΔW to the steps of such a form: most of it is gone, or all. Unasked it is refused by the form's name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Form", "form_of"]


@dataclass(frozen=True, slots=True)
class Form:
    """How a weight is quantised, and what to do.

    Attributes:
        name: what people call it.
        evidence: the tensor or setting that says so.
        fix: the ways out.
        why: what is against a merge.
        plain: whether the stored values are the weight's own, without a scale.
    """

    name: str
    evidence: str
    fix: str
    why: str = "a merge would round the change away"
    plain: bool = False


_UNQUANTISED = "merge into the unquantised checkpoint and quantise the result"
# autoawq 0.2.9 quantize/scale.py: every weight is multiplied by scales of its inputs, the norm or linear before it divided.
_MOVED = "AWQ moved scales from its inputs into it, so that W + ΔW is no longer what an adapter means, and no file has the scales"
_BESIDE = "or run the adapter beside the quantised weights (PEFT, vLLM and others do: convert it to their layout)"

# Form → (what stands beside a module's weight, what must stand there too, what must not). The endings are those of
# bitsandbytes 0.48 (nn/modules.py, functional.py QuantState.as_dict), auto-gptq and gptqmodel, autoawq, compressed-tensors
# 0.11, DeepSeek-V3's own fp8 (transformers 5.23 integrations/finegrained_fp8.py), gpt-oss, ComfyUI's scaled fp8, HQQ, quanto.
_BESIDES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("bitsandbytes NF4", ("weight.quant_state.bitsandbytes__nf4",), ()),
    ("bitsandbytes FP4", ("weight.quant_state.bitsandbytes__fp4",), ()),
    ("bitsandbytes 4-bit", ("weight.absmax", "weight.quant_map"), ()),
    ("bitsandbytes LLM.int8", ("SCB",), ()),
    ("GPTQ", ("qweight", "qzeros", "scales", "g_idx"), ()),
    ("AWQ", ("qweight", "qzeros", "scales"), ("g_idx",)),
    ("compressed-tensors, packed", ("weight_packed", "weight_scale"), ()),
    ("FP8 in blocks", ("weight", "weight_scale_inv"), ()),
    ("scaled FP8 or int8", ("weight", "weight_scale"), ()),
    ("ComfyUI's scaled FP8", ("weight", "scale_weight"), ()),
    ("HQQ", ("W_q",), ()),
    ("quanto", ("weight._data", "weight._scale"), ()),
)
_BY_SETTING: Mapping[str, str] = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "torchao": "torchao",
    "quanto": "quanto",
    "eetq": "EETQ",
    "aqlm": "AQLM",
}


def form_of(weight: str, names: Collection[str], config: Mapping[str, Any], dtype: str | None = None) -> Form | None:
    """The form in which ``weight``, a logical name such as ``h.0.q.weight``, is stored; None where it is a plain tensor.

    Args:
        names: of every stored tensor.
        config: the checkpoint's ``config.json``; says the method's name where the tensors leave it open.
        dtype: of the stored tensor ``weight``, where there is one.

    >>> form_of("q.weight", {"q.qweight", "q.qzeros", "q.scales"}, {}).name
    'AWQ'
    """
    module = weight.rpartition(".")[0]
    for name, present, absent in _BESIDES:
        if all(f"{module}.{end}" in names for end in present) and not any(f"{module}.{end}" in names for end in absent):
            if name == "AWQ" and next(_methods(config), None) == "gptq":
                name = "GPTQ"  # of files that leave out the index of groups
            return _form(name, f"{module}.{present[-1]} stands beside it")
    if {f"{weight}_blocks", f"{weight}_scales"} <= set(names):
        return _form("MXFP4", f"{weight}_blocks holds it")
    if dtype is not None and dtype.startswith("F8"):
        return replace(_form("FP8 without a scale", f"it is stored as {dtype}"), plain=True)
    if dtype is not None and not dtype.startswith(("F", "BF")):
        method = next(_methods(config), None)
        named = _BY_SETTING.get(method or "", method) or dtype
        return _form(named, f"config.json says {method}" if method else f"it is stored as {dtype}")
    return None


def _form(name: str, evidence: str) -> Form:
    if name == "AWQ":
        return Form(name, evidence, _UNQUANTISED, _MOVED)
    return Form(name, evidence, f"{_UNQUANTISED}; {_BESIDE}")


def _methods(config: Mapping[str, Any]) -> Iterator[str]:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        said = part.get("quantization_config")
        if isinstance(said, dict) and isinstance(said.get("quant_method"), str):
            yield said["quant_method"]
