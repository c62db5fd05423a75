"""New nodes and constants, named below one stem so that Netron groups them and ``detach`` knows them; and their places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from loraformat_converters.onnx.graph.index import Index
from loraformat_converters.onnx.graph.model import onnx_dtype
from loraformat_converters.onnx.graph.scopes import Scope

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from loraformat.axes import Placement

    Array = npt.NDArray[Any]

__all__ = ["Editor", "Nodes"]

_WIDENED = {np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)}
_BF16 = np.dtype(ml_dtypes.bfloat16)


class Nodes:
    """Nodes in the order in which they are computed; every name is ``<stem>/<role>``.

    Attributes:
        list: the nodes.
        stored: the names of the constants, with their values.
    """

    def __init__(self, index: Index, stem: str) -> None:
        self.index, self.stem = index, stem
        self.list: list[onnx.NodeProto] = []
        self.stored: dict[str, Array] = {}

    def below(self, role: str) -> Nodes:
        """Others whose names lie below this stem."""
        return Nodes(self.index, f"{self.stem}/{role}")

    def at(self, stem: str) -> Nodes:
        """The same nodes and constants, and what is made of now on named below another stem."""
        twin = Nodes(self.index, stem)
        twin.list, twin.stored = self.list, self.stored
        return twin

    def node(self, op: str, inputs: Sequence[str], role: str, **attributes: Any) -> str:
        """The value that an operator computes."""
        output = self.index.fresh(f"{self.stem}/{role}")
        self.list.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    def store(self, role: str, values: Array) -> str:
        """A constant, stored as it is; widened, which loses nothing, where the opset cannot cast its type."""
        values = np.asarray(values)
        if values.dtype in _WIDENED or (
            values.dtype == _BF16 and self.index.opset < 13
        ):  # Cast takes bfloat16 since 13
            values = values.astype(np.float32)
        name = self.index.fresh(f"{self.stem}/{role}")
        self.index.store(numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name))
        self.stored[name] = values
        return name

    def cast(self, value: str, want: int, role: str = "cast", have: int | None = None) -> str:
        """``value`` in another type; ``have`` is that of a constant stored here, if not given."""
        have = onnx_dtype(self.stored[value]) if have is None else have
        return value if have == want else self.node("Cast", [value], role, to=want)

    def transpose(self, value: str, perm: Sequence[int], role: str = "T") -> str:
        """``value`` with its axes in another order."""
        return value if list(perm) == sorted(perm) else self.node("Transpose", [value], role, perm=list(perm))

    def turn(self, value: str, rank: int, role: str = "T") -> str:
        """``value`` with its last two axes exchanged."""
        return self.transpose(value, [*range(rank - 2), rank - 1, rank - 2], role)

    def reshape(self, value: str, have: Sequence[int], want: Sequence[int], role: str = "shaped") -> str:
        """``value`` with its entries counted by other axes."""
        if list(have) == list(want):
            return value
        shape = self.store(f"{role}/shape", np.array(want, np.int64))
        return self.node("Reshape", [value, shape], role)

    def split(self, value: str, sizes: Sequence[int], role: str) -> list[str]:
        """``value`` cut along its last axis."""
        outputs = [self.index.fresh(f"{self.stem}/{role}/{n}") for n in range(len(sizes))]
        inputs: list[str] = [value]
        how: dict[str, Any] = {"split": list(sizes)}
        if self.index.opset >= 13:  # since which the sizes are an input
            inputs, how = [value, self.store(f"{role}/sizes", np.array(sizes, np.int64))], {}
        self.list.append(helper.make_node("Split", inputs, outputs, outputs[0], axis=-1, **how))
        return outputs

    def pad(self, value: str, ends: Sequence[int], role: str) -> str:
        """``value`` with so many zeros before each axis, then after each."""
        if self.index.opset < 11:  # since which the sizes are an input
            return self.node("Pad", [value], role, pads=list(ends))
        return self.node("Pad", [value, self.store(f"{role}/ends", np.array(ends, np.int64))], role)

    def unsqueeze(self, value: str, axis: int, role: str) -> str:
        """``value`` with an axis of 1 more."""
        if self.index.opset < 13:  # since which the axes are an input
            return self.node("Unsqueeze", [value], role, axes=[axis])
        return self.node("Unsqueeze", [value, self.store(f"{role}/axes", np.array([axis], np.int64))], role)

    def spread(
        self, value: str, shape: Sequence[int], rows: tuple[int, int] | None, out: int, role: str = "rows"
    ) -> tuple[str, tuple[int, ...]]:
        """(a matrix [*batch, n, m] as the ``rows`` of one of ``out`` rows, zeros in the others; its shape)."""
        if rows is None:
            return value, tuple(shape)
        before = [0] * (len(shape) - 2) + [rows[0], 0]
        after = [0] * (len(shape) - 2) + [out - rows[1], 0]
        return self.pad(value, [*before, *after], role), (*shape[:-2], out, shape[-1])

    def runs(
        self,
        parts: Sequence[tuple[str, tuple[int, int] | None]],
        shape: Sequence[int],
        rest: Array,
        role: str,
        axis: int = 0,
    ) -> str:
        """Values, each with the run [start, stop) of ``axis`` that it is of one of ``shape``, which is ``rest`` elsewhere.

        A value that is all of it comes alone, without a run.
        """
        if parts[0][1] is None:
            return parts[0][0]
        held, end = list[str](), 0
        known = sorted((run or (0, 0), value) for value, run in parts)
        for (start, stop), value in [*known, ((shape[axis], shape[axis]), "")]:
            if start > end:
                sizes = [start - end if a == axis % len(shape) else n for a, n in enumerate(shape)]
                held.append(self.store(f"{role}/rest", np.broadcast_to(rest, sizes)))
            held, end = [*held, value], stop
        return self.node("Concat", held[:-1], role, axis=axis)

    def permuted(self, value: str, shape: Sequence[int], blocks: Sequence[int] | None, role: str = "gates") -> str:
        """A matrix [*batch, n, m] with its rows, in as many blocks, in another order."""
        if blocks is None:
            return value
        rows = np.arange(shape[-2], dtype=np.int64).reshape(len(blocks), -1)[list(blocks)].reshape(-1)
        return self.node("Gather", [value, self.store(f"{role}/order", rows)], role, axis=len(shape) - 2)

    def to_matrix(self, value: str, place: Placement, role: str = "matrix") -> str:
        """A tensor laid like ``place`` as [*batch, out, in]."""
        order = (*place.batch, *place.out, *place.in_)
        turned = self.transpose(value, order, f"{role}/T")
        return self.reshape(turned, [place.shape[a] for a in order], place.matrix_shape, role)

    def from_matrix(self, value: str, place: Placement, role: str = "tensor", shape: Sequence[int] = ()) -> str:
        """A matrix [*batch, out, in] laid like ``place``; ``shape``: its own, where a batch size is 1, for all."""
        order = (*place.batch, *place.out, *place.in_)
        batch = tuple(shape[:-2]) if shape else place.batch_sizes
        sizes = [*batch, *(place.shape[a] for a in (*place.out, *place.in_))]
        unfolded = self.reshape(value, [*batch, *place.matrix_shape[-2:]], sizes, role)
        return self.transpose(unfolded, sorted(range(len(order)), key=order.__getitem__), f"{role}/T")

    def relaid(self, value: str, have: Placement, want: Placement, role: str) -> str:
        """A tensor laid like ``have`` laid like ``want``."""
        if have == want:
            return value
        return self.from_matrix(self.to_matrix(value, have, f"{role}/matrix"), want, role)

    def fold(self, *values: str) -> tuple[str, ...]:
        """The values computed now and stored, in the place of the nodes that would compute them."""
        made = [node.output[0] for node in self.list]
        wanted = [value for value in values if value in made]
        if wanted:
            held = [numpy_helper.from_array(array, name) for name, array in self.stored.items()]
            ends = [helper.make_tensor_value_info(value, onnx.TensorProto.UNDEFINED, None) for value in wanted]
            graph = helper.make_graph(self.list, "constants", [], ends, held)
            opsets = [helper.make_opsetid("", max(self.index.opset, 13))]
            model = helper.make_model(graph, opset_imports=opsets)
            from onnx.reference import ReferenceEvaluator  # slow to import, and seldom needed

            results = ReferenceEvaluator(model).run(None, {})
            self._forget(keep=values)
            for name, array in zip(wanted, results, strict=True):
                self.index.store(numpy_helper.from_array(np.ascontiguousarray(array), name))
                self.stored[name] = array
        return values

    def _forget(self, keep: Sequence[str]) -> None:
        """Take the constants that the folded nodes read out of the graph."""
        gone = self.stored.keys() - set(keep)
        for held in (self.index.graph.initializer, self.index.graph.input):
            for i in reversed(range(len(held))):
                if held[i].name in gone:
                    del held[i]
        self.list.clear()
        self.stored = {name: values for name, values in self.stored.items() if name not in gone}


class Editor:
    """New nodes to be laid into the graphs of a model, which stay sorted."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._places: dict[int, dict[str, list[onnx.NodeProto]]] = {}
        self._before: dict[int, dict[str, list[onnx.NodeProto]]] = {}

    def lay(self, scope: Scope, after: str, nodes: Sequence[onnx.NodeProto]) -> None:
        """Put nodes behind the one that computes ``after``; at the head of the graph where it is ""."""
        self._places.setdefault(id(scope), {}).setdefault(after, []).extend(nodes)

    def before(self, scope: Scope, output: str, nodes: Sequence[onnx.NodeProto]) -> None:
        """Put nodes before the one that computes ``output``."""
        self._before.setdefault(id(scope), {}).setdefault(output, []).extend(nodes)

    def finish(self) -> None:
        """Insert all; inner graphs first, because a graph that is rebuilt copies those in it."""
        for scope in reversed(self.index.scopes):
            places = self._places.pop(id(scope), {})
            before = self._before.pop(id(scope), {})
            if not (places or before) or scope.graph is None:
                continue
            nodes = list(places.pop("", ()))
            for node in scope.graph.node:
                nodes += [new for output in node.output for new in before.pop(output, ())]
                nodes.append(node)
                nodes += [new for output in node.output for new in places.pop(output, ())]
            assert not places, places.keys()
            assert not before, before.keys()
            del scope.graph.node[:]
            scope.graph.node.extend(nodes)
