"""LoRA and what is exactly one: Linear, Conv1D, convolutions, embeddings, nn.MultiheadAttention, blocks; with DoRA.

- ``lora_A.weight`` [r, in] and ``lora_B.weight`` [out, r]; a convolution has A [r, in, *kernel] and B [out, r, 1, …];
  an embedding ``lora_embedding_A`` [r, vocab] and ``lora_embedding_B`` [dim, r].
- Linear and Conv1D look the same on disk, and ``fan_in_fan_out`` proves nothing: both are read unplaced.
- ``lora_magnitude_vector`` (DoRA) has a value for each output: [out], [1, out, 1, …] of a convolution, [dim].
- ``lora_B.bias`` [out] (lora_bias) is multiplied by the scale and added to the module's own bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement
from loraformat.parts import Delta, Lora, Magnitude
from loraformat.scale import scale_of
from loraformat_converters.peft import blocks, experts

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat_converters.peft.draft import Draft
    from loraformat_converters.peft.names import Name

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["OUT_PROJ_TWICE", "ROLES", "read"]

_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")

ROLES = frozenset({*_LINEAR, *_EMBEDDING, "lora_B.bias", *_MAGNITUDES})

# NOTE: PEFT's MultiheadAttention merges out_proj's ΔW itself and then calls ``out_proj.merge``, which adds it once
# more; its forward pass merges and unmerges in the same way (peft 0.21.2 tuners/lora/layer.py 2085-2089, 2223). So
# training, inference and merging all see W + 2·s·BA: that is what these tensors mean.
OUT_PROJ_TWICE = 2.0


def read(found: Mapping[Name, Roles], draft: Draft) -> None:
    """Every adapted module and expert parameter of ``found``, as parts of ``draft``."""
    ordered = sorted(found, key=lambda name: (name.module, name.depth))
    modules = {m: {n.depth: found[n] for n in places} for m, places in itertools.groupby(ordered, lambda n: n.module)}
    parameters = {module: experts.parameters(module, nested, draft) for module, nested in modules.items()}
    attention = {m for name in found if (m := _attention(name)) in modules and not parameters[m]}
    for module, nested in modules.items():
        if parameters[module]:
            experts.read(module, parameters[module], nested, draft)
        elif len(nested) > 1 or max(nested):
            what = "factors of several parameters of one module, and no target_parameters names them"
            draft.say("LF-506", what, module)
        else:
            _module(module, nested[0], draft, attention)


def _attention(name: Name) -> str:
    """The path of the nn.MultiheadAttention whose output projection this is; empty if it is none."""
    above, _, last = name.module.rpartition(".")
    return above if last == "out_proj" and name.wrappers == ("base_layer",) and not name.depth else ""


def _module(module: str, roles: Roles, draft: Draft, attention: set[str]) -> None:
    """A Linear, Conv1D, convolution, embedding or part of an nn.MultiheadAttention."""
    embedding = any(role in roles for role in _EMBEDDING)
    if embedding and any(role in roles for role in (*_LINEAR, "lora_B.bias")):
        draft.say("LF-506", "lora_A/lora_B and lora_embedding_A/lora_embedding_B: which is it?", module)
        return
    ends = _EMBEDDING if embedding else _LINEAR
    for role in ends:
        if role not in roles:
            what = f"{role.removesuffix('.weight')} is missing: a lone factor says nothing"
            draft.say("LF-303", what, module, "the file is incomplete")
    if not all(role in roles for role in ends):
        return
    a, b = (roles[role] for role in ends)
    if not draft.sound(module, {"lora_A": a, "lora_B": b}, (2,) if embedding else None):
        return
    above = module.rpartition(".")[0]
    projects_out = above in attention and module.endswith(".out_proj")
    pair = blocks.unfolded(module, a, b, draft)
    # out_proj has the rank and alpha of its attention module, whatever a pattern says of its own path.
    scale = draft.scale(above if projects_out else module, a.shape[0] // pair[2]) if pair else None
    if pair is None or scale is None:
        return
    a, b, folds = pair
    alpha, rule = scale[0] * folds, scale[1]
    if projects_out or module in attention:
        if set(roles) - set(_LINEAR):
            what = "a bias or a magnitude in an nn.MultiheadAttention: peft 0.21.2 knows neither there"
            draft.say("LF-504", what, module)
            return
        place = Placement((b.shape[0], a.shape[1]), (0,), (1,))  # torch's own module multiplies by both from the right
        if projects_out:
            draft.add(f"{module}.weight", Lora(a, b, alpha * OUT_PROJ_TWICE, rule), place)
        else:
            draft.add(f"{module}.in_proj_weight", Lora(a, b, alpha, rule), place)
        return
    _add(module, Lora(a, b, alpha, rule), embedding, draft)
    _add_bias(module, roles.get("lora_B.bias"), scale_of(alpha, rule, a.shape[0]), draft)
    _add_magnitude(module, next((roles[r] for r in _MAGNITUDES if r in roles), None), b.shape[0], draft)


def _add(module: str, lora: Lora, embedding: bool, draft: Draft) -> None:
    a, b = lora.lora_A, lora.lora_B
    if embedding:
        place = Placement((a.shape[1], b.shape[0]), out=(1,), in_=(0,))
        draft.add(f"{module}.weight", lora, place, op="embedding", assumed=True)
    elif a.ndim == 2 and b.ndim == 2:
        draft.add(f"{module}.weight", lora, assumed=True)
    elif b.ndim != a.ndim or any(n != 1 for n in b.shape[2:]):
        what = f"lora_B {list(b.shape)} beside lora_A {list(a.shape)} must be [out, r{', 1' * (a.ndim - 2)}]"
        draft.say("LF-309", what, module)
    elif b.shape[1] != a.shape[0]:
        # peft 0.21.2: A is never grouped and B is [out, r / groups, 1, 1]; its own merge raises NotImplementedError
        what = f"lora_B {list(b.shape)} does not take lora_A's rank {a.shape[0]}: a grouped convolution"
        draft.say(
            "LF-504", what, module, "group 0 of B reads the first rows of A only: no ΔW of the base's shape exists"
        )
    else:
        place = Placement((b.shape[0], *a.shape[1:]), (0,), tuple(range(1, a.ndim)))
        flat = Lora(a.reshape(a.shape[0], -1), b.reshape(b.shape[:2]), lora.alpha, lora.scale_rule)
        draft.add(f"{module}.weight", flat, place, assumed=True)


def _add_bias(module: str, bias: Array | None, scale: float, draft: Draft) -> None:
    if draft.config and (bias is not None) != bool(draft.setting("lora_bias")) and bias is not None:
        draft.say("LF-507", "lora_B has a bias, and lora_bias is false: PEFT would not load it", module)
    elif bias is not None and draft.sound(module, {"lora_B.bias": bias}, (1,)):
        draft.add(f"{module}.bias", Delta(bias, scale), assumed=True)


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
            draft.add(f"{module}.weight", Magnitude(magnitude.reshape(-1)), assumed=True)
