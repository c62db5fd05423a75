"""PEFT → Adapter: every tensor understood, every rank and alpha checked against the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.errors import Problem
from loraformat.faults import brief
from loraformat.layout import Reading, ReadOptions
from loraformat_converters.peft import adalora, lora, lycoris, names, ties, trained, vera
from loraformat_converters.peft import config as configs
from loraformat_converters.peft.draft import Draft
from loraformat_converters.peft.names import Name

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.source import Source

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["read", "read_tensors"]

_ROLES: Mapping[str, frozenset[str]] = {
    "LORA": lora.ROLES,
    "ADALORA": adalora.ROLES,
    "LOHA": lycoris.LOHA_ROLES,
    "LOKR": lycoris.LOKR_ROLES,
    "VERA": vera.ROLES,
    "TRAINABLE_TOKENS": frozenset(),
}


def read(source: Source, options: ReadOptions) -> Reading:
    """The adapter in a PEFT folder, or in a bare file where the options state the scale.

    Raises:
        LoraFormatError: LF-3xx the tensors do not fit each other; LF-503 … LF-509 see ``loraformat.rules``.
    """
    text = source.sidecar(configs.FILE)
    config, warnings = configs.parse(text) if text is not None else (None, [])
    reading = read_tensors(source.tensors, config, options, str(source.path))
    return Reading(reading.adapter, [*warnings, *reading.warnings])


def read_tensors(
    tensors: Mapping[str, Array],
    config: configs.Config | None,
    options: ReadOptions,
    where: str,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Reading:
    """The adapter that these tensors are under this configuration; ``shapes`` are known without a base."""
    draft = Draft(config, options)
    if shapes is not None:
        draft.shapes = shapes
    method = config.method if config else "LORA"
    found = _sorted(tensors, method, draft)
    match method:
        case "LORA":
            lora.read(found.factors, draft)
        case "ADALORA":
            adalora.read(found.factors, draft)
        case "LOHA":
            lycoris.read_loha(found.factors, draft)
        case "LOKR":
            lycoris.read_lokr(found.factors, draft)
        case "VERA":
            vera.read(found.factors, found.shared, draft)
    _warn_of_left_out(found, draft)
    trained.read_parameters(found.parameters, draft)
    trained.read_tokens(found.tokens, draft)
    return Reading(draft.finish(where), draft.warnings)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The tensors of a file by what their names say they are."""

    factors: dict[Name, Roles] = field(default_factory=dict)
    tokens: dict[Name, Roles] = field(default_factory=dict)
    parameters: dict[Name, Array] = field(default_factory=dict)
    shared: Roles = field(default_factory=dict)


def _sorted(tensors: Mapping[str, Array], method: str, draft: Draft) -> _Tensors:
    """Every tensor in its place; a name that has none is a problem of the draft."""
    found = _Tensors()
    prefix = names.prefix_of(tensors)
    for key in tensors:
        if key in names.PROJECTIONS and method == "VERA":
            found.shared[key] = tensors[key]
            continue
        if _byproduct(key, tensors, draft):
            continue
        name = names.parse(key, prefix)
        if isinstance(name, Problem):
            draft.problems.append(name)
        elif name.role is None:
            found.parameters[name] = tensors[key]
        elif name.role == "trainable_tokens_delta":
            found.tokens.setdefault(replace(name, role=None), {})[name.role] = tensors[key]
        elif name.role in _ROLES[method]:
            found.factors.setdefault(replace(name, role=None), {})[name.role] = tensors[key]
        else:
            draft.say("LF-506", f"{name.role} is no tensor of a {method} adapter", key)
    return found


def _warn_of_left_out(found: _Tensors, draft: Draft) -> None:
    """LF-507 of factors that PEFT would not load: it makes the modules that the configuration chooses, and no other.

    peft 0.21.2 tells what such modules miss, and nothing of tensors that it has no place for.
    """
    chosen = draft.setting("target_modules")
    if draft.setting("target_parameters"):  # whose modules nothing else chooses
        return
    factors = {name.module: roles for name, roles in found.factors.items()}
    if lost := configs.left_out(chosen, factors.keys() - ties.followers(draft.config, factors)):
        more = f", nor {len(lost) - 1} other modules" if len(lost) > 1 else ""
        what = f"target_modules, {brief(chosen)}, does not choose it{more}: PEFT loads the adapter without it"
        draft.warn("LF-507", what, lost[0], "is this the configuration of these tensors?")


def _byproduct(key: str, tensors: Mapping[str, Array], draft: Draft) -> bool:
    """Whether it is a bias inside the wrapper of a saved module, which the file has by its own name too.

    peft 0.21.2 save_and_load.py: with bias="all" every name that holds "bias" is taken, whatever it is the name of.
    """
    own = names.unwrapped(key)
    if own == key or own not in tensors or draft.setting("bias") != "all":
        return False
    if ".original_module." not in key and not np.array_equal(tensors[key], tensors[own]):
        draft.say("LF-507", f"the file has another {own}, for the same bias", key)
    return True
