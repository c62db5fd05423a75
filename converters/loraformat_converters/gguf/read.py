"""GGUF → Adapter: pairs by the names of the base's tensors, placed as ggml multiplies them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraformat.adapter import Adapter
from loraformat.axes import Placement
from loraformat.dtypes import dtype_name
from loraformat.errors import LoraFormatError
from loraformat.gathered import Gathered
from loraformat.layout import Reading, ReadOptions
from loraformat.parts import Lora
from loraformat.scale import ScaleRule, scale_of
from loraformat.shapes import FLOATS
from loraformat.updates import Update
from loraformat_converters.gguf import keys
from loraformat_converters.gguf.file import GgufFile

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["EMBEDDING", "ROLES", "read"]

ROLES = ("lora_a", "lora_b")

EMBEDDING = "token_embd.weight"
"""The one tensor whose rows llama.cpp looks up with an adapter; its lora_a lies transposed (llm_build_inp_embd)."""


def read(path: Path, options: ReadOptions) -> Reading:
    """The adapter in a GGUF file.

    Raises:
        LoraFormatError: LF-511 the file is not sound; LF-3xx the tensors do not fit each other; LF-503 … LF-507 see
            ``loraformat.rules``.
    """
    file = GgufFile(path)
    if problems := keys.problems(file.metadata):
        raise LoraFormatError(problems)
    stored = file.metadata.get(keys.ALPHA)
    draft = _Draft(stored.value if stored is not None else 0.0, options)
    if stored is None:
        draft.warn("LF-509", "the file states no alpha: llama.cpp multiplies by 1", keys.ALPHA)
    for key, roles in draft.grouped(file).items():
        draft.pair(key, roles)
    return Reading(draft.finish(file), draft.warnings)


class _Draft(Gathered):
    """An adapter in the making, and everything that is wrong with it."""

    def __init__(self, alpha: float, options: ReadOptions) -> None:
        super().__init__()
        self.alpha, self.options = alpha, options

    def grouped(self, file: GgufFile) -> dict[str, Roles]:
        """Tensor of the base → role → array; what llama.cpp passes over is a warning, what it refuses an error."""
        found: dict[str, Roles] = {}
        for name in file:
            key, _, role = name.rpartition(".")
            if role in ROLES and key:
                found.setdefault(key, {})[role] = file[name]
            elif name.endswith("_norm.weight"):
                self.warn("LF-506", "llama.cpp passes over the weight of a norm: it is not part of the adapter", name)
            else:
                self.say("LF-506", "the name of a tensor ends with .lora_a or .lora_b", name)
        return found

    def pair(self, key: str, roles: Roles) -> None:
        """The update of one tensor of the base."""
        if missing := [role for role in ROLES if role not in roles]:
            self.say("LF-303", f"{missing[0]} is missing", key)
            return
        a, b = roles["lora_a"], roles["lora_b"]
        if not self.sound(key, roles):
            return
        embedding = key.endswith(EMBEDDING) and a.ndim == 2
        if embedding:
            a = a.T
        if a.shape[-2] != b.shape[-1] or any(
            m != n and 1 not in (m, n) for m, n in zip(a.shape[:-2], b.shape[:-2], strict=True)
        ):
            wanted = "[tokens, r] and [dim, r]" if embedding else "[*experts, r, in] and [*experts, out, r]"
            shapes = f"lora_a {list(roles['lora_a'].shape)} and lora_b {list(b.shape)}"
            self.say("LF-309", f"{shapes} are not {wanted}", key)
            return
        rank, out, inner = a.shape[-2], b.shape[-2], a.shape[-1]
        alpha, rule = self.scale(key, rank)
        if embedding:
            place = Placement((inner, out), (1,), (0,))
        else:
            batch = tuple(max(sizes) for sizes in zip(a.shape[:-2], b.shape[:-2], strict=True))
            n = len(batch)
            place = Placement((*batch, out, inner), (n,), (n + 1,), tuple(range(n)))
        self.updates[key] = Update((Lora(a, b, alpha, rule),), place, "embedding" if embedding else None)

    def sound(self, key: str, roles: Roles) -> bool:
        before = len(self.problems)
        axes = {tensor.ndim for tensor in roles.values()}
        if len(axes) > 1 or not axes <= {2, 3}:
            shapes = " and ".join(f"{role} {list(tensor.shape)}" for role, tensor in sorted(roles.items()))
            self.say("LF-309", f"{shapes}: both have two axes, or three of stacked experts", key)
        for role, tensor in roles.items():
            if (dtype := dtype_name(tensor.dtype)) not in FLOATS:
                self.say("LF-314", f"{role} is {dtype}; factors are floats", key)
        return len(self.problems) == before

    def scale(self, key: str, rank: int) -> tuple[float, ScaleRule]:
        """(alpha, rule): an alpha of 0 means a scale of 1 (llama-adapter.h get_scale)."""
        alpha: float = self.alpha or 1.0
        rule: ScaleRule = "alpha/r" if self.alpha else "factor"
        options = self.options
        if options.rank not in (None, rank):
            self.say("LF-507", f"the rank is stated as {options.rank}, and is {rank} by the tensors", key)
        if options.alpha is not None:
            stated = scale_of(options.alpha, options.scale_rule or "alpha/r", rank)
            if stated != scale_of(alpha, rule, rank):
                what = f"the scale is stated as {stated:g}, and is {scale_of(alpha, rule, rank):g} by {keys.ALPHA}"
                self.say("LF-507", what, key)
        return alpha, rule

    def finish(self, file: GgufFile) -> Adapter:
        """The adapter, sorted by key, or every problem at once."""
        targets = self.checked(str(file.path))
        return Adapter(targets, "gguf", base_model=_base_model(file), extensions={"gguf": keys.kept(file.metadata)})


def _base_model(file: GgufFile) -> dict[str, str]:
    """The first base that the metadata names, as the converter copies it from a model card."""
    names = {"name": "general.base_model.0.repo_url", "revision": "general.base_model.0.version"}
    found = {word: file.metadata[key] for word, key in names.items() if key in file.metadata}
    return {word: value.value for word, value in found.items() if value.type == "str" and value.value}
