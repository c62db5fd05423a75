"""Doubt: a part in which a target was not found may have it all the same, under no name or under another one.

It has not, if its file's name says so, or if all its weights were compared with the target's by their values. Else
every weight that could be the target must have a name, and a name that is another target's, or like no target's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import onnx

from loraformat.errors import Problem
from loraformat.resolve import Hints, Resolution
from loraformat_converters.onnx.base import OnnxBase
from loraformat_converters.onnx.finding.fingerprint import own_sketch
from loraformat_converters.onnx.finding.names import RUNGS, modules_of, parameter_of
from loraformat_converters.onnx.finding.part import Part
from loraformat_converters.onnx.graph.index import Site
from loraformat_converters.onnx.graph.scopes import STANDARD

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["Doubts", "Model"]

_FIX = "--base CHECKPOINT tells by the values, and so do sketches (loraformat bind)"
_INDICES = frozenset({onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL})


@dataclass(frozen=True)
class Model:
    """One file: its path in the folder, what it holds, and what its name says among the parts of its model."""

    file: str
    base: OnnxBase
    part: Part | None


class Doubts:
    """What may be in one part of a model though it was not found there."""

    def __init__(self, model: Model, found: Resolution, adapter: Adapter, hints: Hints) -> None:
        self.model, self.found, self.adapter, self.hints = model, found, adapter, hints
        self.sites = model.base.index.sites

    def of(self, key: str) -> Problem | None:
        """LF-603 with what may be the target; None where the part has it not."""
        part = self.model.part
        if part is None or part.holds(key) is False:
            return None
        if self.packed:
            what = f"{self.model.file} has {len(self.packed)} packed weights without a module's name, such as {self.packed[0]}"
            return Problem("LF-603", what, key, "name what is meant, or use the part as it was before quantisation")
        if own_sketch(self.adapter[key]) is not None or key in self._compared:
            return None
        for names in self.names:
            if other := part.doubt(key, list(self.adapter), names, self.taken):
                what = f"{self.model.file} has {other}: whether that is the target, its name does not say"
                return Problem("LF-603", what, key, f'if it is: --names map.json with {{"{key}": "{other}"}}')
        shape = self.adapter[key].matrix_shape()
        alike = [site for site in self.nameless if shape and self.model.base.values.shape(site) == shape]
        if not alike:
            return None
        what = f"{self.model.file} has {len(alike)} weights of its shape without a module's name: it may be one of them"
        return Problem("LF-603", what, key, _FIX)

    @cached_property
    def names(self) -> list[set[str]]:
        """What the part calls its parameters, by each witness."""
        return [{name for site in self.sites if (name := parameter_of(site, rung))} for rung in RUNGS]

    @cached_property
    def taken(self) -> set[str]:
        """The names of what was found."""
        sites = [match.handle for places in self.found.targets.values() for match in places]
        return {name for site in sites for rung in RUNGS if (name := parameter_of(site, rung))}

    @cached_property
    def nameless(self) -> list[Site]:
        """Sites of which nothing says the module; ``onnx::MatMul_12`` and ``val_3`` are no names."""
        return [s for s in self.sites if not modules_of(s) and not s.root_name.endswith(f".{s.parameter}")]

    @cached_property
    def packed(self) -> list[str]:
        """Nameless weights that cannot be compared by their values: packed by a quantiser or a fusion."""
        unread = (site for site in self.nameless if self.model.base.values.shape(site) is None)
        found = [s.root_name for s in unread if s.root.data_type not in _INDICES]
        fused = (s for s in self.nameless if s.refusal and s.node.domain not in STANDARD)
        return list(dict.fromkeys([*found, *(s.root_name for s in fused)]))

    @cached_property
    def _compared(self) -> set[str]:
        """The targets that ``--base`` has: they were looked for by their values."""
        return set(self.hints.base.resolve(self.adapter, Hints()).targets) if self.hints.base else set()
