"""Stack: several adapters in one graph; each row of a batch chooses one (``lora.index``) or mixes them (``lora.weights``).

Slot 0 of the index is the bare base, slot n the n-th adapter; ``choice`` says what becomes of any other.

    gathered   A and B of every slot stacked, one taken for each row: x · A[i] · B[i]                       (CPU, index)
    masked     all A side by side, u = x · [A₁|A₂|…], of u only the chosen columns kept, u · [B₁;B₂;…]
    widened    the same inside the base's own product: [x|u] · [W;B₁;B₂;…]                                 (CUDA)

Masked, pairs keep their own ranks; gathered, they are filled with zeros up to the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from loraformat_converters.onnx.attaching import magnitude
from loraformat_converters.onnx.attaching.branches import FORMS, LINEAR, Pair
from loraformat_converters.onnx.attaching.choice import Choice
from loraformat_converters.onnx.attaching.ends import Ends
from loraformat_converters.onnx.attaching.factors import Factors, factors, joined, owners, padded
from loraformat_converters.onnx.attaching.magnitude import Ratio
from loraformat_converters.onnx.attaching.rescaled import rescaled, table
from loraformat_converters.onnx.attaching.rows import Rows, RowsOf, starts
from loraformat_converters.onnx.attaching.weight import wide
from loraformat_converters.onnx.attaching.widen import together, widen, widens
from loraformat_converters.onnx.changing.spots import Spot
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.nodes import Editor, Nodes

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.base import Options
    from loraformat.plan import Job

    Array = npt.NDArray[Any]

__all__ = ["Stack"]


class Stack:
    """Adapters being stacked in one graph.

    Attributes:
        stems: (job, key) → below what the adapter's own tensors are named.
        shared: below what the nodes are named that are nobody's own.
    """

    mode = "stack"
    prefold = False

    def __init__(
        self, index: Index, options: Options, jobs: Sequence[Job], model: onnx.ModelProto, folder: Path
    ) -> None:
        self.index, self.options, self.model, self.count, self.folder = index, options, model, len(jobs), folder
        self.editor = Editor(index)
        self.ends = Ends(index, self.editor)
        self.stems: dict[tuple[int, str], str] = {}
        start = starts(model, options.rows)
        self.rows = RowsOf(model, start)
        self.own = Nodes(index, index.stem("rows"))
        self.shared = [self.own.stem]
        self.choice = Choice(index, self.own, options.select, next(iter(start.items())), self.rows.size, self.count)

    @property
    def values(self) -> dict[str, str]:
        """A value of ours → the value of the base in whose place it stands."""
        return self.ends.values

    @property
    def record(self) -> dict[str, Any]:
        """What is fed, and below what the nodes lie that are nobody's own."""
        rows, select = starts(self.model, self.options.rows), self.options.select
        return {"inputs": [self.choice.input], "stems": self.shared, "stack": {"select": select, "rows": rows}}

    def add(self, spots: Sequence[Spot]) -> None:
        """All changes of all weights, each behind the choice."""
        wider: list[Spot] = []
        for spot in spots:
            if self.options.provider == "cuda" and widens(spot):
                wider.append(spot)
            elif self._gathers(spot):
                self._gathered(spot)
            else:
                self._masked(spot)
        for group in together(wider):
            self._widened(group)

    def finish(self) -> None:
        """Lay the new nodes into the graphs."""
        self.editor.lay(self.index.scopes[0], "", self.own.list)
        self.editor.finish()

    def _gathers(self, spot: Spot) -> bool:
        return self.options.provider == "cpu" and self.options.select == "index" and spot.sites[0].like in LINEAR

    # The three forms.

    def _gathered(self, spot: Spot) -> None:
        """A[i] and B[i] of each row."""
        site, make = spot.sites[0], Nodes(self.index, self.index.stem(spot.key))
        self.shared.append(make.stem)
        out, in_ = site.operand.matrix_shape
        blocks: dict[str, list[str]] = {"A": [], "B": []}
        pairs, ratios = self._factors(spot, site.factor)
        every, found = table(make, site, ratios, self.count), joined(make, pairs)
        rank = max(pair.r for pair in found.values())
        for number in range(-1, self.count):  # slot 0 is the base
            pair = found.get(number)
            more = 0 if pair is None else rank - pair.r
            for side, shape in (("A", [in_, rank]), ("B", [rank, out])):
                if pair is None:
                    block = self._zeros(make, [1, *shape], wide(site.dtype))
                else:
                    ends = [0, 0, 0, more] if side == "A" else [0, 0, more, 0]
                    block = padded(make, make.turn(pair.a if side == "A" else pair.b, 2, f"{side}/T"), ends, side)
                    block = make.reshape(block, shape, [1, *shape], f"{side}/slot")
                blocks[side].append(block)
        a, b = (
            make.cast(
                make.node("Concat", held, f"{side}/all", axis=0),
                site.dtype,
                f"{side}/cast",
                wide(site.dtype),
            )
            for side, held in blocks.items()
        )
        taken = [
            make.node("Gather", [value, self.choice.index], f"{side}/rows") for side, value in (("A", a), ("B", b))
        ]
        self._lay(make)
        for i, use in enumerate(spot.sites):
            run = Nodes(self.index, make.stem if len(spot.sites) == 1 else f"{make.stem}/{i}")
            self.ends.add(
                use,
                run,
                partial(self._by_row, site=use, taken=taken),
                rescaled(self.choice, use, self._axes(use), every),
            )

    def _by_row(self, run: Nodes, site: Site, taken: Sequence[str]) -> str:
        """x · A[i] · B[i], x as [rows, tokens, in]."""
        out, in_ = site.operand.matrix_shape
        x, straight = site.x, self._axes(site) == 3
        if not straight:
            wanted = run.node("Concat", [self.choice.rows, run.store("rest", np.array([-1, in_]))], "x/shape", axis=0)
            x = run.node("Reshape", [x, wanted], "x")
        hidden = run.node("MatMul", [x, taken[0]], "hidden")
        change = run.node("MatMul", [hidden, taken[1]], "change")
        if straight:
            return change
        shape = run.node("Shape", [site.x], "shape")
        first, last = run.store("first", np.array([0])), run.store("last", np.array([-1]))
        before = run.node("Slice", [shape, first, last], "shape/lead")
        shape = run.node("Concat", [before, run.store("out", np.array([out]))], "shape/out", axis=0)
        return run.node("Reshape", [change, shape], "change/shaped")

    def _masked(self, spot: Spot) -> None:
        """The branch of all adapters at once, between A and B only what is chosen."""
        site, make = spot.sites[0], Nodes(self.index, self.index.stem(spot.key))
        self.shared.append(make.stem)
        (pairs, ratios), dtype = self._factors(spot, site.factor), site.dtype
        a = make.node("Concat", [pair.a for pair in pairs], "A/all", axis=0)
        b = make.node("Concat", [pair.b for pair in pairs], "B/all", axis=1)
        total = sum(pair.r for pair in pairs)
        out, in_ = site.operand.matrix_shape
        a, b = (make.cast(value, dtype, f"{side}/cast", wide(dtype)) for side, value in (("A", a), ("B", b)))
        pair = FORMS[site.like].constants(make, site, Pair(a, b, (total, in_), (out, total)))
        whose, every = owners(pairs), table(make, site, ratios, self.count)
        self._lay(make)
        for i, use in enumerate(spot.sites):
            run = Nodes(self.index, make.stem if len(spot.sites) == 1 else f"{make.stem}/{i}")

            def change(run: Nodes, use: Site = use) -> str:
                return FORMS[use.like].run(
                    run, use, pair, lambda hidden: self.choice.keep(run, use, hidden, self._axes(use), whose)
                )

            self.ends.add(use, run, change, rescaled(self.choice, use, self._axes(use), every))

    def _widened(self, spots: Sequence[Spot]) -> None:
        """[x|u] · [W;B], u once for all weights that read the same x."""
        first = spots[0].sites[0]
        make = Nodes(self.index, self.index.stem(spots[0].key))
        self.shared.append(make.stem)
        uses = [(spot.sites[0], self._factors(spot, 1.0)[0]) for spot in spots]
        whose = owners([pair for _, own in uses for pair in own])

        def keep(run: Nodes, hidden: str) -> str:
            return self.choice.keep(run, first, hidden, self._axes(first), whose)

        self.ends.values.update(widen(self.index, self.editor, make, uses, keep))
        self._lay(make)

    # What they share.

    def _axes(self, site: Site) -> int | None:
        """How many axes u has, where the first of them counts the rows, and nothing else; else None."""
        axes = self.rows.axes(site.x)
        return None if axes is None or self.rows.of(site) != Rows(0) else axes + (site.like == "Gather")

    def _factors(self, spot: Spot, factor: float) -> tuple[list[Factors], dict[int, list[Ratio]]]:
        """The pairs of one weight times ``factor``, their tensors stored as the adapters have them; job → g of a DoRA."""
        found, ratios = list[Factors](), dict[int, list[Ratio]]()
        for change in spot.changes:
            stem, ratio = self.stems.get((change.job, change.key)), ""
            make = Nodes(self.index, f"{stem}/tied" if stem else self.index.stem(change.key))
            self.stems.setdefault((change.job, change.key), make.stem)
            if "magnitude" in change.update:
                norms = magnitude.norms(self.index, self.folder, spot, change)
                ratio = magnitude.ratio(make, change.update, norms, wide(spot.sites[0].dtype))
                ratios.setdefault(change.job, []).append((ratio, change.rows))
            found.append(factors(make, change, spot.sites[0], factor, ratio))
            self._lay(make)
        return found, ratios

    def _zeros(self, make: Nodes, shape: Sequence[int], kind: int) -> str:
        zero = numpy_helper.from_array(np.zeros(1, helper.tensor_dtype_to_np_dtype(kind)))
        return make.node("ConstantOfShape", [make.store("zeros/shape", np.array(shape, np.int64))], "zeros", value=zero)

    def _lay(self, make: Nodes) -> None:
        self.own.list.extend(make.list)
        make.list.clear()
