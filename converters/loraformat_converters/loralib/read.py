"""loralib → Adapter: what each pair is, by its sizes and by those of the base, or a refusal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraformat import canonical, huggingface
from loraformat.axes import Placement
from loraformat.layout import Reading, ReadOptions
from loraformat.loose import Loose, by_module
from loraformat.parts import Lora, Replace
from loraformat.resolve import matches
from loraformat_converters.loralib.convolution import flattened
from loraformat_converters.loralib.merged import whole

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.scale import ScaleRule
    from loraformat.source import Source

    Array = npt.NDArray[Any]

__all__ = ["claims", "read"]

_ENDINGS = {".lora_A": "lora_A", ".lora_B": "lora_B"}
# Other tools end a name alike: PEFT's AdaLoRA (lora_E beside it), AdapterHub (….loras.NAME.lora_A), litgpt (its modules).
_OTHERS = re.compile(
    r"\.lora_E$|\.loras\.|lora_embedding_"
    r"|^transformer\.h\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|(experts\.\d+\.)?(fc|fc_1|fc_2|proj)))\.lora_[AB]$"
)


def claims(source: Source) -> str | None:
    """The evidence, or None."""
    if source.file is None or not (source.torch or source.file.suffix == ".safetensors"):
        return None
    if "loraformat" in source.header or source.sidecar("adapter_config.json") is not None:
        return None
    names = list(source.tensors)
    if any(map(_OTHERS.search, names)):
        return None
    return "keys end with .lora_A, and not .weight" if any(n.endswith(".lora_A") for n in names) else None


def read(source: Source, options: ReadOptions) -> Reading:
    """The adapter; what stands beside factors replaces the base's parameter of that name.

    Raises:
        LoraFormatError: LF-303 … LF-314 the tensors; LF-504 which parts of a fused projection are adapted is not known;
            LF-506 a name that is no parameter's; LF-507, LF-509 the scale.
    """
    reader = _Reader(options)
    pairs, rest = by_module(source.tensors, _ENDINGS)
    for module, roles in pairs.items():
        if reader.draft.sound(module, roles, {"lora_A": 2, "lora_B": 2}):
            reader.pair(module, roles["lora_A"], roles["lora_B"])
    for name, tensor in rest.items():
        _replace(name, tensor, reader.draft)
    extensions = {"loralib": canonical.dumps(reader.kept)} if any(reader.kept.values()) else {}
    adapter = reader.draft.finish(str(source.path), extensions=extensions)
    return Reading(adapter, reader.draft.warnings)


def _replace(name: str, tensor: Array, draft: Loose) -> None:
    leaf = name.rpartition(".")[2]
    if leaf not in ("weight", "bias") and "bias" not in leaf:
        draft.say("LF-506", "neither a factor of loralib nor a parameter", name, "another layout?")
        return
    if leaf == "weight":
        draft.warn("LF-507", "a fully trained tensor beside the factors: it replaces the base's", name)
    draft.add(name, Replace(tensor, ("add", "resize") if leaf == "weight" else ("add",)))


class _Reader:
    """What is known of the base while the pairs are read.

    Attributes:
        kept: what the writer has to know to give the same tensors back.
    """

    def __init__(self, options: ReadOptions) -> None:
        self.draft = Loose(options, "loralib")
        self.config = options.config
        base = options.base
        self.shapes = {name: p.shape for name, p in base.parameters().items()} if base is not None else {}
        self.kept: dict[str, dict[str, Any]] = {"convolutions": {}, "enable_lora": {}}

    def pair(self, module: str, a: Array, b: Array) -> None:
        """One layer's factors."""
        for key in (f"{module}.conv.weight", f"{module}.weight"):
            if len(self.shapes.get(key, ())) > 2:
                self._convolution(module, key, a, b)
                return
        key, shape = f"{module}.weight", self.shapes.get(f"{module}.weight")
        enabled = self._enabled(module, a, b, shape)
        if enabled is None:
            return
        if len(enabled) > 1:
            self._merged(module, a, b, enabled)
        elif shape is None and self._needs_rank:
            what = f"is this a Linear of rank {a.shape[0]}, or a Conv2d of a smaller one? Both look alike"
            self.draft.say("LF-509", what, key, "state the rank: --rank R, or give --base")
        elif shape is not None and shape not in ((b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])):
            what = f"the factors give {[b.shape[0], a.shape[1]]}, the base has {list(shape)}"
            self.draft.say("LF-606", what, key, "is this the base that the adapter was trained on?")
        elif (scale := self.draft.scale(module, a.shape[0])) is not None:
            self._add(key, Lora(a, b, *scale), shape)

    @property
    def _needs_rank(self) -> bool:
        stated = self.draft.options
        return stated.rank is None and stated.alpha is not None and stated.scale_rule not in (None, "factor")

    def _add(self, key: str, part: Lora, shape: tuple[int, ...] | None) -> None:
        """A pair of two axes: of a weight that lies [in, out] an Embedding's, unless the model is known to have Conv1Ds."""
        turned = shape is not None and shape[0] != shape[1] and shape == part.matrix_shape()[::-1]
        place = Placement(shape, (1,), (0,)) if shape is not None and turned else None
        usual = huggingface.linear_spec(self.config, key)
        embedding = turned and usual is not None and usual[0] == "out,in"
        self.draft.add(
            key, part, place, op="embedding" if embedding else None, assumed=("name",) if shape is None else ()
        )

    def _enabled(self, module: str, a: Array, b: Array, shape: tuple[int, ...] | None) -> Sequence[bool] | None:
        """Which parts are adapted: ``[True]`` of a module that is not fused; None, and a problem, where it is not known."""
        draft, (rows, r) = self.draft, (a.shape[0], b.shape[1])
        if rows % r or b.shape[0] % (rows // r):
            draft.say("LF-309", f"lora_A {list(a.shape)} and lora_B {list(b.shape)} are of no layer of loralib", module)
            return None
        count, stated = rows // r, _stated(self.config.get("enable_lora"), module)
        if count == 1 and (stated is None or sum(stated) != 1 or not self._is_fused(b, shape, stated, module)):
            return [True]
        if stated is not None:
            parts = b.shape[0] // count * len(stated)
            if sum(stated) == count and (shape is None or parts in shape):
                return stated
            what = f"enable_lora is stated as {list(stated)}; the tensors have {count} enabled parts of {b.shape[0] // count}"
            draft.say("LF-507", f"{what}{f' and the base {list(shape)}' if shape else ''}", module)
            return None
        if shape in ((b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])):
            return [True] * count  # as many outputs as the base has: every part
        what = f"{count} parts of a fused projection are adapted (MergedLinear), and no tensor says which of how many"
        fix = 'state it: --base config.json with a member "enable_lora": [true, false, true]'
        draft.say("LF-504", what, module, fix)
        return None

    def _is_fused(self, b: Array, shape: tuple[int, ...] | None, stated: Sequence[bool], module: str) -> bool:
        """Whether a pair of one block is that of the one enabled part: where the base is larger, or a pattern says so."""
        if shape is not None:
            return b.shape[0] * len(stated) in shape and b.shape[0] not in shape
        return isinstance(self.config.get("enable_lora"), dict)

    def _merged(self, module: str, a: Array, b: Array, enabled: Sequence[bool]) -> None:
        if (scale := self.draft.scale(module, b.shape[1])) is not None:
            part = Lora(a, whole(b, enabled), *_widened(scale, b.shape[1], a.shape[0]))
            self.kept["enable_lora"][module] = list(enabled)
            self._add(f"{module}.weight", part, self.shapes.get(f"{module}.weight"))

    def _convolution(self, module: str, key: str, a: Array, b: Array) -> None:
        shape = self.shapes[key]
        k = shape[2]
        flat = flattened(a, b, shape) if len(shape) == 4 and shape[2] == shape[3] and not a.shape[0] % k else None
        if flat is None or a.shape[0] != b.shape[1]:
            what = f"lora_A {list(a.shape)} and lora_B {list(b.shape)} give no kernel {list(shape)} by loralib's view"
            self.draft.say("LF-309", what, key)
        elif (scale := self.draft.scale(module, a.shape[0] // k)) is not None:
            self.kept["convolutions"][module] = {"key": key, "groups": a.shape[1] // k // shape[1]}
            part = Lora(*flat, *_widened(scale, a.shape[0] // k, flat[0].shape[0]))
            self.draft.add(key, part, Placement(shape, (0,), (1, 2, 3)))


def _widened(scale: tuple[float, ScaleRule], trained: int, r: int) -> tuple[float, ScaleRule]:
    """The same factor for a pair of another rank: under alpha/r by a whole multiple of alpha."""
    alpha, rule = scale
    if rule == "alpha/sqrt(r)":
        return alpha / trained**0.5, "factor"
    return (alpha * (r // trained), rule) if rule == "alpha/r" else scale


def _stated(value: Any, module: str) -> Sequence[bool] | None:
    """What ``enable_lora`` says of a module."""
    if isinstance(value, Mapping):
        value = next((v for pattern, v in value.items() if matches(f"{module}.weight", (pattern,))), None)
    if isinstance(value, list) and value and all(isinstance(v, bool) for v in value) and any(value):
        return value
    return None
