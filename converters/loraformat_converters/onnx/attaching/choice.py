"""What each row of a batch chose, in the words of a graph: which columns of u = x · [A₁|A₂|…] are kept.

An index that is no adapter's is led to where Gather raises, negative ones too, which it would count from the end. Where
Gather does not check its indices (CUDA, gather_impl.cu) the mask of such a row is empty, and what stands in the place of
its columns is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.nodes import Nodes

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.base import Options

    Array = npt.NDArray[Any]

__all__ = ["INDEX", "WEIGHTS", "Choice", "chosen"]

INDEX, WEIGHTS = "lora.index", "lora.weights"


class Choice:
    """The input by which rows choose, and the values that are made of it once.

    Args:
        make: where the nodes go that all targets share.
        select: ``index`` or ``weights``.
        start: the model's input whose axis counts the rows.
        size: how many rows there are, as an input's size.
        count: how many adapters there are.

    Attributes:
        input: its name.
        index: [rows], safe to gather with; "" where weights are fed.
    """

    def __init__(
        self, graph: Index, make: Nodes, select: str, start: tuple[str, int], size: int | str, count: int
    ) -> None:
        self.make, self.start, self.by_index = make, start, select == "index"
        self.input = INDEX if self.by_index else WEIGHTS
        kind, sizes = (onnx.TensorProto.INT64, [size]) if self.by_index else (onnx.TensorProto.FLOAT, [size, count])
        graph.taken.add(self.input)
        graph.graph.input.append(helper.make_tensor_value_info(self.input, kind, sizes))
        self._count = count
        self.index = self._indexed() if self.by_index else ""
        self._shared: dict[object, str] = {}

    @property
    def rows(self) -> str:
        """[1]: how many rows the model is fed. More or fewer choices would cut tokens apart by their own number."""
        return self._once("rows", self._counted)

    def _counted(self) -> str:
        name, axis = self.start
        shape = self.make.node("Shape", [name], "shape")
        return self.make.node("Gather", [shape, self.make.store("axis", np.array([axis]))], "count")

    def _indexed(self) -> str:
        """[rows]: the index, a negative one beyond the last."""
        make = self.make
        below = make.node("Less", [INDEX, make.store("none", np.array(0))], "below")
        return make.node("Where", [below, make.store("beyond", np.array(self._count + 1)), INDEX], "index")

    def keep(self, run: Nodes, site: Site, hidden: str, axes: int | None, owners: Sequence[int]) -> str:
        """Of u, whose columns are its last axis (of a convolution: its second), what its row chose.

        Args:
            axes: how many axes u has, where the first counts the rows and nothing else; None where it counts tokens too.
            owners: the adapter of each column.
        """
        total, dtype = len(owners), site.dtype
        if site.like in ("Conv", "ConvTranspose"):
            return self._where(run, dtype, hidden, owners, [0, total, *[1] * (len(site.operand.shape) - 2)])
        if axes is not None:
            return self._where(run, dtype, hidden, owners, [0, *[1] * (axes - 2), total])
        wanted = run.node("Concat", [self.rows, run.store("rest", np.array([-1, total]))], "hidden/rows", axis=0)
        tall = run.node("Reshape", [hidden, wanted], "hidden/by_row")
        kept = self._where(run, dtype, tall, owners, [0, 1, total])
        return run.node("Reshape", [kept, run.node("Shape", [hidden], "hidden/shape")], "hidden/kept")

    def _where(self, run: Nodes, dtype: int, hidden: str, owners: Sequence[int], shape: Sequence[int]) -> str:
        """By Where and not by a product alone: 0 · Inf of an adapter that is not chosen would be NaN."""
        mask = self._columns(owners, shape)
        void = self._spread("void", self._void(dtype), [1 if n == len(owners) else n for n in shape])
        if self.by_index:
            return run.node("Where", [mask, hidden, void], "hidden/chosen")
        none = self._once(
            ("none", mask),
            lambda: self.make.node("Equal", [mask, self.make.store("none", np.array(0, np.float32))], "mask/none"),
        )
        much = self._once(
            ("cast", mask, dtype), lambda: self.make.cast(mask, dtype, "mask/cast", onnx.TensorProto.FLOAT)
        )
        return run.node("Where", [none, void, run.node("Mul", [hidden, much], "hidden/mixed")], "hidden/chosen")

    def _void(self, dtype: int) -> str:
        """What stands in the place of a column that is not chosen: 0; in each of a row whose index is none, NaN."""
        stored = {role: np.full((1, 1), value, np.float32) for role, value in (("nothing", 0), ("nan", np.nan))}

        def constant(role: str) -> str:
            return self.make.cast(self.make.store(role, stored[role]), dtype, f"{role}/cast", onnx.TensorProto.FLOAT)

        def by_row() -> str:
            wrong = self.make.node("Greater", [self.index, self.make.store("last", np.array(self._count))], "wrong")
            wrong = self.make.node("Reshape", [wrong, self.make.store("column", np.array([-1, 1]))], "wrong/row")
            return self.make.node("Where", [wrong, constant("nan"), constant("nothing")], "void")

        return self._once(("void", dtype), by_row if self.by_index else lambda: constant("nothing"))

    def _columns(self, owners: Sequence[int], shape: Sequence[int]) -> str:
        """Whether, or how much, each row has chosen the adapter that a column of u belongs to, in a shape that meets u."""

        def gathered() -> str:
            held = np.array(owners, np.int64)
            if not self.by_index:
                return self.make.node("Gather", [self.input, self.make.store("owners", held)], "mask", axis=1)
            table = np.arange(self._count + 1)[:, None] == held + 1
            return self.make.node("Gather", [self.make.store("table", table), self.index], "mask")

        return self._spread("mask", self._once(("columns", *owners), gathered), shape)

    def _spread(self, role: str, value: str, shape: Sequence[int]) -> str:
        def reshaped() -> str:
            return self.make.node(
                "Reshape", [value, self.make.store(f"{role}/shape", np.array(shape))], f"{role}/spread"
            )

        return self._once((role, value, *shape), reshaped)

    def _once(self, key: object, made: Callable[[], str]) -> str:
        """A value that all targets share is made for the first of them: on a GPU each node costs a kernel."""
        if key not in self._shared:
            self._shared[key] = made()
        return self._shared[key]


def chosen(options: Options, count: int, number: int, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What is fed so that every row uses adapter ``number`` of ``count``; 0 is the base."""
    name, _, axis = options.rows[0].partition(":") if options.rows[0] not in feeds else (options.rows[0], "", "0")
    rows = feeds[name].shape[int(axis or 0)]
    if options.select == "index":
        return {INDEX: np.full(rows, number, np.int64)}
    weights = np.zeros((rows, count), np.float32)
    weights[:, max(0, number - 1)] = number > 0
    return {WEIGHTS: weights}
