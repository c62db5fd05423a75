"""The change on the weight's side: a constant subgraph that makes W' of W, which ONNX Runtime folds when it loads.

    W ── Cast ──[ replace ]── + Σ s·B@A ──[ · m/‖V‖ ]──[ rows ]── Cast ── the operator that read W

Every kind of update has this form, at every operator: it is ``Update.apply`` in the words of ONNX. W and the
adapter's tensors stay as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from loraformat.parts import Delta, Loha, Lokr, Lora, Magnitude, Part, Replace, roles_of
from loraformat.parts import Rows as RowsPart
from loraformat_converters.onnx.graph.nodes import Nodes

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.axes import Placement
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Weight", "wide"]

_FLOAT, _DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE


def wide(dtype: int) -> int:
    """The type in which constants are computed: float64 for float64 weights, else float32."""
    return int(_DOUBLE if dtype == _DOUBLE else _FLOAT)


@dataclass(frozen=True)
class _Step:
    """What happens to W before (``order`` < 0) or after the sum."""

    order: int
    run: Callable[[Nodes, str], str]


class Weight:
    """The subgraph of one update.

    Args:
        make: where its nodes and constants go.
        place: how the parameter lies that the update speaks of.
        dtype: the data type of W.
        norms: what a magnitude divides by, as ``Update.norms`` gives it.
        rows: which rows of the matrix change, where W holds several parameters.
        permute: in which order W has the blocks of the update's rows.
    """

    def __init__(
        self,
        make: Nodes,
        update: Update,
        place: Placement,
        dtype: int,
        norms: Array | None,
        rows: tuple[int, int] | None = None,
        permute: tuple[int, ...] | None = None,
    ) -> None:
        self.make, self.update, self.place, self.rows, self.permute = make, update, place, rows, permute
        self.dtype, self.wide = dtype, wide(dtype)
        self.numpy = np.float64 if self.wide == _DOUBLE else np.float32
        self.roles = {role: make.store(role, tensor) for part in update.parts for role, tensor in roles_of(part)}
        self.steps = [self._step(part, norms) for part in update.parts if not isinstance(part, _SUMMED)]
        self.sum = self._sum()

    def change(self, make: Nodes, operand: str, have: Placement) -> str:
        """W' of an operand laid like ``have``, in its own type and axes."""
        value = make.cast(operand, self.wide, "weight/wide", self.dtype)
        value = make.relaid(value, have, self.place, "weight/parameter")
        before = [step for step in self.steps if step.order < 0]
        for step in before:
            value = step.run(make, value)
        if self.sum:
            value = make.node("Add", [value, self.sum], "weight/sum")
        for step in self.steps[len(before) :]:
            value = step.run(make, value)
        value = make.relaid(value, self.place, have, "weight/operand")
        return make.cast(value, self.dtype, "weight", self.wide)

    def _sum(self) -> str:
        """Σ scale · matrix in the parameter's axes, or ""."""
        total = ""
        for part in self.update.additive:
            matrix, shape = _MATRICES[type(part)](self, part)
            scale = self.make.store(f"{part.kind}/scale", np.asarray(part.scale, self.numpy))
            term = self.make.node("Mul", [matrix, scale], f"{part.kind}/scaled")
            term = self.make.permuted(term, shape, self.permute, f"{part.kind}/gates")
            term, shape = self.make.spread(term, shape, self.rows, self.place.matrix_shape[-2], f"{part.kind}/rows")
            term = self.make.from_matrix(term, self.place, f"{part.kind}/delta", shape)
            total = self.make.node("Add", [total, term], "sum") if total else term
        return total

    def _step(self, part: Part, norms: Array | None) -> _Step:
        match part:
            case Replace():
                new = self.make.cast(self.roles["replace"], self.wide, "replace/wide")
                return _Step(-1, lambda make, value: new)
            case Magnitude():
                assert norms is not None
                factor = self._factor(part, norms)
                return _Step(1, lambda make, value: make.node("Mul", [value, factor], "weight/rescaled"))
            case RowsPart():
                return _Step(2, self._rows(part))
        raise TypeError(part)

    def _factor(self, part: Magnitude, norms: Array) -> str:
        """m / ‖V‖, spread over the parameter's axes."""
        make, place = self.make, self.place
        m = make.cast(self.roles["magnitude"], self.wide, "magnitude/wide")
        norm = make.store("norm", norms.astype(self.numpy))
        ratio = make.node("Div", [m, norm], "magnitude/ratio")
        shape = (*part.magnitude.shape[:-1], place.matrix_shape[-2]) if self.rows else part.magnitude.shape
        ratio = make.runs([(ratio, self.rows)], shape, np.ones((), self.numpy), "magnitude/rows", axis=-1)
        kept = (*place.batch, *place.out) if part.magnitude_axes is None else part.magnitude_axes
        sizes = [place.shape[a] for a in kept]
        ratio = make.reshape(ratio, shape, sizes, "magnitude/axes")
        ratio = make.transpose(ratio, sorted(range(len(kept)), key=kept.__getitem__), "magnitude/T")
        spread = [n if a in kept else 1 for a, n in enumerate(place.shape)]
        return make.reshape(ratio, _ascending(kept, sizes), spread, "magnitude/spread")

    def _rows(self, part: RowsPart) -> Callable[[Nodes, str], str]:
        """ScatterND along the axis, which is brought to the front for it."""
        make, rank = self.make, len(self.place.shape)
        order = [part.axis, *(a for a in range(rank) if a != part.axis)]
        back = sorted(range(rank), key=order.__getitem__)
        values = make.transpose(make.cast(self.roles["values"], self.wide, "values/wide"), order, "values/T")
        n = len(part.indices)
        indices = make.reshape(self.roles["indices"], [n], [n, 1], "indices/column")

        def run(make: Nodes, value: str) -> str:
            front = make.transpose(value, order, "weight/front")
            return make.transpose(make.node("ScatterND", [front, indices, values], "weight/rows"), back, "weight/back")

        return run

    def read(self, role: str) -> str:
        """A factor in the type in which constants are computed."""
        return self.make.cast(self.roles[role], self.wide, f"{role}/wide")


