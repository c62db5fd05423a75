"""Adapter → diffusers: one file, the names of each component as diffusers spells them, and PEFT's settings in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import Output, ReadOptions, tensors_file
from loraformat_converters.diffusers import metadata
from loraformat_converters.diffusers.spelling import COMPONENTS, SPELLINGS, Spelling, is_text, spell
from loraformat_converters.peft import to_lora
from loraformat_converters.peft.form import Form, target_modules
from loraformat_converters.peft.read import read_tensors
from loraformat_converters.peft.write import same_update

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter

    Array = npt.NDArray[Any]

__all__ = ["write"]

_TEXT = "text_model."
_LOOSE_TEXT = r"text_model\."
_OURS = frozenset({"lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"})


@dataclass(frozen=True)
class _Kept:
    """What the source's file said, where it was one of diffusers."""

    text: str | None
    spelling: Mapping[str, Any]

    def of(self, component: str | None, module: str) -> Spelling:
        """How the names of a module were spelt; by default as ``save_lora_weights`` of diffusers 0.42.1 writes them."""
        said = self.spelling.get(component or "", "linear" if is_text(component) else "peft")
        if not isinstance(
            said, str
        ):  # mixed: of a U-Net diffusers converts all names or none, as the first one is spelt
            said = said.get(module) if is_text(component) else "peft"
        return next((spelling for spelling in SPELLINGS if spelling == said), "peft")


def write(adapter: Adapter) -> Output:
    """``pytorch_lora_weights.safetensors``.

    Raises:
        LoraFormatError: LF-508 with everything that diffusers cannot hold.
    """
    if adapter.names != "torch":
        raise fault("LF-508", f"diffusers names torch modules; here names are in the space {adapter.names!r}")
    if unknown := [c for c in adapter.components if c not in COMPONENTS]:
        what = f"diffusers loads no LoRA into a component {unknown[0]!r}"
        raise fault("LF-508", what, fix=f"known are {', '.join(sorted(COMPONENTS))}")
    kept = _kept(adapter)
    tensors: dict[str, Array] = {}
    settings: dict[str | None, Mapping[str, Any]] = {}
    problems: list[Problem] = []
    for component in adapter.components or (None,):
        own = _share(adapter, component)
        form = to_lora.lora(own, None)
        problems += [replace(p, where=f"{component}: {p.where}" if component else p.where) for p in _refused(form)]
        for name, tensor in form.tensors.items():
            module, role = _cut(name)
            tensors[spell(component, module, role, kept.of(component, module))] = tensor
        settings[component] = _settings(form, component)
    if problems:
        raise LoraFormatError(problems)
    header = {"format": "pt"}
    text = kept.text if kept.text is not None and _holds(kept.text, adapter) else metadata.text(settings)
    if kept.spelling and kept.text is None and _scale_one(adapter):
        text = ""  # a file without a header, which means the same as it stands
    if text:
        header[metadata.KEY] = text

    return Output({"": tensors_file(tensors, header)}, folder=False, warnings=_warnings(adapter))


def _share(adapter: Adapter, component: str | None) -> Adapter:
    """One component's targets, by their own names; of a text encoder without the module that transformers 5 lacks."""
    return replace(adapter.of_component(component), extensions={})


def _refused(form: Form) -> list[Problem]:
    """Everything that PEFT's LoRA refuses, and what diffusers does not load of it: every name must hold ``lora``."""
    odd = sorted(name for name in form.tensors if _cut(name)[1] not in _OURS)
    what = "diffusers loads factors, their biases and magnitudes of modules, no embedding's and no whole parameter"
    more = [Problem("LF-508", what, name) for name in odd]
    if named := form.settings.get("target_parameters"):
        more.append(Problem("LF-508", "diffusers loads LoRAs of modules, not of parameters by name", named[0]))
    return [*form.problems, *more]


def _settings(form: Form, component: str | None) -> dict[str, Any]:
    """PEFT's LoraConfig of one component, which fits a text encoder with and without its inner module ``text_model``."""
    chosen = target_modules(form.modules)
    settings = {"bias": "none", "peft_type": "LORA", **form.settings, "target_modules": chosen}
    if not is_text(component):
        return settings
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(name) or {}
        settings[name] = {_loose(pattern): value for pattern, value in patterns.items()}
    if isinstance(chosen, str):
        settings["target_modules"] = f"({'|'.join(_loose(path) for path in chosen.split('|'))})"
    else:
        settings["target_modules"] = [path.removeprefix(_TEXT) for path in chosen]
    return settings


def _loose(pattern: str) -> str:
    """A pattern of one module, with or without ``text_model.`` before it."""
    path = pattern.removeprefix("^").removeprefix(_LOOSE_TEXT)
    return rf"(text_model\.)?{path}"


def _cut(name: str) -> tuple[str, str]:
    """(module, role) of a tensor under PEFT's name."""
    for role in _OURS:
        if name.endswith(f".{role}"):
            return name.removesuffix(f".{role}"), role
    return name.rpartition(".")[0], name.rpartition(".")[2]


def _kept(adapter: Adapter) -> _Kept:
    text = adapter.extensions.get("diffusers")
    if text is None:
        return _Kept(None, {})
    try:
        value = json.loads(text)
        said, spelling = value.get(metadata.KEY), value["spelling"]
    except (ValueError, KeyError, AttributeError, RecursionError):
        raise fault("LF-508", "what is kept of the file of diffusers is damaged") from None
    if not isinstance(spelling, dict) or not (said is None or isinstance(said, str)):
        raise fault("LF-508", "what is kept of the file of diffusers is damaged")
    return _Kept(said, spelling)


def _holds(text: str, adapter: Adapter) -> bool:
    """Whether diffusers would read this very adapter under the header of its source."""
    components: list[str | None] = [*adapter.components] or [None]
    try:
        stated, _ = metadata.parse(text, components)
        for component in components:
            own = _share(adapter, component)
            tensors = to_lora.lora(own, None).tensors
            again = read_tensors(tensors, stated[component], ReadOptions(), "").adapter
            if again.keys() != own.keys() or not all(same_update(again[key], own[key]) for key in own):
                return False
    except (LoraFormatError, KeyError):
        return False
    return True


def _scale_one(adapter: Adapter) -> bool:
    return all(part.scale == 1.0 for update in adapter.values() for part in update.additive)


def _warnings(adapter: Adapter) -> list[Problem]:
    if _scale_one(adapter):
        return []
    what = f"the scale is in the header's {metadata.KEY}; a version of diffusers that does not know it takes scale 1"
    return [Problem("LF-509", what, fix="--fold-scale multiplies it into B, for any version", severity="warning")]
