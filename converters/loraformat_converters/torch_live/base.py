"""A live module as a base: its parameters by name, placed by what their module's class computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from loraformat.axes import Placement
from loraformat.base import Options, Parameter
from loraformat.checkpoint import tied as ties
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.names import nearest
from loraformat.placing import place
from loraformat.plan import Job, Outcome, Plan
from loraformat.resolve import Hints, Match, Resolution
from loraformat_converters.torch_live.tensors import dtype_word, to_numpy

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["ModuleBase", "Place", "axes_of", "is_conv1d"]


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter or buffer: the module that reads it, and the attribute by which it does."""

    module: nn.Module
    leaf: str

    @property
    def stored(self) -> torch.Tensor:
        """The tensor itself, beneath whatever a parametrization makes of it."""
        made = self.parametrizations
        simple = made is not None and made.is_tensor
        tensor: torch.Tensor = made.original if simple else getattr(self.module, self.leaf)
        return tensor

    @property
    def parametrizations(self) -> Any:
        """torch's list of what the parameter is computed by, or None."""
        if not parametrize.is_parametrized(self.module, self.leaf):
            return None
        lists: Any = self.module.parametrizations
        return lists[self.leaf]


class ModuleBase:
    """The parameters and buffers of a module: for ``bind``, ``resolve``, ``verify`` and everything that reads a base.

    Args:
        module: a plain module, or one that a tool has wrapped; or component → module, such as a pipeline's
            ``components``, of which the modules count: their names then begin with ``<component>:``.
        wrappers: components of a path that are a tool's and not the model's own, such as ``base_layer``.
    """

    verbs: frozenset[str] = frozenset()

    def __init__(self, module: nn.Module | Mapping[str, Any], wrappers: Sequence[str] = ()) -> None:
        self.roots: Mapping[str, nn.Module] = {"": module} if isinstance(module, nn.Module) else _components(module)
        self.path = Path(f"({', '.join(type(root).__name__ for root in self.roots.values())})")
        self._wrappers = frozenset(wrappers)
        config: Any = getattr(module, "config", None)  # of a model of transformers
        self.config: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}

    @cached_property
    def places(self) -> dict[str, Place]:
        """Name → place; a module or a tensor that is reached by several paths has a name for each."""
        return {
            f"{component}{name}": place
            for component, root in self.roots.items()
            for path, module in self._modules(root)
            for name, place in _own(path, module)
        }

    def _modules(self, root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for path, module in root.named_modules(remove_duplicate=False):
            words = path.split(".")
            if "parametrizations" not in words and not getattr(module, "loraformat_branches", False):
                yield ".".join(word for word in words if word and word not in self._wrappers), module

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter and buffer that is there."""
        found = {name: place.stored for name, place in self.places.items()}
        return {name: Parameter(name, tuple(t.shape), dtype_word(t.dtype)) for name, t in found.items()}

    def describe(self) -> Mapping[str, Any]:
        """Its class, and how many parameters it has."""
        count = sum(p.numel() for root in self.roots.values() for p in root.parameters())
        return {"kind": "module", "class": str(self.path)[1:-1], "parameters": count}

    def linears(self, hints: Hints) -> Mapping[str, Placement | None]:
        """Every weight of two axes, placed by its module's class or by ``--axes``."""
        found: dict[str, Placement | None] = {}
        for name, at in self.places.items():
            shape = tuple(at.stored.shape)
            if len(shape) == 2 and at.stored.is_floating_point():
                spec = hints.spec(name) or axes_of(at)
                found[name] = Placement.of(shape, spec) if spec else None
        return found

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """The values, a view of the tensor where it lies in this machine's memory."""
        tensor = self.places[name].stored
        return to_numpy(tensor if rows is None else tensor[slice(*rows)])

    def resolve(self, adapter: Adapter, hints: Hints) -> Resolution:
        """By exact name or the user's map; placed by the module's class, which knows what it multiplies by.

        A change of rows is one of every module that shares the tensor, as in a checkpoint; any other is of the one
        module that is named.
        """
        targets: dict[str, tuple[Match, ...]] = {}
        taken: dict[tuple[int, str], str] = {}
        unresolved: list[Problem] = hints.unused(adapter)
        ambiguous: list[Problem] = []
        for key, update in adapter.items():
            name = hints.mapped(key) or key
            rung = f"user: {name}" if hints.mapped(key) else "name: equal"
            try:
                match = self._match(key, update, name, rung, hints)
            except LoraFormatError as error:
                unresolved += error.problems
                continue
            at = self.places[name]
            if (other := taken.setdefault((id(at.module), at.leaf), key)) != key:
                ambiguous.append(Problem("LF-603", f"{name} is meant by {other} too", key))
            moving = ties.moving(update, tuple(at.stored.shape))
            shared = self._partners(name) if moving else []
            matches = (self._match(key, update, n, f"tied: {n} is {name}", hints) for n in shared)
            targets[key] = (match, *(replace(m, parts=moving) for m in matches))
        return Resolution(targets, tuple(unresolved), tuple(ambiguous))

    def _match(self, key: str, update: Update, name: str, rung: str, hints: Hints) -> Match:
        at = self.places.get(name)
        if at is None:
            raise _missing(key, name, update, self.places)
        spec = axes_of(at)
        claims = [(spec, f"class: {type(at.module).__name__}")] if spec and update.matrix_shape() else []
        shape = tuple(at.stored.shape)
        if "replace" in update and update["replace"].replace.shape != shape:
            what = f"the adapter replaces it by {list(update['replace'].replace.shape)}, the module has {list(shape)}"
            fix = "resize the module first: model.resize_token_embeddings(n) of transformers"
            raise fault("LF-606", what, where=key, fix=fix)
        placement, evidence = place(key, update, shape, hints.spec(key), claims)
        return Match("", None, name, placement, (rung, *evidence), handle=at)

    def _partners(self, name: str) -> list[str]:
        """Other modules' names of the very same tensor."""
        at = self.places[name]
        same = {n: p for n, p in self.places.items() if p.stored is at.stored and p.module is not at.module}
        return list({id(place.module): n for n, place in reversed(same.items())}.values())

    def plan(self, verb: str, jobs: Sequence[Job], options: Options) -> Plan:
        """Nothing is written of a module: LF-608."""
        fix = "torch_live.apply puts an adapter on it, beside its weights or merged"
        raise fault("LF-608", f"a live module is no file to {verb} into", where=str(self.path), fix=fix)

    def apply(self, plan: Plan, *, force: bool = False) -> Outcome:
        """As ``plan``."""
        raise fault("LF-608", "a live module is no file", where=str(self.path))


def _components(modules: Mapping[str, Any]) -> Mapping[str, nn.Module]:
    """Prefix of a component's names → its module; what else a pipeline is made of (schedulers, tokenizers) does not count."""
    return {f"{name}:": module for name, module in modules.items() if isinstance(module, nn.Module)}


def _own(path: str, module: nn.Module) -> Iterator[tuple[str, Place]]:
    made: Any = module.parametrizations if parametrize.is_parametrized(module) else ()
    present = (n for group in (module._parameters, module._buffers) for n, t in group.items() if t is not None)
    for leaf in (*made, *present):
        yield f"{path}.{leaf}" if path else leaf, Place(module, leaf)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, whose weight is [in, out]; told without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def axes_of(at: Place) -> str | None:
    """How the module's class lays out a parameter of two or more axes; None where nothing is known of the class."""
    module, leaf, axes = at.module, at.leaf, at.stored.dim()
    if isinstance(module, nn.MultiheadAttention):
        return "out,in" if leaf.endswith("proj_weight") else None
    if leaf != "weight" or axes < 2:
        return None
    if isinstance(module, nn.Linear):
        # loralib 0.1.2 layers.py: fan_in_fan_out transposes the stored weight
        return "in,out" if getattr(module, "fan_in_fan_out", False) else "out,in"
    if is_conv1d(module) or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "in,out"
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        return ",".join(("out", *["in"] * (axes - 1)))
    return None


def _missing(key: str, name: str, update: Update, names: Mapping[str, Any]) -> LoraFormatError:
    close = nearest(name, names)
    if "replace" in update and "add" in update["replace"].allows:
        what = f"the module has no {name}, which the adapter would add: a live module has no place for it"
        return fault("LF-602", what, where=key, fix="build the model with it, or leave it out: only=…")
    what = f"the module has no {name}; nearest: {', '.join(close) or 'none'}"
    fix = f'if it goes by another name there: hints=Hints(names={{"{key}": "{close[0] if close else "NAME"}"}})'
    return fault("LF-602", what, where=key, fix=fix)
