"""How diffusers spells tensors: ``<component>.<module>.<role>``, in four spellings of the same two factors.

diffusers 0.42.1 utils/state_dict_utils.py: UNET_TO_DIFFUSERS, DIFFUSERS_OLD_TO_PEFT, DIFFUSERS_TO_PEFT,
PEFT_TO_DIFFUSERS. ``down`` is A, ``up`` is B.

- ``peft``: ``….to_q.lora_A.weight``, of transformers and of what newer versions save
- ``lora``: ``….to_q.lora.down.weight``, of a U-Net
- ``linear``: ``….q_proj.lora_linear_layer.down.weight``, of a text encoder
- ``processor``: ``….attn1.processor.to_q_lora.down.weight``, before 0.22; its ``to_out_lora`` is ``to_out.0``
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from loraformat.errors import Problem

__all__ = ["COMPONENTS", "KEY", "SPELLINGS", "Name", "Spelling", "evidence", "is_text", "numbered", "parse", "spell"]

KEY = "lora_adapter_metadata"
"""In the header: the configuration of PEFT, as text."""

Spelling = Literal["peft", "lora", "linear", "processor"]
SPELLINGS: tuple[Spelling, ...] = get_args(Spelling)

COMPONENTS = frozenset(
    {"unet", "transformer", "transformer_2", "prior", "text_encoder", "text_encoder_2", "text_encoder_3"}
)
"""What a pipeline loads LoRAs into (diffusers 0.42.1 loaders/lora_pipeline.py, _lora_loadable_modules)."""

_FACTOR = {"down": "lora_A.weight", "up": "lora_B.weight"}
_ENDINGS: tuple[tuple[Spelling, re.Pattern[str]], ...] = (
    ("linear", re.compile(r"(?P<module>.+)\.lora_linear_layer\.(?P<role>down|up)\.weight")),
    ("lora", re.compile(r"(?P<module>.+)\.lora\.(?P<role>down|up)\.weight")),
    ("processor", re.compile(r"(?P<module>.+?)(?:\.processor)?\.(?P<leaf>to_(?:q|k|v|out))_lora\.(?P<role>down|up)\.weight")),
    ("peft", re.compile(r"(?P<module>.+)\.(?P<role>lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector(?:\.weight)?|alpha)")),
)  # fmt: skip
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# What else a file may hold.
_REFUSED = (
    (
        r"\.dora_scale",
        "a magnitude that diffusers drops with a warning, which leaves a plain LoRA of other weights",
        "take the file that its trainer wrote, in its own layout",
    ),
    (r"\.(lokr|hada)_.*", "a factor of LoKr or LoHa", ""),
    (r"\.lora_[AB]\.[^.]+\.weight", "of a live model, its adapter's name in the key", "save it with save_lora_weights"),
)


@dataclass(frozen=True, slots=True)
class Name:
    """What a tensor's name says.

    Attributes:
        component: of the pipeline; None in a file of one model.
        module: its path in that model.
        role: as PEFT calls it, or ``alpha``.
        spelling: None where it does not matter.
    """

    component: str | None
    module: str
    role: str
    spelling: Spelling | None


def is_text(component: str | None) -> bool:
    """Whether the component is one of transformers' text encoders."""
    return component is not None and component.startswith("text_encoder")


def parse(name: str, *, bare: bool) -> Name | Problem:
    """The grammar of one name; ``bare``: of a file without components."""
    component, path = (None, name) if bare else _split(name)
    if component is None and not bare:
        return Problem("LF-506", "the name begins with no component of a pipeline, and others do", name)
    for ending, what, fix in _REFUSED:
        if re.search(f"{ending}$", name):
            return Problem("LF-504", f"the tensor is {what}", name, fix)
    for kind, pattern in _ENDINGS:
        if match := pattern.fullmatch(path):
            module, role = match["module"], match["role"]
            if kind == "processor":
                leaf = match["leaf"]
                module += (
                    f".{_OLD_TEXT[leaf]}" if is_text(component) else ".to_out.0" if leaf == "to_out" else f".{leaf}"
                )
            module = module.replace(".processor.", ".")
            stated = kind if role in _FACTOR or role.startswith(("lora_A", "lora_B.weight")) else None
            return Name(component, module, _FACTOR.get(role, role), stated)
    return Problem("LF-506", "the tensor is none of a LoRA of diffusers", name)


def spell(component: str | None, module: str, role: str, spelling: Spelling) -> str:
    """A tensor's name; ``peft`` where the spelling has none for this module."""
    if role == "lora_magnitude_vector" and is_text(component):
        role += ".weight"  # else transformers 5.23 (integrations/peft.py) reports it as unexpected and starts from none
    prefix = f"{component}." if component else ""
    end = {"lora_A.weight": "down", "lora_B.weight": "up"}.get(role)
    if end and spelling == "linear":
        return f"{prefix}{module}.lora_linear_layer.{end}.weight"
    if end and spelling == "lora":
        return f"{prefix}{module}.lora.{end}.weight"
    if end and spelling == "processor" and (match := _OLD.fullmatch(module)) and not is_text(component):
        return f"{prefix}{match[1]}.processor.{match[2]}_lora.{end}.weight"
    return f"{prefix}{module}.{role}"


_OLD = re.compile(r"(.+)\.(to_q|to_k|to_v|to_out)(?:(?<=to_out)\.0)?")


def evidence(names: Iterable[str], *, own_file: bool) -> str | None:
    """What of the names only diffusers spells so; None if nothing does."""
    names = list(names)
    if any(name.startswith("lora_") or ".lora_down." in name for name in names):
        return None  # kohya's names, which diffusers reads too
    for kind, pattern in _ENDINGS[:3]:
        if found := next((n for n in names if pattern.fullmatch(n)), None):
            return f"a key is spelt {'.'.join(found.split('.')[-3:])} ({kind})"
    adapted = [name for name in names if name.endswith((".lora_A.weight", ".lora_B.weight"))]
    component = {name.partition(".")[0] for name in adapted}
    if adapted and component <= COMPONENTS and (own_file or component != {"transformer"} or _is_dit(adapted)):
        return f"keys begin with {', '.join(sorted(component))}."
    return "keys are spelt COMPONENT:NUMBER:up" if numbered(names) else None


def numbered(names: Iterable[str]) -> bool:
    """Whether the modules go by numbers, as in the files of cloneofsimo/lora, from before diffusers had names for them."""
    return any(re.fullmatch(r"\w+:\d+:(up|down)", name) for name in names)


def _is_dit(names: Iterable[str]) -> bool:
    """A model of language may be called ``transformer`` too; what its blocks are called tells."""
    return any(re.match(r"transformer\.(single_)?transformer_blocks\.", name) for name in names)


def _split(name: str) -> tuple[str | None, str]:
    component, _, path = name.partition(".")
    return (component, path) if component in COMPONENTS and path else (None, name)
