"""Megatron-Bridge → Adapter, in Megatron's own names, layer by layer, the rows of each module in its own order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement
from loraformat.errors import LoraFormatError, fault
from loraformat.layout import Reading, ReadOptions
from loraformat.loose import Loose, by_module
from loraformat.parts import Lora, Magnitude
from loraformat.pickled.distributed import Distributed
from loraformat_converters.megatron import NAMES
from loraformat_converters.megatron.ranks import from_halves, from_ranks
from loraformat_converters.megatron.settings import CONFIG, Method, method_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.source import Source

    Array = npt.NDArray[Any]

__all__ = ["read"]

_ENDINGS = {".linear_in.weight": "lora_A", ".linear_out.weight": "lora_B", ".weight_magnitude": "magnitude"}
# The state of a training run beside the model's: moments of the factors, under the factors' own names.
_RUN = re.compile(r"(?:chained_\d+\.)?optimizer\.|rng_state|rerun_state|opt_param_scheduler|common_state")
_MODULE = re.compile(r"(?P<base>.+)\.adapter(?:\.adapter_(?P<part>q|k|v|gate|up))?")
# Megatron-Bridge 0.6.2 peft/canonical_lora.py: what the parts of the two fused modules are called as targets
_PARTS = {"q": "linear_q", "k": "linear_k", "v": "linear_v", "gate": "linear_fc1_gate", "up": "linear_fc1_up"}
_STACKED = re.compile(r"(?P<stack>(?:.+\.)?layers)\.(?P<rest>\D.*)")


def read(source: Source, options: ReadOptions) -> Reading:
    """The adapter.

    Raises:
        LoraFormatError: LF-303 … LF-314 the tensors; LF-501 no distributed checkpoint; LF-503, LF-504 run_config.yaml;
            LF-506 another tensor; LF-507, LF-509 the scale; LF-510 a damaged checkpoint.
    """
    stored = source.tensors
    if not isinstance(stored, Distributed):
        raise fault("LF-501", f"{source.path} is no distributed checkpoint", fix="name the folder of .metadata: iter_…")
    text = source.sidecar(CONFIG)
    method, draft = method_of(text), Loose(options, "Megatron-Bridge")
    names = [name for name in stored if not _RUN.match(name)]
    modules, rest = by_module({name: name for name in names}, _ENDINGS)
    for module, roles in modules.items():
        found = _MODULE.fullmatch(module)
        if found is None:
            rest |= {name: name for name in roles.values()}
            continue
        try:
            ordered = _in_order({role: stored[name] for role, name in roles.items()}, roles, stored, found["part"])
        except LoraFormatError as error:
            draft.problems += error.problems
            continue
        for key, tensors in _layers(_key(found["base"], found["part"]), ordered):
            _add(key, tensors, method, draft)
    for name in rest:
        draft.say("LF-506", "no factor of Megatron-Bridge's; a trained weight beside them has no form here", name)
    extensions = {"megatron": text} if text is not None else {}
    return Reading(draft.finish(str(source.path), names=NAMES, extensions=extensions), draft.warnings)


def _key(base: str, part: str | None) -> str:
    """The module that is adapted: Megatron's, or a part of it by the name that CanonicalLoRA has for it."""
    return base if part is None else f"{base.rpartition('.')[0]}.{_PARTS[part]}"


def _in_order(
    tensors: dict[str, Array], names: Mapping[str, str], stored: Distributed, part: str | None
) -> dict[str, Array]:
    """With the rows of B and of a magnitude as the module has them: see ``ranks``.

    How many ranks there were is how many pieces the rank axis of A was cut into, B being cut twice for each of them
    where gate and up, or halves taken for them, were stored apart.

    Raises:
        LoraFormatError: LF-504 a magnitude that no one weight has.
    """
    a, b = (tensors[role].ndim if role in tensors else 0 for role in ("lora_A", "lora_B"))
    if min(a, b) < 2:
        return tensors  # refused where they are looked at
    if "magnitude" in tensors and stored.cuts(names["lora_A"], a - 1) > 1:
        # Megatron-Bridge 0.6.2 peft/dora_layers.py _get_weight_norm: of a row-parallel Linear, its columns on the rank
        what = "each rank divided by the norms of its own columns, and only the first one's magnitude was saved"
        raise fault("LF-504", what, where=names["magnitude"], fix="train it with tensor_model_parallel_size 1")
    ranks, cuts = stored.cuts(names["lora_A"], a - 2), stored.cuts(names["lora_B"], b - 2)
    if ranks < 2 or cuts != 2 * ranks:
        return tensors
    ordered = dict(tensors)
    if part in ("gate", "up"):
        ordered["lora_B"] = _along(-2, tensors["lora_B"], ranks, from_halves)
    if "magnitude" in tensors:
        ordered["magnitude"] = _along(-1, tensors["magnitude"], ranks, from_ranks)
    return ordered


def _along(axis: int, tensor: Array, ranks: int, order: Any) -> Array:
    import numpy as np

    return np.moveaxis(order(np.moveaxis(tensor, axis, 0), ranks), 0, axis)


def _layers(module: str, tensors: Mapping[str, Array]) -> Iterator[tuple[str, Mapping[str, Array]]]:
    """(module, its tensors) of each layer, where they lie one over the other."""
    match = _STACKED.fullmatch(module)
    counts = {tensor.shape[:1] for tensor in tensors.values()}
    if match is None or len(counts) > 1 or counts == {()}:
        yield module, tensors
        return
    for i in range(counts.pop()[0]):
        yield f"{match['stack']}.{i}.{match['rest']}", {role: tensor[i] for role, tensor in tensors.items()}


def _add(module: str, tensors: Mapping[str, Array], method: Method | None, draft: Loose) -> None:
    """One pair, with its magnitude; of all experts of a layer where its tensors have an axis of them."""
    stack = int(".experts." in module)
    axes = {"lora_A": 2 + stack, "lora_B": 2 + stack} | ({"magnitude": 1} if "magnitude" in tensors else {})
    if not draft.sound(module, tensors, axes):
        return
    a, b = tensors["lora_A"], tensors["lora_B"]
    draft.rule = "alpha/r"
    if method is not None:
        draft.rank = method.expert_dim if stack else method.dim
        draft.alpha = a.shape[-2] if method.alpha is None else method.alpha
    if (scale := draft.scale(module, a.shape[-2])) is None:
        return
    # The weight of every Linear of Megatron-Core is [out, in]; those of experts are stored one over the other.
    place = Placement((*b.shape[:-1], a.shape[-1]), (stack,), (stack + 1,), tuple(range(stack)))
    draft.add(f"{module}.weight", Lora(a, b, *scale), place)
    if "magnitude" in tensors:
        draft.add(f"{module}.weight", Magnitude(tensors["magnitude"]))