_SUMMED = (Lora, Loha, Lokr, Delta)
Shape = tuple[int, ...]


def _ascending(axes: tuple[int, ...], sizes: list[int]) -> list[int]:
    """The sizes in the order of their axes."""
    return [size for _, size in sorted(zip(axes, sizes, strict=True))]


# The matrix of each additive kind, as ``loraformat.products`` computes it: (value, its shape [*batch, out, in]).


def _lora(own: Weight, part: Lora) -> tuple[str, Shape]:
    a, shape = own.read("lora_A"), part.lora_A.shape
    if part.mid is not None:  # Σ mid[m, n, …] A[n, i] → [m, i · …]
        m, n, *kernel = part.mid.shape
        k = int(np.prod(kernel))
        core = own.make.reshape(own.read("mid"), part.mid.shape, [m, n, k], "mid/flat")
        core = own.make.node("MatMul", [own.make.turn(core, 3, "mid/T"), a], "mid/A")
        a = own.make.reshape(own.make.turn(core, 3, "mid/A/T"), [m, shape[1], k], [m, shape[1] * k], "mid/A/flat")
    return own.make.node("MatMul", [own.read("lora_B"), a], "lora/product"), part.matrix_shape()


def _loha(own: Weight, part: Loha) -> tuple[str, Shape]:
    first, second = (
        _around(own, f"hada_w{n}_a", f"hada_w{n}_b", f"t{n}" if core is not None else "", part)
        for n, core in ((1, part.t1), (2, part.t2))
    )
    return own.make.node("Mul", [first, second], "loha/product"), part.matrix_shape()


def _lokr(own: Weight, part: Lokr) -> tuple[str, Shape]:
    (o1, i1), (o2, i2) = part.sides()
    first = own.read("lokr_w1") if part.lokr_w1 is not None else _around(own, "lokr_w1_a", "lokr_w1_b", "", part)
    if part.lokr_w2 is not None:
        second, have = own.read("lokr_w2"), part.lokr_w2.shape
    else:
        second = _around(own, "lokr_w2_a", "lokr_w2_b", "t2" if part.t2 is not None else "", part)
        have = (o2, i2)
    first = own.make.reshape(first, [], [o1, 1, i1, 1], "lokr_w1/spread")
    second = own.make.reshape(second, have, [1, o2, 1, i2], "lokr_w2/spread")
    product = own.make.node("Mul", [first, second], "lokr/product")
    return own.make.reshape(product, [], part.matrix_shape(), "lokr/flat"), part.matrix_shape()


def _delta(own: Weight, part: Delta) -> tuple[str, Shape]:
    return own.make.reshape(
        own.read("delta"), part.delta.shape, part.matrix_shape(), "delta/matrix"
    ), part.matrix_shape()


_MATRICES: Mapping[type, Callable[[Weight, Any], tuple[str, Shape]]] = {
    Lora: _lora,
    Loha: _loha,
    Lokr: _lokr,
    Delta: _delta,
}


def _around(own: Weight, a: str, b: str, core: str, part: Loha | Lokr) -> str:
    """``a @ b`` as a matrix, or the product around a core [i, j, *k]: Σ core[i, j, …] b[j, r] a[i, p] → [p, r · …]."""
    make, right = own.make, getattr(part, b)
    if not core:
        columns = [right.shape[0], int(np.prod(right.shape[1:]))]
        return make.node(
            "MatMul", [own.read(a), make.reshape(own.read(b), right.shape, columns, f"{b}/flat")], f"{a}/b"
        )
    i, j, *kernel = getattr(part, core).shape
    k, r = int(np.prod(kernel)), right.shape[1]
    flat = make.reshape(own.read(core), (i, j, *kernel), [i, j, k], f"{core}/flat")
    inner = make.node("MatMul", [make.turn(flat, 3, f"{core}/T"), own.read(b)], f"{core}/b")  # [i, k, r]
    inner = make.reshape(make.turn(inner, 3, f"{core}/b/T"), [], [i, r * k], f"{core}/b/flat")
    return make.node("MatMul", [make.turn(own.read(a), 2, f"{a}/T"), inner], f"{core}/a")
