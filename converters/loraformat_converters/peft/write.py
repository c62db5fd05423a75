"""Adapter → PEFT: tensors under PEFT's names, and the configuration under which PEFT computes the same change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.errors import LoraFormatError, fault
from loraformat.layout import Output, ReadOptions, tensors_file, text_file
from loraformat.parts import Part
from loraformat_converters.peft import config as configs
from loraformat_converters.peft import ties, to_lora, to_others
from loraformat_converters.peft.form import Form, target_modules
from loraformat_converters.peft.names import PREFIX
from loraformat_converters.peft.read import read_tensors

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["same_update", "write"]

# What of a source's configuration still holds when its numbers or targets do not: notes, and no choice of modules or
# of an initialisation, by which PEFT would skip a target or fill it at random.
_NOTES = ("auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "task_type")
_LORA_NOTES = ("fan_in_fan_out", "lora_dropout")
# peft 0.21.2 peft_model.py: listed for every classifier, whether the model has such a module or not.
_HEADS = frozenset({"classifier", "score", "qa_outputs"})


def write(adapter: Adapter) -> Output:
    """``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        LoraFormatError: LF-508 with everything that PEFT cannot hold.
    """
    if adapter.names != "torch" or adapter.components:
        what = f"names are in the space {adapter.names!r}" if adapter.names != "torch" else "the model has components"
        raise fault("LF-508", f"PEFT names torch modules of one model; here {what}")
    kept = _kept(adapter.extensions.get("peft"))
    form = _form(adapter, kept)
    if form.problems:
        raise LoraFormatError(form.problems)
    _leave_tied(form, kept)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in form.tensors.items()}
    if kept and _holds(kept, form, tensors, adapter):
        text = kept.text
    else:
        text = json.dumps(_config(form, adapter, kept), indent=2, sort_keys=True)

    files = {"adapter_model.safetensors": tensors_file(tensors, {"format": "pt"}), configs.FILE: text_file(text)}
    return Output(files, folder=True)


def _form(adapter: Adapter, kept: configs.Config | None) -> Form:
    """The adapter in the one method that holds all of its parts."""
    kinds = {part.kind for update in adapter.values() for part in update.parts}
    if kinds == {"rows"}:
        return to_others.tokens(adapter, kept)
    if "loha" in kinds:
        return to_others.loha(adapter, kept)
    if "lokr" in kinds:
        return to_others.lokr(adapter, kept)
    return to_lora.lora(adapter, kept)


def _leave_tied(form: Form, kept: configs.Config | None) -> None:
    """A head that PEFT adapts with its embedding is not chosen, as in the configuration that it came with."""
    if kept and kept.method == form.method and (tied := ties.followers(kept, ties.by_module(form.tensors.items()))):
        form.modules = [module for module in form.modules if module not in tied]
        if form.method == "LORA":
            form.settings["ensure_weight_tying"] = True


def _config(form: Form, adapter: Adapter, kept: configs.Config | None) -> dict[str, Any]:
    """A configuration of the model's own numbers and the notes of the source's."""
    wanted = (*_NOTES, *(_LORA_NOTES if form.method == "LORA" else ()))
    notes = {name: kept.value[name] for name in wanted if name in kept.value} if kept else {}
    if "target_parameters" in form.settings:  # peft 0.21.2 ParamWrapper refuses both with an adapted parameter
        notes |= {"fan_in_fan_out": False, "lora_dropout": 0.0}
    return {
        "base_model_name_or_path": adapter.base_model.get("name"),
        "inference_mode": True,
        "task_type": None,
        **({"bias": "none"} if form.method == "LORA" else {}),
        **notes,
        "peft_type": form.method,
        "target_modules": target_modules(form.modules),
        **form.settings,
    }


def _kept(text: str | None) -> configs.Config | None:
    if text is None:
        return None
    try:
        return configs.parse(text)[0]
    except LoraFormatError as error:
        raise fault("LF-508", f"the kept PEFT configuration is damaged: {error.problems[0].what}") from None


def _holds(kept: configs.Config, form: Form, tensors: Mapping[str, Array], adapter: Adapter) -> bool:
    """Whether PEFT would read this very adapter out of the tensors under the source's own configuration."""
    if not all(configs.targets_match(kept.value.get("target_modules"), module) for module in form.modules):
        return False
    saved = [key.rpartition(".")[0] for key, update in adapter.items() if "replace" in update]
    for entry in kept.names("modules_to_save"):
        if entry not in _HEADS and not any(f"{module}.".find(f"{entry}.") >= 0 for module in saved):
            return False
    shapes = {key: u.placement.shape for key, u in adapter.items() if u.placement is not None}
    try:
        again = read_tensors(tensors, kept, ReadOptions(), "", shapes).adapter
    except LoraFormatError:
        return False
    return again.keys() == adapter.keys() and all(same_update(again[key], update) for key, update in adapter.items())


def same_update(one: Update, other: Update) -> bool:
    """Whether two updates have the same parts, with the same numbers and tensors."""
    return len(one.parts) == len(other.parts) and all(map(_equal, one.parts, other.parts))


def _equal(one: Part, other: Part) -> bool:
    """Whether two parts are the same in kind, numbers and tensors."""
    if type(one) is not type(other):
        return False
    for name in (field.name for field in fields(one)):
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            same = a.__array_interface__ == b.__array_interface__  # the very memory, which most tensors are
            if a.dtype != b.dtype or not (same or np.array_equal(a, b)):
                return False
        elif a is not b and a != b:
            return False
    return True
