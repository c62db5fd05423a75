"""What names say of a target: the user's map, the exporter's metadata, the stored tensors' and the nodes' own names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraformat.errors import LoraFormatError, fault
from loraformat.huggingface import is_embedding
from loraformat.names import nearest
from loraformat.naming.spaces import TORCH
from loraformat.resolve import Hints
from loraformat_converters.onnx.finding.align import Alignment, align, under
from loraformat_converters.onnx.finding.names import MODULES, RUNGS, modules_of, own_copy, parameter_of, second_reading
from loraformat_converters.onnx.finding.part import Part
from loraformat_converters.onnx.finding.paths import PRODUCTS, stored_paths, told_by_biases
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.site import Order

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["Names", "Witness", "map_stub"]

_GATES = re.compile(r"\bbias_[ih]h_l\d+(_reverse)?$")
"""What torch calls the biases of an LSTM, a GRU or an RNN."""


@dataclass(frozen=True)
class Witness:
    """What one rung says about one target: in words, and the sites that it means.

    ``by`` the user, where he said it; ``rule`` says how the graph's names differ from the adapter's; ``cosine`` how
    sure a sketch is, ``rows`` which rows of the matrix it means, where that holds several parameters, ``order`` in which
    the target's stand there, where that is in doubt.
    """

    rung: str
    name: str
    sites: tuple[Site, ...]
    by: str = ""
    rule: str = ""
    cosine: float = 1.0
    rows: tuple[int, int] | None = None
    order: Order = None

    def __str__(self) -> str:
        return f"{self.by or self.rung}: {self.name}"


class Names:
    """The names of a graph, by rung, and which of them the adapter's targets are."""

    def __init__(self, index: Index, adapter: Adapter, hints: Hints, part: Part | None = None) -> None:
        self.index, self.hints = index, hints
        self.told = told_by_biases(index)
        self.tables = {rung: _table(index.sites, rung) for rung in RUNGS}
        self.tables["bias"] = _table(index.sites, "bias", lambda site, _: self.told.get(site.number))
        self.copies = {key: site for site in index.sites if (key := own_copy(site.root_name))}
        spoken = adapter.names == TORCH  # in another name space the same words may mean something else
        self.aligned = {
            rung: _aligned(adapter, table, part) if spoken else Alignment() for rung, table in self.tables.items()
        }
        if spoken:
            self._read_again(adapter, lambda table: _aligned(adapter, table, part))
        known = {a.prefix for a in self.aligned.values() if a.prefix is not None}
        if len(known) == 1 and part is None:  # a model that lies under a prefix does so for every witness
            (prefix,) = known
            for rung, silent in self.aligned.items():
                if silent.prefix is None:
                    self.aligned[rung] = under(prefix, adapter, self.tables[rung])
            self._read_again(adapter, lambda table: under(prefix, adapter, table))

    def _read_again(self, adapter: Adapter, aligned: Callable[[Mapping[str, Sequence[Site]]], Alignment]) -> None:
        """Take the nodes' names in their second reading too, and as stored biases complete them, where more targets are found so."""
        first, once = self.aligned["node_name"], self.tables["node_name"]
        if len(first.names) == len(adapter) or first.rivals:
            return
        whole = stored_paths(self.index)
        completed = _table(self.index.sites, "node_name", lambda site, _: whole.get(site.number))
        more = {**_table(self.index.sites, "node_name", second_reading), **once, **completed}
        found = aligned(more) if len(more) > len(once) else first
        if len(found.names) > len(first.names):
            self.tables["node_name"], self.aligned["node_name"] = more, found

    def of(self, key: str, *, embedding: bool) -> list[Witness]:
        """What each witness says; nothing where none speaks."""
        said = self._by_user(key)
        for rung in self.tables:
            name = self.aligned[rung].names.get(key)
            if name is not None:
                said.append(self._witness(rung, name, rule=self.aligned[rung].rule))
        kept = _of_kind(said, embedding)
        return [] if not embedding and self._of_head(key, kept) else kept

    def _of_head(self, key: str, said: Sequence[Witness]) -> Site | None:
        """A product that has lost its name, where only a look-up goes by that of the target, and shares its size.

        Dynamo (torch 2.13) calls a tied tensor after the last of its modules, the head, and folds the head's own into another.
        """
        if is_embedding(key) or any(w.rung != "initializer" or w.by for w in said):
            return None
        tables = [site for witness in said for site in witness.sites]
        sizes = {site.placement.matrix_shape[::-1] for site in tables if site.looks_up}
        if not sizes or not all(site.looks_up for site in tables):
            return None
        return next((s for s in self.index.sites if s.placement.matrix_shape in sizes and self._nameless(s)), None)

    def _nameless(self, site: Site) -> bool:
        named = modules_of(site) or site.root_name.endswith(f".{site.parameter}") or site.number in self.told
        return site.like in PRODUCTS and not named

    def own(self, key: str) -> list[Witness]:
        """The copy that an earlier merge made for a target is its weight, whatever else goes by the old name or looks like it."""
        site = self.copies.get(key)
        sites = self.index.uses(site.root_name) if site else []
        return [Witness("initializer", key, tuple(sites))] if sites else []

    def silence(self, key: str, seen: str) -> LoraFormatError:
        """Why no witness speaks: LF-603 where names fit in several ways, LF-609 a tie, else LF-602 with the nearest names."""
        for rung in self.tables:
            if rivals := self.aligned[rung].rivals:
                what = f"{rung} fits in {len(rivals)} ways: {', '.join(rivals)}"
                return fault("LF-603", what, where=key, fix=map_stub(key))
        if (name := self.aligned["initializer"].names.get(key)) and (
            head := self._of_head(key, [self._witness("initializer", name)])
        ):
            what = f"only a look-up reads {name}; {head.node.name}, which has its size and no name, may be the target's own"
            fix = f'its values tell: --base CHECKPOINT, or an adapter bound to one (loraformat bind); or --names map.json with {{"{key}": "{head.node.name}"}}'
            return fault("LF-609", what, where=key, fix=fix)
        spoken = ", ".join(f"{len(table)} by {rung}" for rung, table in self.tables.items() if table)
        close = dict.fromkeys(self._shown(r, n) for r, table in self.tables.items() for n in nearest(key, table, 2))
        what = f"no node or weight of the graph goes by this name ({spoken or 'it has no weights'}){seen}"
        if _GATES.search(key) and any(site.node.op_type in ("LSTM", "GRU", "RNN") for site in self.index.sites):
            what = "the operator has the two biases in one tensor, gates in another order: a change of one is not put there"
            fix = "merge it into the checkpoint, then export; or leave it out: loraformat convert --drop replace"
            return fault("LF-602", what, where=key, fix=fix)
        if self.index.compiled:
            what += f"; {len(self.index.compiled)} parts of it are compiled (EPContext): attach before compiling"
        if close:
            fix = f"{map_stub(key)}; or --only for the others, if what the graph gives does not depend on it"
            return fault("LF-602", f"{what}; nearest: {', '.join(close)}", where=key, fix=fix)
        fix = f"{map_stub(key)}; or find it by its values: --base CHECKPOINT, or an adapter bound to one (loraformat bind)"
        return fault("LF-602", f"{what}; nothing is like it", where=key, fix=fix)

    def _by_user(self, key: str) -> list[Witness]:
        """What the user named: a node, or what any rung calls a tensor or module; an error if nothing goes by that name."""
        name = self.hints.mapped(key)
        if name is None:
            return []
        nodes = tuple(site for site in self.index.sites if site.node.name == name)
        if nodes:
            return [Witness("node", name, nodes, "user")]
        module = f"{name}.{key.rpartition('.')[2]}"
        # A prefix map tells how names are spelled; only a name stated by itself means every use of a tensor.
        spelled = [(rung, next((n for n in (name, module) if n in self.tables[rung]), None)) for rung in self.tables]
        said = [
            self._witness(rung, found, by="user" if key in self.hints.names else f"user, {rung}")
            for rung, found in spelled
            if found is not None
        ]
        if not said:
            known = [site.node.name for site in self.index.sites] + list(self.tables["initializer"])
            close = ", ".join(nearest(name, known)) or "none"
            what = f"--names says {name}, which no weight or node of the graph is called; nearest: {close}"
            raise fault("LF-602", what, where=key)
        return said

    def _witness(self, rung: str, name: str, *, by: str = "", rule: str = "") -> Witness:
        return Witness(rung, self._shown(rung, name), tuple(self.tables[rung][name]), by, rule)

    @staticmethod
    def _shown(rung: str, name: str) -> str:
        """A module's weight is told as the module, which is what the witness named."""
        return name.removesuffix(".weight") if rung in (*MODULES, "bias") else name


