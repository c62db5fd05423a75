"""Every module that litgpt's switches mean, with pairs without any rank for those that an adapter leaves out.

litgpt 0.5.13 lora.py: ``lora_mlp`` adapts all Linears of an MLP, of every expert, and the router; each switch holds for
every layer. ``load_state_dict`` wants all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.errors import LoraFormatError, Problem, fault

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Pairs = dict[str, list[tuple[Array, Array]]]
    """Module → A [r, in] and B [rows, r] of each part of it."""

__all__ = ["completed", "joined"]

_BLOCK = re.compile(r"transformer\.h\.(\d{1,5})\.(.+)")
_MLP = re.compile(r"(mlp\.(?:experts\.(\d{1,5})\.)?)(fc|fc_1|fc_2|proj)")
_GATED, _PLAIN = ("fc_1", "fc_2", "proj"), ("fc", "proj")
_MOST = 2**16  # experts of a layer


def completed(pairs: Pairs, model: Mapping[str, Any], warnings: list[Problem]) -> Pairs:
    """The pairs of all modules.

    Args:
        model: litgpt's model_config, or a config.json.

    Raises:
        LoraFormatError: LF-508 a layer beyond the model's; layers of different shapes; an MLP whose kind is not known.
    """
    blocks = {module: match for module in pairs if (match := _BLOCK.fullmatch(module))}
    if not blocks:
        return pairs
    count = _layers(blocks, model)
    of_layer: Pairs = {}
    for module, match in blocks.items():
        empty = [(a[:0], b[:, :0]) for a, b in pairs[module]]
        known = of_layer.setdefault(match[2], empty)
        if [(a.shape, b.shape) for a, b in known] != [(a.shape, b.shape) for a, b in empty]:
            raise fault("LF-508", f"{match[2]} has other sizes than in another layer: litgpt's are alike", where=module)
    for path, pair in _rest_of_the_mlp(of_layer, model):
        of_layer.setdefault(path, [pair])
    wanted = {f"transformer.h.{n}.{path}": empty for n in range(count) for path, empty in of_layer.items()}
    if missing := sorted(wanted.keys() - pairs.keys()):
        what = f"litgpt adapts {len(missing)} more modules under the same switches: zeros, which change nothing"
        warnings.append(Problem("LF-508", what, missing[0], severity="warning"))
    return {**pairs, **{module: wanted[module] for module in missing}}


def joined(pairs: Pairs, rank: int, warnings: list[Problem]) -> dict[str, Array]:
    """The tensors: the parts of a module one under the other, each of this rank."""
    tensors: dict[str, Array] = {}
    for module, blocks in pairs.items():
        short = sorted({a.shape[0] for a, _ in blocks} - {0, rank})
        if short:
            what = f"the rank {short[0]} is padded with zeros: litgpt has one, {rank}, for all; exact"
            warnings.append(Problem("LF-508", what, module, severity="warning"))
        padded = [(np.pad(a, [(0, rank - len(a)), (0, 0)]), np.pad(b, [(0, 0), (0, rank - len(a))])) for a, b in blocks]
        whole = padded[0] if len(padded) == 1 else [np.concatenate(factors) for factors in zip(*padded, strict=True)]
        tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = whole
    return tensors


def _layers(blocks: Mapping[str, re.Match[str]], model: Mapping[str, Any]) -> int:
    """How many layers the model has; by the adapter, where nothing says it."""
    last = max(int(match[1]) for match in blocks.values())
    stated = next((n for name in ("n_layer", "num_hidden_layers") if type(n := model.get(name)) is int), last + 1)
    if beyond := [module for module, match in blocks.items() if int(match[1]) >= stated]:
        raise LoraFormatError([Problem("LF-508", f"a layer of a model with {stated}", module) for module in beyond])
    return stated if stated <= _MOST else last + 1


def _rest_of_the_mlp(of_layer: Pairs, model: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Array, Array]]]:
    """Path → an empty pair, of every Linear in the MLPs of which some are adapted."""
    found = [(match, of_layer[path][0]) for path in of_layer if (match := _MLP.fullmatch(path))]
    if not found:
        return
    match, pair = found[0]
    wide, narrow = pair[1].shape[0], pair[0].shape[1]
    if match[3] == "proj":
        wide, narrow = narrow, wide
    leaves = _leaves({match[3] for match, _ in found}, model)
    experts = [int(match[2]) for match, _ in found if match[2] is not None]
    stems = ["mlp."]
    if experts:
        total = model.get("n_expert")
        total = total if type(total) is int and max(experts) < total <= _MOST else max(experts) + 1
        stems = [f"mlp.experts.{e}." for e in range(total)]
        yield "mlp.gate", _empty(total, narrow, pair)
    for stem in stems:
        for leaf in leaves:
            yield f"{stem}{leaf}", _empty(*((narrow, wide) if leaf == "proj" else (wide, narrow)), pair)


def _leaves(adapted: set[str], model: Mapping[str, Any]) -> tuple[str, ...]:
    """What the model's MLP is made of. The names of Hugging Face lead here from a gated one alone (``space``)."""
    stated = model.get("mlp_class_name")
    if "fc" in adapted or stated == "GptNeoxMLP":
        return _PLAIN
    if adapted - {"proj"} or stated is not None or "model_type" in model:
        return _GATED
    raise fault("LF-508", "what else the MLP has is not known", fix="keep model_config.yaml beside the source")


def _empty(out: int, in_: int, like: tuple[Array, Array]) -> tuple[Array, Array]:
    return np.zeros((0, in_), like[0].dtype), np.zeros((out, 0), like[1].dtype)
