"""Stack: several adapters in one graph; each row of a batch chooses one (``lora.index``) or mixes them (``lora.weights``).

Slot 0 of the index is the bare base, slot n the n-th adapter; ``choice`` says what becomes of any other.

    gathered   A and B of every slot stacked, one taken for each row: x · A[i] · B[i]                       (CPU, index)
    masked     all A side by side, u = x · [A₁|A₂|…], of u only the chosen columns kept, u · [B₁;B₂;…]
    widened    the same inside the base's own product: [x|u] · [W;B₁;B₂;…]                                 (CUDA)

Masked, pairs keep their own
ranks; gathered, they are filled with zeros up to the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from loraformat.parts import Lora
from loraformat_converters.onnx.branches import FORMS, Pair
from loraformat_converters.onnx.choice import Choice
from loraformat_converters.onnx.ends import Ends
from loraformat_converters.onnx.index import Index, Site
from loraformat_converters.onnx.nodes import Editor, Nodes
from loraformat_converters.onnx.rounding import balance
from loraformat_converters.onnx.rows import Rows, RowsOf, starts
from loraformat_converters.onnx.spots import Change, Spot
from loraformat_converters.onnx.stackable import LINEAR
from loraformat_converters.onnx.weight import wide

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.base import Options
    from loraformat.plan import Job

    Array = npt.NDArray[Any]

__all__ = ["Stack"]


@dataclass(frozen=True)
class _Factors:
    """One adapter's pair in the type in which constants are computed: A [r, in], s·B [out, r]."""

    job: int
    a: str
    b: str
    r: int


