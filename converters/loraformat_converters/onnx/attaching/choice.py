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
        self.index, self._mask, self._void = self._indexed(count) if self.by_index else self._weighed()
        self._shared: dict[object, str] = {}

    @property
    def rows(self) -> str:
        """[1]: how many rows the model is fed. More or fewer choices would cut tokens apart by their own number."""
        return self._once("rows", self._count)

    def _count(self) -> str:
        name, axis = self.start
        shape = self.make.node("Shape", [name], "shape")
        return self.make.node("Gather", [shape, self.make.store("axis", np.array([axis]))], "count")

    def _indexed(self, count: int) -> tuple[str, str, str]:
        """(index, [rows, N] of bool, [rows, 1]: 0, or NaN for an index that is none)."""
        make = self.make
        below = make.node("Less", [INDEX, make.store("none", np.array(0))], "below")
        index = make.node("Where", [below, make.store("beyond", np.array(count + 1)), INDEX], "index")
        mask = make.node("Gather", [make.store("table", np.eye(count + 1, count, -1, dtype=np.bool_)), index], "mask")
        wrong = make.node("Greater", [index, make.store("last", np.array(count))], "wrong")
        nan, zero = make.store("nan", np.array(np.nan, np.float32)), make.store("nothing", np.array(0, np.float32))
        void = make.node("Where", [wrong, nan, zero], "void/row")
        return index, mask, make.node("Reshape", [void, make.store("column", np.array([-1, 1]))], "void")

    def _weighed(self) -> tuple[str, str, str]:
        """("", the weights themselves, [1, 1]: 0)."""
        return "", self.input, self.make.store("void", np.zeros((1, 1), np.float32))

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
        void = self._once(
            ("void", dtype), lambda: self.make.cast(self._void, dtype, "void/cast", onnx.TensorProto.FLOAT)
        )
        void = self._spread("void", void, [1 if n == len(owners) else n for n in shape])
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

    def _columns(self, owners: Sequence[int], shape: Sequence[int]) -> str:
        """Whether, or how much, each row has chosen the adapter that a column of u belongs to, in a shape that meets u."""

        def gathered() -> str:
            held = self.make.store("owners", np.array(owners, np.int64))
            return self.make.node("Gather", [self._mask, held], "mask/columns", axis=1)

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
