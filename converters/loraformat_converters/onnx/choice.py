"""What each row of a batch chose, in the words of a graph: which columns of u = x · [A₁|A₂|…] are kept.

An index that is no adapter's is led to where Gather raises, negative ones too, which it would count from the end. Where
Gather does not check its indices (CUDA, gather_impl.cu) the mask of such a row is empty, and what stands in the place of
its columns is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from loraformat_converters.onnx.index import Index, Site
from loraformat_converters.onnx.nodes import Nodes

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
        rows: how many rows there are, as an input's size.
        count: how many adapters there are.

    Attributes:
        input: its name.
        index: [rows], safe to gather with; "" where weights are fed.
        rows: [1]: how many rows there are.
    """

    def __init__(self, graph: Index, make: Nodes, select: str, rows: int | str, count: int) -> None:
        self.make, self.by_index = make, select == "index"
        self.input = INDEX if self.by_index else WEIGHTS
        kind, sizes = (onnx.TensorProto.INT64, [rows]) if self.by_index else (onnx.TensorProto.FLOAT, [rows, count])
        graph.taken.add(self.input)
        graph.graph.input.append(helper.make_tensor_value_info(self.input, kind, sizes))
        shape = make.node("Shape", [self.input], "shape")
        self.rows = make.node(
            "Slice", [shape, make.store("zero", np.array([0])), make.store("one", np.array([1]))], "count"
        )
        self.index, self._mask, self._void = self._indexed(count) if self.by_index else self._weighed()
        self._voids: dict[int, str] = {}

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

    def columns(self, make: Nodes, owners: Sequence[int]) -> str:
        """[rows, K]: whether, or how much, each row has chosen the adapter that a column belongs to."""
        held = make.store("owners", np.array(owners, np.int64))
        return make.node("Gather", [self._mask, held], "mask", axis=1)

    def keep(self, run: Nodes, site: Site, hidden: str, mask: str, total: int) -> str:
        """Of u, whose K = ``total`` columns are its last axis (of a convolution: its second), what its row chose."""
        dtype = site.dtype
        void = self._cast(dtype)
        if site.like in ("Conv", "ConvTranspose"):
            more = [1] * (len(site.operand.shape) - 2)
            mask, void = (
                self._spread(run, "mask", mask, [0, total, *more]),
                self._spread(run, "void", void, [0, 1, *more]),
            )
            return self._where(run, dtype, mask, hidden, void)
        wanted = run.node("Concat", [self.rows, run.store("rest", np.array([-1, total]))], "hidden/rows", axis=0)
        tall = run.node("Reshape", [hidden, wanted], "hidden/by_row")
        mask, void = self._spread(run, "mask", mask, [0, 1, total]), self._spread(run, "void", void, [0, 1, 1])
        kept = self._where(run, dtype, mask, tall, void)
        return run.node("Reshape", [kept, run.node("Shape", [hidden], "hidden/shape")], "hidden/kept")

    @staticmethod
    def _spread(run: Nodes, role: str, value: str, shape: Sequence[int]) -> str:
        return run.node("Reshape", [value, run.store(f"{role}/shape", np.array(shape))], f"{role}/spread")

    def _where(self, run: Nodes, dtype: int, mask: str, hidden: str, void: str) -> str:
        """By Where and not by a product alone: 0 · Inf of an adapter that is not chosen would be NaN."""
        if self.by_index:
            return run.node("Where", [mask, hidden, void], "hidden/chosen")
        none = run.node("Equal", [mask, run.store("none", np.array(0, np.float32))], "mask/none")
        mixed = run.node("Mul", [hidden, run.cast(mask, dtype, "mask/cast", onnx.TensorProto.FLOAT)], "hidden/mixed")
        return run.node("Where", [none, void, mixed], "hidden/chosen")

    def _cast(self, dtype: int) -> str:
        if dtype not in self._voids:
            self._voids[dtype] = self.make.cast(self._void, dtype, "void/cast", onnx.TensorProto.FLOAT)
        return self._voids[dtype]


def chosen(options: Options, count: int, number: int, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What is fed so that every row uses adapter ``number`` of ``count``; 0 is the base."""
    name, _, axis = options.rows[0].partition(":") if options.rows[0] not in feeds else (options.rows[0], "", "0")
    rows = feeds[name].shape[int(axis or 0)]
    if options.select == "index":
        return {INDEX: np.full(rows, number, np.int64)}
    weights = np.zeros((rows, count), np.float32)
    weights[:, max(0, number - 1)] = number > 0
    return {WEIGHTS: weights}