def map_stub(key: str) -> str:
    """What to do about a target that names do not find."""
    return f'say which: --names map.json with {{"{key}": "NODE OR WEIGHT"}}'


def _table(
    sites: Sequence[Site], rung: str, reading: Callable[[Site, str], str | None] = parameter_of
) -> dict[str, list[Site]]:
    """Name → sites."""
    table: dict[str, list[Site]] = {}
    for site in sites:
        if (name := reading(site, rung)) is not None:
            table.setdefault(name, []).append(site)
    return table


def _aligned(adapter: Adapter, table: Mapping[str, Sequence[Site]], part: Part | None) -> Alignment:
    """The rule is that of the weights, which every witness knows; biases and others follow it."""
    if part is not None:
        return part.align(list(adapter), table)
    weights = [key for key in adapter if key.endswith(".weight")]
    found = align(weights or list(adapter), table)
    return found if found.prefix is None else under(found.prefix, adapter, table)


def _of_kind(said: Sequence[Witness], embedding: bool) -> list[Witness]:
    """Without the look-ups where the target multiplies, and the other way round: a tied weight is used by both.

    A tensor's name that is left without a site says nothing, unless nobody else speaks.
    """
    left = []
    for witness in said:
        right = tuple(s for s in witness.sites if s.looks_up == embedding)
        if right or witness.rung != "initializer":
            left.append(replace(witness, sites=right or witness.sites))
    return left or list(said)
