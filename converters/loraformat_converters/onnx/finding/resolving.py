"""Targets → places in one graph: the sites that the witnesses mean, how the update lies there, and what is tied to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.huggingface import is_embedding
from loraformat.naming.spaces import TORCH
from loraformat.resolve import Hints, Match, Resolution
from loraformat.turned import neutral
from loraformat_converters.onnx.finding.ladder import PREFIX, Found, climb
from loraformat_converters.onnx.finding.orient import parameter_of
from loraformat_converters.onnx.finding.part import Part, parts
from loraformat_converters.onnx.finding.tied import moves_along, partners
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.values import Values

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.axes import Placement

__all__ = ["resolved"]

_OF_VALUES = ("fingerprint:", "sketch:")


def resolved(
    path: Path,
    index: Index,
    values: Values,
    adapter: Adapter,
    hints: Hints,
    part: Part | None,
    problems: Sequence[Problem] = (),
) -> Resolution:
    """Where every target lies.

    Args:
        part: where the graph is one of several that are one model, what its file's name says.
        problems: what is wrong already.
    """
    found, unresolved, ambiguous = climb(index, adapter, hints, values, part)
    unresolved = [*problems, *unresolved]
    targets: dict[str, tuple[Match, ...]] = {}
    meant = {site.number for place in found.values() for site in place.sites}
    laid = hints.base.linears(Hints()) if hints.base else {}
    beside = parts(file.name for file in path.parent.glob("*.onnx")).get(path.name) if part is None else None
    for key, place in found.items():
        if beside is not None and (problem := _of_another_file(key, place, beside)):
            ambiguous.append(problem)
            continue
        target = _Target(path.name, key, adapter, place, hints.spec(key) or _spec(adapter, key, laid))
        try:
            targets[key] = tuple(target.match(site) for site in place.sites)
            if moves_along(adapter[key]):
                targets[key] += partners(targets[key][0], index, meant, path.parent)
        except LoraFormatError as error:
            unresolved += error.problems
    return Resolution(targets, tuple(unresolved), tuple(ambiguous))


def _of_another_file(key: str, found: Found, beside: Part) -> Problem | None:
    """LF-603 where names fit without their beginning, and that is what a file beside this one is called after.

    An exported encoder and decoder both call their modules ``block.0`` (optimum-onnx 0.1).
    """
    less = next((said for said in found.evidence if said.startswith(f"{PREFIX} without ")), None)
    known = any(said.startswith((*_OF_VALUES, "user")) for said in found.evidence)
    if less is None or known or beside.holds(key) is not False:
        return None
    what = (
        f"{beside.file} has it {less.removeprefix(f'{PREFIX} ')}, and by its name it is of another file in this folder"
    )
    return Problem("LF-603", what, key, "give that file, or the folder")


def _spec(adapter: Adapter, key: str, laid: Mapping[str, Placement | None]) -> str | None:
    """How ``--base`` says that a matrix lies, where that counts: a whole tensor that the file does not place."""
    place = laid.get(key)
    silent = neutral(adapter[key]) or adapter[key].placement is not None or is_embedding(key)
    return None if place is None or silent else place.spec


@dataclass(frozen=True)
class _Target:
    """One target, what was found of it in a file, and what is said of how its parameter lies."""

    file: str
    key: str
    adapter: Adapter
    found: Found
    spec: str | None

    def match(self, site: Site) -> Match:
        """One use of its weight.

        Raises:
            LoraFormatError: LF-604 … LF-606 its orientation; LF-604 the order of its rows, which no name tells.
        """
        key, found = self.key, self.found
        self._check_order(site)
        evidence = (*found.evidence, f"operator: {site.node.op_type} reads the weight as [{site.placement.spec}]")
        order = found.order or site.permute
        whole = site.refusal or found.rows or order
        parameter = None if whole else parameter_of(key, self.adapter[key], site, self.spec)
        where = (self.file, site.node.name, site.root_name, site.placement)
        said = (evidence, found.confidence, parameter, site)
        return Match(*where, *said, rows=found.rows, permute=order)

    def _check_order(self, site: Site) -> None:
        """Gates are torch's where the names are torch's; what else lies in some order is told by values only."""
        gates = "its gates may lie in another order" if site.permute and self.adapter.names != TORCH else None
        order = site.doubt or gates
        if order and not any(said.startswith(_OF_VALUES) for said in self.found.evidence):
            what = f"{site.node.name}: {order}, and no name says how the target's do"
            fix = "its values tell: --base CHECKPOINT, or an adapter bound to one (loraformat bind)"
            raise fault("LF-604", what, where=self.key, fix=fix)
