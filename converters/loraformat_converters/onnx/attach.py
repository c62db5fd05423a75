"""Attach: the branch s·B·A·x beside a weight that is not touched.

A, B and s are stored as the adapter has them. Transposing, scaling and casting are constant subgraphs that ONNX
Runtime folds when it loads the model, so that attaching writes only the adapter, and nothing is lost.

    x ──┬── MatMul(W) ── Add(bias) ───────────────────── lora/T/base ──┐
        └── MatMul(Aᵀ) ── MatMul((s·B)ᵀ) ── lora/T/delta ───────────── Add ── y
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from loraformat.parts import Lora
from loraformat_converters.onnx.index import Index, Site
from loraformat_converters.onnx.model import onnx_dtype

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Branch"]


class Branch:
    """One adapter's branches being added to one graph. Nodes are collected and laid into the graph by ``finish``."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.after: dict[str, list[onnx.NodeProto]] = {}  # output of an existing node → nodes that follow it
        self.first: dict[str, list[onnx.NodeProto]] = {}  # … → nodes that must come before it

    def add(self, key: str, lora: Lora, sites: tuple[Site, ...]) -> None:
        """The branch of one target at every use of its weight; one pair of constants for all uses."""
        stem = f"lora/{key}"
        dtype = sites[0].root.data_type
        constants = self._constants(stem, lora, dtype, sites[0].gemm_alpha)
        for i, site in enumerate(sites):
            self._use(stem if len(sites) == 1 else f"{stem}/{i}", site, constants)
        anchor = sites[0].node.output[0]
        self.first.setdefault(anchor, []).extend(self.pending)

    def finish(self) -> None:
        """Lay the new nodes into the graph, which stays sorted."""
        nodes: list[onnx.NodeProto] = []
        for node in self.index.graph.node:
            before = [n for output in node.output for n in self.first.pop(output, ())]
            behind = [n for output in node.output for n in self.after.pop(output, ())]
            nodes += [*before, node, *behind]
        del self.index.graph.node[:]
        self.index.graph.node.extend(nodes)

    def _constants(self, stem: str, lora: Lora, dtype: int, gemm_alpha: float) -> tuple[str, str]:
        """Aᵀ [in, r] and (s·B)ᵀ [r, out] in the graph's dtype, from A, B and s as stored."""
        self.pending: list[onnx.NodeProto] = []
        wide = onnx.TensorProto.DOUBLE if dtype == onnx.TensorProto.DOUBLE else onnx.TensorProto.FLOAT
        a = self._cast(f"{stem}/A", *self._factor(f"{stem}/A", lora.lora_A), dtype)
        b = self._cast(f"{stem}/B", *self._factor(f"{stem}/B", lora.lora_B), wide)
        scale = np.asarray(lora.scale * gemm_alpha, np.float64 if wide == onnx.TensorProto.DOUBLE else np.float32)
        scaled = self._node("Mul", [b, self._store(f"{stem}/scale", scale)], f"{stem}/B/scaled")
        # fp16 arithmetic has no CPU kernel to fold it, so the product is taken in fp32 and cast last (ORT 1.32).
        b = self._cast(f"{stem}/B/scaled", scaled, wide, dtype)
        return self._turn(f"{stem}/A", a), self._turn(f"{stem}/B", b)

    def _use(self, stem: str, site: Site, constants: tuple[str, str]) -> None:
        a, b = constants
        x = site.node.input[0]
        final = self._final(site)
        y = final.output[0]
        nodes: list[onnx.NodeProto] = []
        if site.transposes_x:
            turned = self.index.fresh(f"{stem}/x")
            nodes.append(helper.make_node("Transpose", [x], [turned], turned, perm=[1, 0]))
            x = turned
        hidden, delta, base = (self.index.fresh(f"{stem}/{word}") for word in ("hidden", "delta", "base"))
        nodes.append(helper.make_node("MatMul", [x, a], [hidden], hidden))
        nodes.append(helper.make_node("MatMul", [hidden, b], [delta], delta))
        # The old producer gives up its name to the sum: every reader of y, the model's outputs too, sees the sum.
        nodes.append(helper.make_node("Add", [base, delta], [y], self.index.fresh(f"{stem}/add")))
        final.output[0] = base
        self.after.setdefault(base, []).extend(nodes)

    def _final(self, site: Site) -> onnx.NodeProto:
        """The node whose output the branch is added to: the bias's Add, where the weight's operator feeds only that."""
        y = site.node.output[0]
        readers = self.index.consumers.get(y, [])
        if len(readers) == 1 and readers[0].op_type == "Add" and y not in self.index.outputs | self.index.captured:
            other = next((name for name in readers[0].input if name != y), "")
            bias = self.index.roots.get(other)
            if bias is not None and len(bias.dims) == 1:
                return readers[0]
        return site.node

    def _factor(self, name: str, values: Array) -> tuple[str, int]:
        """(value, data type) of A or B as stored; widened, which loses nothing, where the opset cannot cast it."""
        dtype = onnx_dtype(values)
        if dtype == onnx.TensorProto.BFLOAT16 and self.index.opset < 13:  # Cast takes bfloat16 since 13
            values, dtype = values.astype(np.float32), int(onnx.TensorProto.FLOAT)
        return self._store(name, values), dtype

    def _store(self, name: str, values: Array) -> str:
        tensor = numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), self.index.fresh(name))
        return self.index.store(tensor)

    def _cast(self, stem: str, value: str, have: int, want: int) -> str:
        return value if have == want else self._node("Cast", [value], f"{stem}/cast", to=want)

    def _turn(self, stem: str, value: str) -> str:
        return self._node("Transpose", [value], f"{stem}/T", perm=[1, 0])

    def _node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        output = self.index.fresh(name)
        self.pending.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output
