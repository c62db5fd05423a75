"""Operations that know what a weight with factors is made of: (parameters, inputs) → the output.

None where these parameters are beyond a rule: then the weight is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from loraformat_converters.jax_live.factored import RANK, Factored

__all__ = ["RULES"]


def _dot(params: Any, inputs: list[Any]) -> Any:
    left, right = inputs
    if isinstance(left, Factored) and isinstance(right, Factored):
        return None
    (of_left, of_right), (batch_left, batch_right) = params["dimension_numbers"]
    factored, other = (left, right) if isinstance(left, Factored) else (right, left)
    mine, batch = (of_left, batch_left) if factored is left else (of_right, batch_right)
    theirs, their_batch = (of_right, batch_right) if factored is left else (of_left, batch_left)
    fresh = max(factored.labels) + 1
    names = list(range(fresh, fresh + other.ndim))
    for axis, at in zip((*theirs, *their_batch), (*mine, *batch), strict=True):
        names[axis] = factored.labels[at]
    free = [label for at, label in enumerate(factored.labels) if at not in (*mine, *batch)]
    others = [label for axis, label in enumerate(names) if axis not in (*theirs, *their_batch)]
    out = [factored.labels[at] for at in batch] + (free + others if factored is left else others + free)
    weights = {factored is left: factored.weight, factored is not left: other}
    keep = ("precision", "preferred_element_type")
    dense = lax.dot_general(
        weights[True], weights[False], params["dimension_numbers"], **{key: params[key] for key in keep}
    )
    contracted = {factored.labels[at] for at in mine}
    through = _through(factored, other, names, contracted, out, params["precision"])
    return dense + through.astype(dense.dtype)


def _through(factored: Factored, x: Any, names: list[int], contracted: set[int], out: list[int], precision: Any) -> Any:
    """s · x·a·b: first the factor that has the contracted axes, so that what lies between has r in their place."""
    pairs = [(factored.a, factored.a_labels), (factored.b, factored.b_labels)]
    if len(contracted & set(factored.b_labels)) > len(contracted & set(factored.a_labels)):
        pairs.reverse()
    (first, first_labels), (second, second_labels) = pairs
    wide = jnp.promote_types(x.dtype, jnp.bfloat16)
    middle = [n for n in dict.fromkeys((*names, *first_labels)) if n in second_labels or n in out]
    ids = [[label + 1 for label in labels] for labels in (names, first_labels, middle, second_labels, out)]
    inner = jnp.einsum(x, ids[0], first.astype(wide), ids[1], ids[2], precision=precision)
    return factored.scale * jnp.einsum(inner, ids[2], second.astype(wide), ids[3], ids[4], precision=precision)


def _convolved(params: Any, inputs: list[Any]) -> Any:
    """A convolution into r channels and one of size 1: where only the out axis of the kernel is b's."""
    x, kernel = inputs
    numbers = params["dimension_numbers"]
    if isinstance(x, Factored) or params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    out = kernel.labels[numbers.rhs_spec[0]]
    if kernel.b_labels != (RANK, out) or out in kernel.a_labels:
        return None
    dense = lax.conv_general_dilated_p.bind(x, kernel.weight, **params)
    order = [kernel.a_labels.index(RANK if label == out else label) for label in kernel.labels]
    a = jnp.transpose(kernel.a, order).astype(x.dtype)
    inner = lax.conv_general_dilated_p.bind(x, a, **params)
    at = numbers.out_spec[1]
    through = jnp.moveaxis(jnp.tensordot(inner, kernel.b.astype(inner.dtype), axes=((at,), (0,))), -1, at)
    return dense + (kernel.scale * through).astype(dense.dtype)


def _gathered(params: Any, inputs: list[Any]) -> Any:
    """Rows looked up in an embedding: those of the factor that has the indexed axes, times the other."""
    table, indices = inputs
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if isinstance(indices, Factored) or numbers.operand_batching_dims:
        return None
    taken = numbers.collapsed_slice_dims
    whole = all(sizes[axis] == n for axis, n in enumerate(table.weight.shape) if axis not in taken)
    side = table.side([table.labels[axis] for axis in taken])
    if set(numbers.start_index_map) != set(taken) or not whole or side is None:
        return None
    mine, labels = (table.a, table.a_labels) if side == "a" else (table.b, table.b_labels)
    other, theirs = (table.b, table.b_labels) if side == "a" else (table.a, table.a_labels)
    if len(labels) != len(taken) + 1:
        return None
    dense = lax.gather_p.bind(table.weight, indices, **params)
    where = {axis: i for i, axis in enumerate(sorted(taken))}
    batch = [axis for axis in range(dense.ndim) if axis not in numbers.offset_dims]
    simple = numbers._replace(
        offset_dims=(len(batch),),
        collapsed_slice_dims=tuple(range(len(taken))),
        start_index_map=tuple(where[axis] for axis in numbers.start_index_map),
    )
    order = [labels.index(table.labels[axis]) for axis in sorted(taken)]
    rows = jnp.transpose(mine, [*order, labels.index(RANK)])
    found = lax.gather_p.bind(
        rows, indices, **{**params, "dimension_numbers": simple, "slice_sizes": (*[1] * len(taken), rows.shape[-1])}
    )
    left = [table.labels[axis] for axis in range(table.weight.ndim) if axis not in taken]
    wide = jnp.moveaxis(other, theirs.index(RANK), 0)
    rest = [label for label in theirs if label != RANK]
    wide = jnp.transpose(wide, [0, *(1 + rest.index(label) for label in left)])
    through = jnp.tensordot(found, wide, axes=((found.ndim - 1,), (0,)))
    through = jnp.moveaxis(through, range(len(batch), through.ndim), numbers.offset_dims)
    return dense + (table.scale * through).astype(dense.dtype)


def _transposed(params: Any, inputs: list[Any]) -> Any:
    return inputs[0].transposed(params["permutation"])


def _converted(params: Any, inputs: list[Any]) -> Any:
    (value,) = inputs
    if not jnp.issubdtype(params["new_dtype"], jnp.floating):
        return None
    return replace(value, weight=value.weight.astype(params["new_dtype"]))


def _reshaped(params: Any, inputs: list[Any]) -> Any:
    return None if params["dimensions"] is not None else inputs[0].reshaped(params["new_sizes"])


def _squeezed(params: Any, inputs: list[Any]) -> Any:
    return inputs[0].without(params["dimensions"])


def _sliced(params: Any, inputs: list[Any]) -> Any:
    steps = params["strides"] or [1] * len(params["start_indices"])
    starts, stops = params["start_indices"], params["limit_indices"]
    return inputs[0].along(lambda t, at, axis: lax.slice_in_dim(t, starts[axis], stops[axis], steps[axis], at))


def _sliced_somewhere(params: Any, inputs: list[Any]) -> Any:
    value, *starts = inputs
    sizes = params["slice_sizes"]
    return value.along(lambda t, at, axis: lax.dynamic_slice_in_dim(t, starts[axis], sizes[axis], at))


def _fixed(params: Any, inputs: list[Any]) -> Any:
    return jax.tree_util.tree_map(lax.stop_gradient, inputs[0])


RULES: dict[str, Callable[[Any, list[Any]], Any]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolved,
    "gather": _gathered,
    "transpose": _transposed,
    "convert_element_type": _converted,
    "reshape": _reshaped,
    "squeeze": _squeezed,
    "slice": _sliced,
    "dynamic_slice": _sliced_somewhere,
    "stop_gradient": _fixed,
    "copy": lambda params, inputs: inputs[0],
}
