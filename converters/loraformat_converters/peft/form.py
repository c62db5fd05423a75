"""What is about to be written: tensors under PEFT's names, the settings that the model owns, and what stands in the way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraformat.errors import Problem

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Form", "replacements", "target_modules", "torch_kernel"]


@dataclass
class Form:
    """One method's tensors and settings; ``modules`` are those that PEFT must choose by ``target_modules``."""

    method: str
    tensors: dict[str, Array] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, key: str, what: str, fix: str = "") -> None:
        """Note LF-508."""
        self.problems.append(Problem("LF-508", what, key, fix))


def target_modules(modules: Iterable[str]) -> list[str] | str:
    """The list of paths, as PEFT writes it; a regular expression where a path has one component only.

    PEFT takes a listed ``proj`` for every ``….proj`` of the base, and says nothing of those that it adds.
    """
    paths = sorted(modules)
    if all("." in path for path in paths):
        return paths
    return "|".join(map(re.escape, paths))


def torch_kernel(key: str, update: Update, form: Form) -> tuple[int, ...] | None:
    """(in, *kernel) of a torch convolution, () of two axes or an unplaced matrix; None, and a refusal, of another."""
    place = update.placement
    if place is None or len(place.shape) == 2:
        return ()
    if place.out != (0,) or place.in_ != tuple(range(1, len(place.shape))):
        fix = "PEFT adapts torch convolutions [out, in, *kernel]"
        form.refuse(key, f"the placement {place.spec} of {list(place.shape)} is no torch module's", fix)
        return None
    return place.shape[1:]


def replacements(updates: Mapping[str, Update], form: Form, wrapped: Mapping[str, str]) -> None:
    """Whole parameters: under ``base_layer`` in a module that PEFT wraps (``wrapped``: module → its stem), else by name.

    PEFT loads both into the model that it was given, listed in ``modules_to_save`` or not. Listed are the modules
    whose weight and bias are both here: PEFT wants every parameter of a listed module, and stops where one lacks. It
    takes a listed ``head`` for an ``lm_head`` too, so that a path of one component is not listed.
    """
    whole = {key for key, update in updates.items() if "replace" in update}
    for key in sorted(whole):
        module, _, leaf = key.rpartition(".")
        stem = f"{wrapped[module]}." if module in wrapped else f"{module}." if module else ""
        form.tensors[f"{stem}{leaf}"] = updates[key]["replace"].replace
    free = {key.rpartition(".")[0] for key in whole} - wrapped.keys()
    if saved := [
        module for module in sorted(free) if "." in module and {f"{module}.weight", f"{module}.bias"} <= whole
    ]:
        form.settings["modules_to_save"] = saved
    biases = {key.rpartition(".")[0] for key in whole if key.endswith("bias")} - set(saved)
    if biases and form.method == "LORA":
        form.settings["bias"] = "lora_only" if biases <= wrapped.keys() else "all"
