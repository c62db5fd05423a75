"""diffusers → Adapter: every tensor understood, every scale stated by the header, by alphas, or by the tool's own rule."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.adapter import Adapter
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import Reading, ReadOptions
from loraformat.names import join
from loraformat_converters.diffusers import metadata
from loraformat_converters.diffusers.spelling import COMPONENTS, Name, is_text, numbered, parse
from loraformat_converters.peft import config as configs
from loraformat_converters.peft.read import read_tensors

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.source import Source
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["read"]


@dataclass
class _Component:
    """What a file holds of one model.

    Attributes:
        tensors: under PEFT's names.
        spellings: module → how its factors are spelt.
    """

    tensors: dict[str, Array] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    spellings: dict[str, str] = field(default_factory=dict)


def read(source: Source, options: ReadOptions) -> Reading:
    """The adapter in a file of diffusers; of a pipeline with its components, of a single model without.

    Raises:
        LoraFormatError: LF-503 … LF-509 see ``loraformat.rules``; LF-3xx the tensors do not fit each other.
    """
    found = _sorted(source.tensors)
    said = source.header.get(metadata.KEY)
    stated, warnings = metadata.parse(said, found) if said is not None else ({}, [])
    targets: dict[str, Update] = {}
    problems: list[Problem] = []
    for component, own in found.items():
        warnings += _skipped(component, own)
        where = f"{component} of {source.path}" if component else str(source.path)
        try:
            config, more = _config(own, stated.get(component), said is not None, options, where)
            reading = read_tensors(own.tensors, config, options, where)
        except LoraFormatError as error:
            problems += [replace(p, where=_within(component, p.where)) for p in error.problems]
            continue
        warnings += [*more, *(replace(p, where=_within(component, p.where)) for p in reading.warnings)]
        targets |= {join(component, key): update for key, update in reading.adapter.items()}
    if problems:
        raise LoraFormatError(problems)
    components = tuple(sorted(c for c in found if c is not None))
    extensions = {"diffusers": _kept(said, found)}
    ordered = {key: targets[key] for key in sorted(targets)}
    return Reading(Adapter(ordered, "torch", components, extensions=extensions), warnings)


def _sorted(tensors: Mapping[str, Array]) -> dict[str | None, _Component]:
    """The tensors by component, under PEFT's names; LF-504, LF-506 for those that are not understood."""
    if numbered(tensors):
        what = "cloneofsimo/lora numbers the modules, in an order that only its code and the model it ran on give"
        raise fault("LF-504", what, fix="have its own tool merge it into a checkpoint")
    bare = not any(name.partition(".")[0] in COMPONENTS for name in tensors)
    found: dict[str | None, _Component] = {}
    problems: list[Problem] = []
    for key in tensors:
        name = parse(key, bare=bare)
        if isinstance(name, Problem):
            problems.append(name)
            continue
        own = found.setdefault(name.component, _Component())
        tensor = tensors[key]
        if name.role == "alpha":
            _alpha(name, key, tensor, own, problems)
        elif own.tensors.setdefault(f"{name.module}.{name.role}", tensor) is not tensor:
            problems.append(Problem("LF-506", f"{name.role} of {name.module} stands twice, in two spellings", key))
        if name.spelling:
            own.spellings[name.module] = name.spelling
    if problems:
        raise LoraFormatError(problems)
    if not found:
        raise LoraFormatError(Problem("LF-304", "no adapter's tensor in the file: it would change nothing"))
    return found


def _alpha(name: Name, key: str, tensor: Array, own: _Component, problems: list[Problem]) -> None:
    single = tensor.size == 1 and tensor.dtype != np.bool_
    value = float(np.asarray(tensor, np.float64).reshape(-1)[0]) if single else np.nan
    if np.isfinite(value):
        own.alphas[name.module] = value
    else:
        problems.append(Problem("LF-306", f"alpha is one finite number, not {tensor.dtype} {list(tensor.shape)}", key))


def _config(
    own: _Component, stated: configs.Config | None, headed: bool, options: ReadOptions, where: str
) -> tuple[configs.Config | None, list[Problem]]:
    """What says the scale of a component's modules; None where the user says it.

    diffusers 0.42.1 utils/peft_utils.py (get_peft_kwargs): without a header and alphas, alpha is each module's rank.
    """
    ranks = {  # of what is no matrix the reader of the tensors says so
        name.removesuffix(".lora_A.weight"): (tensor.shape or (1,))[0] or 1
        for name, tensor in own.tensors.items()
        if name.endswith(".lora_A.weight")
    }
    if stated is not None:
        _check_alphas(own, stated)
        return stated, []
    fix = "state it: --alpha A --scale-rule alpha/r"
    if own.alphas and own.alphas.keys() != ranks.keys():
        odd = sorted(own.alphas.keys() ^ ranks.keys())
        what = "other modules have an alpha, and this one none" if odd[0] in ranks else "an alpha of no factors"
        raise LoraFormatError([Problem("LF-509", what, module, fix) for module in odd])
    if not own.alphas and (options.alpha is not None or options.scale_rule is not None or not ranks):
        return None, []
    if not own.alphas and headed:
        what = f"the header has {metadata.KEY}, and says nothing of this component"
        raise LoraFormatError(Problem("LF-509", what, where, fix))
    magnitudes, biased = (
        any(word in name for name in own.tensors) for word in ("lora_magnitude_vector", "lora_B.bias")
    )
    config = metadata.of_tensors(ranks, own.alphas, dora=magnitudes, biased=biased)
    if own.alphas:
        return config, []
    what = "no scale is stored: taken as 1, as diffusers does; one trained with alpha other than its rank is lost"
    return config, [Problem("LF-509", what, where, "if the training had another: --alpha A", "warning")]


def _skipped(component: str | None, own: _Component) -> list[Problem]:
    """What of two spellings in one model diffusers itself does not load.

    diffusers 0.42.1 loaders/peft.py (load_lora_adapter) converts all names or, where the first is PEFT's, none.
    """
    others = sorted(module for module, spelling in own.spellings.items() if spelling != "peft")
    if is_text(component) or not others or len(others) == len(own.spellings):
        return []
    what = f"spelt otherwise than its first tensor: diffusers may skip {len(others)} such modules; here they count"
    return [Problem("LF-506", what, _within(component, others[0]), "written again, all are spelt alike", "warning")]


def _check_alphas(own: _Component, stated: configs.Config) -> None:
    """LF-507 where a module's ``.alpha`` and the header differ."""
    pairs = ((module, alpha, stated.alpha(module)) for module, alpha in own.alphas.items())
    problems = [
        Problem("LF-507", f"its alpha is {alpha:g}, and {told} by {metadata.KEY}", module)
        for module, alpha, told in pairs
        if alpha != told
    ]
    if problems:
        raise LoraFormatError(problems)


def _within(component: str | None, where: str) -> str:
    return f"{component}: {where}" if component else where


def _kept(said: str | None, found: Mapping[str | None, _Component]) -> str:
    """The header's text, and how the names are spelt: one word a component, or one a module where they differ."""
    spelt: dict[str, Any] = {}
    for component, own in found.items():
        kinds = set(own.spellings.values())
        spelt[component or ""] = kinds.pop() if len(kinds) == 1 else own.spellings
    kept: dict[str, Any] = {"spelling": spelt}
    if said is not None:
        kept[metadata.KEY] = said
    return json.dumps(kept, sort_keys=True)
