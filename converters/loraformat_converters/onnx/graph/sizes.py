"""The sizes of a graph's values, as numbers: what a model leaves open is given one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import numpy_helper

from loraformat_converters.onnx.graph.model import is_small, light
from loraformat_converters.onnx.graph.stand_ins import stand_in

__all__ = ["sizes"]

_INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)


def sizes(
    model: onnx.ModelProto, start: Mapping[str, int], primes: Sequence[int]
) -> tuple[dict[str, tuple[int | None, ...]], dict[str, list[int]]]:
    """(value → sizes, small constants of integers), by onnx's own inference on the graph without its weights."""
    made, constants = light(model), dict[str, list[int]]()
    for tensor in model.graph.initializer:
        if tensor.data_type in _INTEGERS and is_small(tensor):
            constants[tensor.name] = [int(n) for n in numpy_helper.to_array(tensor).reshape(-1)]
    for node in made.graph.node:
        if node.op_type == "Constant" and (found := _constant(node)) is not None:
            constants[node.output[0]] = found
    stand_in(made.graph)
    _number(made.graph, start, primes)
    inferred = onnx.shape_inference.infer_shapes(made, data_prop=True).graph
    shapes: dict[str, tuple[int | None, ...]] = {t.name: tuple(t.dims) for t in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
    return shapes, constants


def _number(graph: onnx.GraphProto, start: Mapping[str, int], primes: Sequence[int]) -> None:
    """A number for every size of an input; what was said of other values by names is forgotten where it is no input's."""
    numbers: dict[str, int] = {}
    for value in graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if start.get(value.name) == axis and not dim.dim_value:
                numbers[dim.dim_param or f"{value.name}.{axis}"] = primes[0]
    for value in graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_value <= 0:
                symbol = dim.dim_param or f"{value.name}.{axis}"
                dim.dim_value = numbers.setdefault(symbol, primes[1 + len(numbers) % (len(primes) - 1)])
    for value in (*graph.value_info, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                number = numbers.get(dim.dim_param)
                dim.Clear()
                if number:
                    dim.dim_value = number


def _constant(node: onnx.NodeProto) -> list[int] | None:
    for held in node.attribute:
        if held.name == "value" and held.t.data_type in _INTEGERS and is_small(held.t):
            return [int(n) for n in numpy_helper.to_array(held.t).reshape(-1)]
        if held.name in ("value_int", "value_ints"):
            return [held.i] if held.name == "value_int" else list(held.ints)
    return None
