"""Attach: the change beside a weight that is not touched.

The adapter's tensors are stored as it has them. Transposing, scaling and casting are constant subgraphs that ONNX
Runtime folds when it loads the model, so that attaching writes only the adapter, and nothing is lost.

    x ──┬── MatMul(W) ── Add(bias) ───────────────────── lora/T/base ──┐
        └── MatMul(Aᵀ) ── MatMul((s·B)ᵀ) ── lora/T/change ──────────── Add ── y

What is no plain pair changes the weight instead, in a constant subgraph between W and its operator (``weight``). Pairs
can do so too, in two ways: *folded*, which costs nothing at run time and holds W + ΔW in memory, and *concat*, where B
stands below W (``widen``).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from loraformat_converters.onnx.attaching import magnitude
from loraformat_converters.onnx.attaching.beside import Own, constants, groups
from loraformat_converters.onnx.attaching.branches import FORMS, Form, Pair, unchanged
from loraformat_converters.onnx.attaching.ends import Ends
from loraformat_converters.onnx.attaching.factors import Factors, factors, owners
from loraformat_converters.onnx.attaching.magnitude import Rescaling
from loraformat_converters.onnx.attaching.topology import Place, Topology, place_of
from loraformat_converters.onnx.attaching.weight import Weight
from loraformat_converters.onnx.attaching.widen import together, widen
from loraformat_converters.onnx.changing.spots import Change, Spot
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.nodes import Editor, Nodes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Attachment"]

_FLOAT = onnx.TensorProto.FLOAT


class Attachment:
    """Adapters being attached to one graph. Nodes are collected and laid into it by ``finish``.

    Attributes:
        stems: (job, key) → below what the adapter's tensors and our nodes are named.
        shared: below what the nodes are named that are nobody's own.
    """

    mode = "branch"

    def __init__(
        self,
        index: Index,
        folder: Path,
        *,
        prefold: bool = False,
        live: Sequence[str] = (),
        topology: Topology = "separate",
    ) -> None:
        self.index, self.folder, self.prefold, self.topology = index, folder, prefold, topology
        self.editor = Editor(index)
        self.ends = Ends(index, self.editor)
        self.stems: dict[tuple[int, str], str] = {}
        self.shared: list[str] = []
        self.live = self._inputs(live)

    def add(self, spots: Sequence[Spot]) -> None:
        """Every change of every weight, at each of its uses."""
        places: dict[Place, list[Spot]] = {"weight": [], "product": [], "beside": []}
        for spot in spots:
            places[place_of(spot, self.topology)].append(spot)
        for spot in places["weight"]:
            self._folded(spot) if self.prefold else self._weights(spot)
        for group in together(places["product"]):
            self._widened(group)
        for spot in places["beside"]:  # last: a branch under a magnitude reads the bias, which may have changed
            for numbers in groups(spot):
                self._branch(spot, numbers)

    @property
    def values(self) -> dict[str, str]:
        """A value of ours → the value of the base in whose place it stands."""
        return self.ends.values

    @property
    def record(self) -> dict[str, Any]:
        """The inputs of --live-scale, and below what the nodes lie that are nobody's own."""
        found = {"inputs": list(self.live), "stems": list(self.shared)}
        return {name: value for name, value in found.items() if value}

    def finish(self) -> None:
        """Lay the new nodes into the graphs."""
        self.editor.finish()

    # The branch.

    def _branch(self, spot: Spot, numbers: Sequence[int]) -> None:
        """Of one adapter, all that it does to one weight: a branch, though the weight holds several parameters."""
        first, make, own = spot.sites[0], self._nodes(spot.changes[numbers[0]]), list[Own]()
        form = FORMS[first.like]
        for n in numbers:
            change = spot.changes[n]
            at = make if n == numbers[0] else make.at(self._nodes(change).stem)
            own.append(Own(at, change, self._norms(spot, n) if "magnitude" in change.update else None))
        pair, rescaling = constants(make, form, first, own)
        if self.prefold:
            make.fold(pair.a, pair.b, *((rescaling.ratio, rescaling.rest) if rescaling else ()))
        self.editor.lay(self.index.scopes[0], "", make.list)
        for i, site in enumerate(spot.sites):
            run = make if len(spot.sites) == 1 else make.below(str(i))
            self._use(run, form, site, pair, rescaling, self.live[own[0].change.job] if self.live else "")

    def _inputs(self, names: Sequence[str]) -> list[str]:
        """The strength of each adapter as an input: 1, unless it is fed."""
        made = [f"lora.scale.{name}" if len(names) > 1 else "lora.scale" for name in names]
        for name in made:
            self.index.taken.add(name)
            self.index.graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, []))
            self.index.graph.initializer.append(numpy_helper.from_array(np.ones((), np.float32), name))
        return made

    def _use(self, make: Nodes, form: Form, site: Site, pair: Pair, rescaling: Rescaling | None, strength: str) -> None:
        """The branch beside one use."""

        def rescaled(run: Nodes, base: str, bias: str) -> str:
            assert rescaling is not None
            kept = run.node("Mul", [base, rescaling.ratio], "rescaled")
            if not bias:
                return kept
            return run.node("Add", [kept, magnitude.rest(run, form, site, bias, rescaling.rest)], "bias")

        run = Nodes(self.index, make.stem)
        between = partial(_strengthened, run, site, strength) if strength else unchanged
        self.ends.add(site, run, lambda run: form.run(run, site, pair, between), rescaled if rescaling else None)

    # The product.

    def _widened(self, spots: Sequence[Spot]) -> None:
        """[x|u] · [W;B], u once for all weights that read one x."""
        uses = [(spot.sites[0], [self._factors(change, spot.sites[0]) for change in spot.changes]) for spot in spots]
        make = Nodes(self.index, self.index.stem(spots[0].key))
        self.shared.append(make.stem)
        whose = owners([pair for _, own in uses for pair in own])
        between = partial(self._weighed, make, spots[0].sites[0], whose) if self.live else _unweighed
        self.values.update(widen(self.index, self.editor, make, uses, between))
        self.editor.lay(self.index.scopes[0], "", make.list)

    def _factors(self, change: Change, site: Site) -> Factors:
        """The pair. What its operator multiplies the product with is not its own: it is inside."""
        make = self._nodes(change)
        found = factors(make, change, site, 1.0)
        self.editor.lay(self.index.scopes[0], "", make.list)
        return found

    def _weighed(self, make: Nodes, site: Site, whose: Sequence[int], run: Nodes, hidden: str) -> str:
        """u with each column times the strength of its adapter."""
        one = make.store("strength/shape", np.array([1]))
        each = [make.node("Reshape", [name, one], "strength") for name in self.live]
        every = make.node("Concat", each, "strengths", axis=0)
        held = make.node("Gather", [every, make.store("owners", np.array(whose, np.int64))], "strengths/columns")
        return run.node("Mul", [hidden, make.cast(held, site.dtype, "strengths/cast", _FLOAT)], "hidden/strengthened")

    # The weight.

    def _weights(self, spot: Spot) -> None:
        """W' of each value that the sites read, in the graph where that value is."""
        read = {site.number: site.values[-1] for site in spot.sites}
        now = {value: value.name for value in read.values()}
        for n, change in enumerate(spot.changes):
            make, norms = self._nodes(change), None
            place = change.parameter or spot.sites[0].operand
            if "magnitude" in change.update:
                norms = self._norms(spot, n)
            weight = Weight(make, change.update, place, spot.sites[0].dtype, norms, change.rows, change.permute)
            self.editor.lay(self.index.scopes[0], "", make.list)
            for value in now:
                site = next(site for site in spot.sites if read[site.number] == value)
                nodes = Nodes(self.index, make.stem)
                now[value] = weight.change(nodes, now[value], site.operand)
                self.editor.lay(value.scope, value.name if value.name in value.scope.producers else "", nodes.list)
                self.values[now[value]] = value.name
        for site in spot.sites:
            site.node.input[site.position] = now[read[site.number]]

    def _folded(self, spot: Spot) -> None:
        """W' itself, stored beside W."""
        value, place = magnitude.read(self.index, self.folder, spot)
        for change in spot.changes:
            value = change.turned(place).apply(value)
        make, matrix = self._nodes(spot.changes[0]), place.to_matrix(value)
        kind = helper.tensor_dtype_to_np_dtype(spot.sites[0].dtype)
        for site in spot.sites:
            name = make.store("weight", site.operand.from_matrix(matrix).astype(kind))
            self.values[name] = site.values[-1].name
            site.node.input[site.position] = name

    def _norms(self, spot: Spot, n: int) -> Array:
        return magnitude.norms(self.index, self.folder, spot, spot.changes[n], spot.changes[:n])

    def _nodes(self, change: Change) -> Nodes:
        if (stem := self.stems.get((change.job, change.key))) is not None:  # another tensor of the same target
            return Nodes(self.index, f"{stem}/tied")
        stem = self.index.stem(change.key)
        self.stems[change.job, change.key] = stem
        return Nodes(self.index, stem)


def _unweighed(run: Nodes, hidden: str) -> str:
    """u as it is."""
    return hidden


def _strengthened(make: Nodes, site: Site, strength: str, hidden: str) -> str:
    """A·x times an input."""
    scale = make.cast(strength, site.dtype, "strength", onnx.TensorProto.FLOAT)
    return make.node("Mul", [hidden, scale], "hidden/strengthened")