class Stack:
    """Adapters being stacked in one graph.

    Attributes:
        stems: (job, key) → below what the adapter's own tensors are named.
        shared: below what the nodes are named that are nobody's own.
    """

    mode = "stack"
    prefold = False

    def __init__(self, index: Index, options: Options, jobs: Sequence[Job], model: onnx.ModelProto) -> None:
        self.index, self.options, self.model, self.count = index, options, model, len(jobs)
        self.editor = Editor(index)
        self.ends = Ends(index, self.editor)
        self.stems: dict[tuple[int, str], str] = {}
        self.rows = RowsOf(model, starts(model, options.rows))
        self.own = Nodes(index, index.stem("rows"))
        self.shared = [self.own.stem]
        self.choice = Choice(index, self.own, options.select, self.rows.size, self.count)

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
        groups: dict[object, list[Spot]] = {}
        for spot in spots:
            if self._widens(spot):
                groups.setdefault((spot.sites[0].x, spot.sites[0].dtype), []).append(spot)
            elif self._gathers(spot):
                self._gathered(spot)
            else:
                self._masked(spot)
        for together in groups.values():
            self._widened(together)

    def finish(self) -> None:
        """Lay the new nodes into the graphs."""
        self.editor.lay(self.index.scopes[0], "", self.own.list)
        self.editor.finish()

    def _widens(self, spot: Spot) -> bool:
        """Whether B can stand below W: a float weight on the right, used once."""
        site = spot.sites[0]
        plain = site.like in LINEAR and site.side == 1 and site.product is None and site.sealed is None
        return self.options.provider == "cuda" and plain and len(spot.sites) == 1

    def _gathers(self, spot: Spot) -> bool:
        return self.options.provider == "cpu" and self.options.select == "index" and spot.sites[0].like in LINEAR

    # The three forms.

    def _gathered(self, spot: Spot) -> None:
        """A[i] and B[i] of each row."""
        site, rank = spot.sites[0], max(update["lora"].r for update in spot.updates)
        make = Nodes(self.index, self.index.stem(spot.key))
        self.shared.append(make.stem)
        out, in_ = site.operand.matrix_shape
        blocks: dict[str, list[str]] = {"A": [], "B": []}
        found = {pair.job: pair for pair in self._factors(spot, site.factor)}
        for number in range(-1, self.count):  # slot 0 is the base
            pair = found.get(number)
            more = 0 if pair is None else rank - pair.r
            for side, shape in (("A", [in_, rank]), ("B", [rank, out])):
                if pair is None:
                    block = self._zeros(make, [1, *shape], wide(site.dtype))
                else:
                    ends = [0, 0, 0, more] if side == "A" else [0, 0, more, 0]
                    block = self._padded(make, make.turn(pair.a if side == "A" else pair.b, 2, f"{side}/T"), ends, side)
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
            self.ends.add(use, run, lambda run, use=use: self._by_row(run, use, taken))  # type: ignore[misc]

    def _by_row(self, run: Nodes, site: Site, taken: Sequence[str]) -> str:
        """x · A[i] · B[i], x as [rows, tokens, in]."""
        out, in_ = site.operand.matrix_shape
        x, state = site.x, self.rows.of(site)
        straight = state == Rows(0) and self.rows.axes(x) == 3
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
        pairs, dtype = self._factors(spot, site.factor), site.dtype
        a = make.node("Concat", [pair.a for pair in pairs], "A/all", axis=0)
        b = make.node("Concat", [pair.b for pair in pairs], "B/all", axis=1)
        total = sum(pair.r for pair in pairs)
        out, in_ = site.operand.matrix_shape
        a, b = (make.cast(value, dtype, f"{side}/cast", wide(dtype)) for side, value in (("A", a), ("B", b)))
        pair = FORMS[site.like].constants(make, site, Pair(a, b, (total, in_), (out, total)))
        mask = self.choice.columns(make, _owners(pairs))
        self._lay(make)
        for i, use in enumerate(spot.sites):
            run = Nodes(self.index, make.stem if len(spot.sites) == 1 else f"{make.stem}/{i}")

            def change(run: Nodes, use: Site = use) -> str:
                return FORMS[use.like].run(
                    run, use, pair, lambda hidden: self.choice.keep(run, use, hidden, mask, total)
                )

            self.ends.add(use, run, change)

    def _widened(self, spots: Sequence[Spot]) -> None:
        """[x|u] · [W;B], u once for all weights that read the same x."""
        first = spots[0].sites[0]
        make = Nodes(self.index, self.index.stem(spots[0].key))
        self.shared.append(make.stem)
        dtype, held = first.dtype, [self._factors(spot, 1.0) for spot in spots]
        pairs = [pair for own in held for pair in own]
        total = sum(pair.r for pair in pairs)
        a = make.turn(make.node("Concat", [pair.a for pair in pairs], "A/all", axis=0), 2, "A/T")
        a = make.cast(a, dtype, "A/cast", wide(dtype))
        mask = self.choice.columns(make, _owners(pairs))
        start = 0
        wider: list[str] = []
        for number, (spot, own) in enumerate(zip(spots, held, strict=True)):
            rank = sum(pair.r for pair in own)
            b = make.node("Concat", [pair.b for pair in own], f"B/{number}/all", axis=1) if len(own) > 1 else own[0].b
            b = self._padded(make, b, [0, start, 0, total - start - rank], f"B/{number}")
            site, turned = spot.sites[0], spot.sites[0].operand.out == (0,)
            b = make.cast(b if turned else make.turn(b, 2, f"B/{number}/T"), dtype, f"B/{number}/cast", wide(dtype))
            wider.append(b)
            start += rank
        self._lay(make)
        run = Nodes(self.index, make.stem)
        hidden = self.choice.keep(run, first, run.node("MatMul", [first.x, a], "hidden"), mask, total)
        x = run.node("Concat", [first.x, hidden], "x", axis=-1)
        self.values[x] = first.x
        self.editor.before(
            first.scope, min((spot.sites[0].number, spot.sites[0].node.output[0]) for spot in spots)[1], run.list
        )
        for b, spot in zip(wider, spots, strict=True):
            site = spot.sites[0]
            weight, name = site.values[-1], self.index.fresh(f"{make.stem}/weight")
            node = helper.make_node("Concat", [weight.name, b], [name], name, axis=site.operand.in_[0])
            self.editor.before(site.scope, site.node.output[0], [node])
            self.values[name] = weight.name
            site.node.input[site.side] = name
            site.node.input[1 - site.side] = x

    # What they share.

    def _factors(self, spot: Spot, factor: float) -> list[_Factors]:
        """The pairs of one weight times ``factor``, their tensors stored as the adapters have them."""
        return [self._pair(change, spot.sites[0], factor) for change in spot.changes]

    def _pair(self, change: Change, site: Site, factor: float) -> _Factors:
        stem = self.stems.get((change.job, change.key))
        make = Nodes(self.index, f"{stem}/tied" if stem else self.index.stem(change.key))
        self.stems.setdefault((change.job, change.key), make.stem)
        lora: Lora = change.update["lora"]
        kind = wide(site.dtype)
        k, _ = balance(lora, factor, site.dtype)
        numpy = helper.tensor_dtype_to_np_dtype(kind)
        scale = make.store("scale", np.asarray(lora.scale * factor * 2.0**k, numpy))
        b = make.node(
            "Mul", [make.cast(make.store("lora_B", lora.lora_B), kind, "lora_B/wide"), scale], "lora_B/scaled"
        )
        a = make.cast(make.store("lora_A", lora.lora_A), kind, "lora_A/wide")
        if k:
            a = make.node("Mul", [a, make.store("lora_A/power", np.asarray(2.0**-k, numpy))], "lora_A/balanced")
        self._lay(make)
        return _Factors(change.job, a, b, lora.r)

    def _padded(self, make: Nodes, value: str, ends: Sequence[int], role: str) -> str:
        """With zeros before and after each axis."""
        if not any(ends):
            return value
        return make.node("Pad", [value, make.store(f"{role}/ends", np.array(ends, np.int64))], f"{role}/padded")

    def _zeros(self, make: Nodes, shape: Sequence[int], kind: int) -> str:
        zero = numpy_helper.from_array(np.zeros(1, helper.tensor_dtype_to_np_dtype(kind)))
        return make.node("ConstantOfShape", [make.store("zeros/shape", np.array(shape, np.int64))], "zeros", value=zero)

    def _lay(self, make: Nodes) -> None:
        self.own.list.extend(make.list)
        make.list.clear()


def _owners(pairs: Sequence[_Factors]) -> list[int]:
    """The adapter of each column."""
    return [pair.job for pair in pairs for _ in range(pair.r)]
