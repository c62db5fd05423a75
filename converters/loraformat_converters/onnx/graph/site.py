"""Site: one use of a stored weight by an operator, with what it means there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from loraformat.axes import Placement
from loraformat_converters.onnx.graph.operators import SEVERAL, VECTORS, WEIGHTS, operator, vector_axis
from loraformat_converters.onnx.graph.quantised import Product
from loraformat_converters.onnx.graph.scopes import Scope
from loraformat_converters.onnx.graph.trace import Value

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Order", "Site"]

Order = tuple[int, ...] | None
"""Of a module's rows, in as many blocks, which stands first, which second, …; None where they stand as they are."""


@dataclass(frozen=True, eq=False)
class Site:
    """One use of one stored parameter.

    Attributes:
        number: its place in ``Index.sites``, the same in every copy of the model.
        node: the operator.
        position: which of its inputs the parameter is.
        parameter: what the parameter is called in its module: weight or bias.
        root: the stored tensor: an initializer, or the value of a Constant.
        chain: the nodes between root and operator, root first.
        scope: where the operator is.
        values: the root, then what each node of the chain makes of it; the last is what the operator reads.
        operand: how [out, in] lies in what the operator reads.
        placement: how it lies in the root; where that is packed, in what it stands for.
        factor: what the operator multiplies x·W with.
        natural: whether torch keeps the named parameter in the operator's own axes.
        refusal: why this use cannot be changed; None if it can.
        sealed: why the root cannot hold a change, though one can be put beside it: it is quantised, or laid otherwise.
        product: what a quantised operator computes in floats; None for one that is of floats itself.
        dtype: the float type that the operator computes with.
        permute: of a torch module's rows, in as many blocks, which stands first here, which second, …
        doubt: why a name alone does not tell in which order the rows are.
        axes: which of the root's axes each axis of the operand is made of.
        turned: the other order in which the rows may be, where there is a doubt, as ``permute`` has it.
    """

    number: int
    node: onnx.NodeProto
    position: int
    parameter: str
    root: onnx.TensorProto
    root_name: str
    chain: tuple[onnx.NodeProto, ...]
    scope: Scope
    values: tuple[Value, ...]
    operand: Placement
    placement: Placement
    factor: float = 1.0
    natural: bool = False
    refusal: str | None = None
    sealed: str | None = None
    product: Product | None = None
    dtype: int = onnx.TensorProto.FLOAT
    permute: Order = None
    doubt: str | None = None
    axes: tuple[tuple[int, ...], ...] = ()
    turned: Order = None

    @property
    def orders(self) -> tuple[Order, ...]:
        """Every order in which the rows of the module may stand here."""
        return (self.permute, self.turned) if self.turned else (self.permute,)

    @property
    def operator(self) -> str:
        """The operator with its domain."""
        return operator(self.node)

    @property
    def vector(self) -> bool:
        """Whether the parameter is a vector: a bias, or the scale of a norm."""
        return self.position in VECTORS.get(self.node.op_type, {}) and vector_axis(self.operand.shape) is not None

    @property
    def known_operator(self) -> bool:
        """Whether the operator is one whose parameters are its module's."""
        return self.node.op_type in WEIGHTS or self.node.op_type in SEVERAL or self.vector

    @property
    def like(self) -> str:
        """The operator in whose words a change is put beside this one: itself, or what it is in floats."""
        operator = f"{self.operator} of a stack" if self._of_stack else self.operator
        return self.product.like if self.product else operator

    @property
    def _of_stack(self) -> bool:
        """Whether whole matrices are taken of a stack, to be multiplied by elsewhere."""
        return self.operator in ("Gather", "GatherND") and len(self.operand.shape) > 2

    @property
    def looks_up(self) -> bool:
        """Whether rows of a table are taken: an embedding."""
        return self.node.op_type in ("Gather", "GatherBlockQuantized") and not self._of_stack

    @property
    def dequantises(self) -> bool:
        """Whether the operator takes the codes, and no node before it makes floats of them."""
        return self.product is not None and (self.product.like != self.operator or bool(self.product.scale))

    @property
    def steps(self) -> list[tuple[onnx.NodeProto, int]]:
        """The nodes between root and operator, and which of its inputs each takes the weight by."""
        return [(n, list(n.input).index(value.name)) for n, value in zip(self.chain, self.values, strict=False)]

    @property
    def apart(self) -> str | None:
        """Why nothing can be put beside the operator, where that is all that keeps the weight from being changed."""
        return self.product.refusal if self.product else None

    @property
    def side(self) -> int:
        """On which side of a float product the weight stands: 0 left, 1 right."""
        return self.position if self.position < 2 else 1

    @property
    def x(self) -> str:
        """The float that the weight is multiplied with."""
        return self.product.x if self.product else str(self.node.input[1 - self.position])

    @property
    def end(self) -> onnx.NodeProto:
        """The node that gives the product as floats."""
        return self.product.end if self.product else self.node

    @property
    def bias(self) -> str | None:
        """The bias that is in the product, "" if none is, None if it is no float."""
        if self.product:
            return self.product.bias
        return self.node.input[2] if len(self.node.input) > 2 and self.operator != "Einsum" else ""

    def as_read(self, stored: Array) -> Array:
        """What is laid like the root, laid like the operand."""
        order = [axis for group in self.axes for axis in group]
        return stored.reshape(self.placement.shape).transpose(order).reshape(self.operand.shape)

    def as_stored(self, read: Array) -> Array:
        """The other way round."""
        order = [axis for group in self.axes for axis in group]
        sizes = [self.placement.shape[axis] for axis in order]
        return read.reshape(sizes).transpose(np.argsort(order)).reshape(self.placement.shape)
