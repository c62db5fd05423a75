"""LoRA: Linear, Conv1D, convolutions, embeddings, with DoRA and lora_bias; the rarer modules are in files of their own.

- ``lora_A.weight`` [r, in] and ``lora_B.weight`` [out, r]; a convolution has A [r, in, *kernel] and B [out, r, 1, …];
  an embedding ``lora_embedding_A`` [r, vocab] and ``lora_embedding_B`` [dim, r].
- Linear and Conv1D look the same on disk, and ``fan_in_fan_out`` proves nothing: both are read unplaced.
- ``lora_magnitude_vector`` (DoRA) has a value for each output: [out], [1, out, 1, …] of a convolution, [dim].
- ``lora_B.bias`` [out] (lora_bias) is multiplied by the scale and added to the module's own bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement
from loraformat.parts import Delta, Lora, Magnitude
from loraformat_converters.peft import attention, blocks, experts

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat_converters.peft.draft import Draft
    from loraformat_converters.peft.names import Name

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["ROLES", "read"]

_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")

ROLES = frozenset({*_LINEAR, *_EMBEDDING, "lora_B.bias", *_MAGNITUDES})


def read(found: Mapping[Name, Roles], draft: Draft) -> None:
    """Every adapted module and expert parameter of ``found``, as parts of ``draft``."""
    ordered = sorted(found, key=lambda name: (name.module, name.depth))
    modules = {m: {n.depth: found[n] for n in places} for m, places in itertools.groupby(ordered, lambda n: n.module)}
    parameters = {module: experts.parameters(module, nested, draft) for module, nested in modules.items()}
    shapes = draft.stacks([f"{m}.{name}" for m, names in parameters.items() if len(names) > 1 for name in names])
    attentions = {m for m in attention.modules(found) if m in modules and not parameters[m]}
    for module, nested in modules.items():
        if parameters[module]:
            experts.read(module, parameters[module], nested, draft, shapes)
        elif len(nested) > 1 or max(nested):
            what = "factors of several parameters of one module, and no target_parameters names them"
            draft.say("LF-506", what, module)
        else:
            _module(module, nested[0], draft, attentions)


def _module(module: str, roles: Roles, draft: Draft, attentions: set[str]) -> None:
    """A Linear, Conv1D, convolution, embedding or part of an nn.MultiheadAttention."""
    embedding = any(role in roles for role in _EMBEDDING)
    factors = _factors(module, roles, embedding, draft)
    pair = blocks.unfolded(module, *factors, draft) if factors else None
    above = module.rpartition(".")[0]
    outer = above in attentions and module.endswith(".out_proj")
    # out_proj has the rank and alpha of its attention module, whatever a pattern says of its own path.
    scale = draft.scale(above if outer else module, pair[0].shape[0] // pair[2]) if pair else None
    if pair is None or scale is None:
        return
    lora = Lora(pair[0], pair[1], scale[0] * pair[2], scale[1])
    if outer or module in attentions:
        lora = replace(lora, alpha=lora.alpha * attention.OUT_PROJ_TWICE) if outer else lora
        attention.add(module, lora, roles.keys() - set(_LINEAR), outer, draft)
        return
    _add(module, lora, embedding, draft)
    _add_bias(module, roles.get("lora_B.bias"), lora.scale, draft)
    _add_magnitude(module, next((roles[r] for r in _MAGNITUDES if r in roles), None), lora.lora_B.shape[0], draft)


def _factors(module: str, roles: Roles, embedding: bool, draft: Draft) -> tuple[Array, Array] | None:
    """A and B as they are stored, both there and sound."""
    if embedding and any(role in roles for role in (*_LINEAR, "lora_B.bias")):
        draft.say("LF-506", "lora_A/lora_B and lora_embedding_A/lora_embedding_B: which is it?", module)
        return None
    ends = _EMBEDDING if embedding else _LINEAR
    if missing := [role.removesuffix(".weight") for role in ends if role not in roles]:
        what = f"{' and '.join(missing)} is missing: a lone factor says nothing"
        draft.say("LF-303", what, module, "the file is incomplete")
        return None
    a, b = (roles[role] for role in ends)
    sound = draft.sound(module, {"lora_A": a, "lora_B": b}, (2,) if embedding else None)
    return (a, b) if sound else None


def _add(module: str, lora: Lora, embedding: bool, draft: Draft) -> None:
    a, b = lora.lora_A, lora.lora_B
    if embedding:
        place = Placement((a.shape[1], b.shape[0]), out=(1,), in_=(0,))
        draft.add(f"{module}.weight", lora, place, op="embedding", assumed=("name",))
    elif a.ndim == 2 and b.ndim == 2:
        draft.add(f"{module}.weight", lora, assumed=("name",))
    elif b.ndim != a.ndim or any(n != 1 for n in b.shape[2:]):
        what = f"lora_B {list(b.shape)} beside lora_A {list(a.shape)} must be [out, r{', 1' * (a.ndim - 2)}]"
        draft.say("LF-309", what, module)
    elif b.shape[1] != a.shape[0]:
        # peft 0.21.2: A is never grouped and B is [out, r / groups, 1, 1]; its own merge raises NotImplementedError
        what = f"lora_B {list(b.shape)} does not take lora_A's rank {a.shape[0]}: a grouped convolution"
        fix = "group 0 of B reads the first rows of A only: no ΔW of the base's shape exists"
        draft.say("LF-504", what, module, fix)
    else:
        place = Placement((b.shape[0], *a.shape[1:]), (0,), tuple(range(1, a.ndim)))
        flat = Lora(a.reshape(a.shape[0], -1), b.reshape(b.shape[:2]), lora.alpha, lora.scale_rule)
        draft.add(f"{module}.weight", flat, place, assumed=("name",))


def _add_bias(module: str, bias: Array | None, scale: float, draft: Draft) -> None:
    if bias is not None and draft.config and not draft.setting("lora_bias"):
        draft.say("LF-507", "lora_B has a bias, and lora_bias is false: PEFT would not load it", module)
    elif bias is not None and draft.sound(module, {"lora_B.bias": bias}, (1,)):
        draft.add(f"{module}.bias", Delta(bias, scale), assumed=("name",))


def _add_magnitude(module: str, magnitude: Array | None, out: int, draft: Draft) -> None:
    """Kept axes: the out axes; of a convolution PEFT stores [1, out, 1, …], of all others [out]."""
    if draft.config and (magnitude is not None) != bool(draft.setting("use_dora")):
        what = "a magnitude, and use_dora is false" if magnitude is not None else "no magnitude, and use_dora is true"
        draft.say("LF-507", f"the module has {what}", module)
    elif magnitude is not None and draft.sound(module, {"lora_magnitude_vector": magnitude}, (1, 3, 4, 5)):
        sizes = list(magnitude.shape)
        if magnitude.size != out or (len(sizes) > 1 and sizes[1] != out):
            draft.say("LF-404", f"the magnitude is {sizes}; the module has {out} outputs", module)
        else:
            draft.add(f"{module}.weight", Magnitude(magnitude.reshape(-1)), assumed=("name",))
