"""candle-lora (675d3d2, read): one safetensors file of ``<prefix>a<number>.weight`` [r, in] and ``…b<number>.weight`` [out, r].

A module goes by the number that it got when the model was converted, and the layers of a model are converted in the order
of a HashMap, which is another in each run: only who trained it knows which is which. So the keys are
``<prefix><number>.weight`` in a name space of their own, and ``retarget --names`` tells what they are called elsewhere.

No file holds alpha. candle-lora's forward pass gives (W·x + B·A·x) · alpha / r, its merge W + alpha / r · B·A: the two are
one adapter where alpha is r, and else none that a difference of weights could state.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from loraformat.errors import fault
from loraformat.layout import Reading
from loraformat.loose import Loose
from loraformat.parts import Lora

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.layout import Output, ReadOptions, WriteOptions
    from loraformat.source import Source

    Roles = dict[str, npt.NDArray[Any]]

__all__ = ["NAMES", "Candle", "layout"]

NAMES = "rs.candle-lora"
"""The name space: a prefix and a number."""

# candle-lora 675d3d2 loralinear.rs get_tensors (without a dot behind the prefix) and LoraLinear::new (with one)
_NAME = re.compile(r"(?P<prefix>(?:.*[.\w])?)(?P<role>[ab])(?P<number>\d{1,9})\.weight")
_ANOTHERS = re.compile(r"(lora_(unet|te\d?|transformer|prior_unet|prior_te)|lycoris)_")


class Candle:
    """candle-lora's factors."""

    name = "candle"
    carries = frozenset({"lora"})
    writes = False
    describes = "candle-lora: a safetensors file of a0.weight, b0.weight, …, modules by number"
    scale = "nowhere; alpha must be the rank: --alpha, --scale-rule"
    markers: frozenset[str] = frozenset()
    endings: tuple[str, ...] = ()
    names = frozenset({NAMES})

    def detect(self, source: Source) -> str | None:
        """Every tensor is an a or a b with a number, and each has the other one."""
        if source.file is None or source.torch or source.file.suffix != ".safetensors":
            return None
        found = {name: _NAME.fullmatch(name) for name in source.tensors}
        if not found or not all(found.values()) or any(_ANOTHERS.match(name) for name in found):
            return None
        sides = [{(m["prefix"], m["number"]) for m in found.values() if m and m["role"] == role} for role in "ab"]
        return f"every key is like {next(iter(found))}, with its other factor" if sides[0] == sides[1] else None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """The adapter.

        Raises:
            LoraFormatError: LF-303 … LF-314 the tensors; LF-504 a scale that is not 1; LF-506 another tensor; LF-509 no scale.
        """
        draft = Loose(options, "candle-lora")
        modules: dict[str, Roles] = {}
        for name in source.tensors:
            if (match := _NAME.fullmatch(name)) is None:
                draft.say("LF-506", "no factor of candle-lora", name)
            else:
                roles = modules.setdefault(f"{match['prefix']}{match['number']}", {})
                roles[f"lora_{match['role'].upper()}"] = source.tensors[name]
        for module, found in modules.items():
            self._add(module, found, draft)
        return Reading(draft.finish(str(source.path), names=NAMES), draft.warnings)

    def _add(self, module: str, roles: Roles, draft: Loose) -> None:
        if not draft.sound(module, roles, {"lora_A": 2, "lora_B": 2}):
            return
        if (scale := draft.scale(module, roles["lora_A"].shape[0])) is None:
            return
        part = Lora(roles["lora_A"], roles["lora_B"], *scale)
        if part.scale != 1.0:
            what = (
                f"the scale {part.scale:g}: candle-lora multiplies the base's output by it too, which no adapter states"
            )
            fix = "train with alpha = rank; or, for what its merge computes, multiply B by the scale"
            draft.say("LF-504", what, module, fix)
        else:
            draft.add(f"{module}.weight", part)

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """It is not written: LF-508."""
        what = "candle-lora knows modules by numbers that a program gives them while it runs"
        raise fault("LF-508", what, fix="write PEFT or the native file")


layout = Candle()
