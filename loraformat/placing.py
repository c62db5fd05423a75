"""How an update's matrix lies in a base tensor: by evidence that agrees, or a refusal. Never by a guess."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraformat.axes import Placement
from loraformat.errors import LoraFormatError, Problem, fault

if TYPE_CHECKING:
    from loraformat.updates import Update

__all__ = ["place", "unplaced"]


def place(
    key: str, update: Update, shape: tuple[int, ...], stated: str | None, claims: Sequence[tuple[str, str]]
) -> tuple[Placement, tuple[str, ...]]:
    """The placement in a tensor of ``shape``, with the evidence for it.

    Args:
        stated: what the user said (``--axes``), or None.
        claims: (axes, evidence) pairs of the base: what its format or its operator says.

    Raises:
        LoraFormatError: LF-604 no evidence; LF-605 two pieces disagree; LF-606 the shapes do not fit.
    """
    if "replace" in update and "resize" in update["replace"].allows:  # what is laid out is the new tensor
        shape = update["replace"].replace.shape
    said: list[tuple[Placement, str]] = []
    if update.placement is not None:
        said.append((_own(key, update, shape), "adapter: placed"))
    for spec, evidence in [*([(stated, "user: --axes")] if stated else []), *claims]:
        said.append((_from_spec(key, shape, spec, evidence), evidence))
    matrix = update.matrix_shape()
    if not said and (spec_by_shape := _by_shape(shape, matrix)):
        said.append(spec_by_shape)
    if not said and (matrix is None or len(shape) == 1):  # nothing to lay: any reading of the axes gives the same
        said.append((Placement(shape, (0,) if shape else (), tuple(range(1, len(shape)))), "shape: a vector"))
    if not said:
        raise _unknown(key, shape, matrix)
    first = said[0]
    for other in said[1:]:
        if other[0] != first[0]:
            what = f"{first[1]} says {first[0].spec}, {other[1]} says {other[0].spec}"
            raise fault("LF-605", what, where=key, fix="one of them is wrong; nothing is changed until they agree")
    _check(key, update, first[0], matrix)
    return first[0], tuple(evidence for _, evidence in said)


def unplaced(key: str) -> Problem:
    """LF-604 for a weight that is to become a target, and of which nothing says how it lies."""
    fix = f"say it: --axes '{key}=out,in' (a torch Linear) or '=in,out' (Conv1D, a JAX kernel)"
    return Problem("LF-604", "nothing says which axis is out and which is in", key, fix)


def _own(key: str, update: Update, shape: tuple[int, ...]) -> Placement:
    own = update.placement
    assert own is not None
    resizes = "replace" in update and "resize" in update["replace"].allows
    if own.shape != shape and not resizes:
        what = f"the adapter was made for a tensor {list(own.shape)}, the base has {list(shape)}"
        raise fault("LF-606", what, where=key, fix="another base, or a vocabulary that was resized")
    return own


def _from_spec(key: str, shape: tuple[int, ...], spec: str, evidence: str) -> Placement:
    try:
        placement = Placement.of(shape, spec)
    except ValueError as error:
        raise fault("LF-705", f"{evidence}: {error}", where=key) from None
    if why := placement.fault():
        raise fault("LF-705", f"{evidence} says {spec}: {why}", where=key)
    return placement


def _by_shape(shape: tuple[int, ...], matrix: tuple[int, ...] | None) -> tuple[Placement, str] | None:
    """The only reading that sizes allow: of two axes, of stacked matrices, of an unfolded convolution kernel."""
    if matrix is None or len(shape) < 2:
        return None
    batch = tuple(range(len(matrix) - 2))
    if len(matrix) == len(shape) and all(m in (1, n) for m, n in zip(matrix[:-2], shape, strict=False)):
        first, last = len(shape) - 2, len(shape) - 1
        found = [Placement(shape, (o,), (i,), batch) for o, i in ((first, last), (last, first))]
    elif len(matrix) == 2:
        # A flattened kernel is in the order of a torch convolution [out, in, *kernel] where only axis 0 can be out.
        # One that is [*kernel, in, out] has its kernel before its inputs: no size says in which order they were flattened.
        found = [Placement(shape, (0,), tuple(range(1, len(shape))))] if shape.count(shape[0]) == 1 else []
    else:
        return None
    fits = [p for p in found if p.matrix_shape[-2:] == matrix[-2:]]
    return (fits[0], f"shape: {list(shape)} fits only [{fits[0].spec}]") if len(fits) == 1 else None


def _unknown(key: str, shape: tuple[int, ...], matrix: tuple[int, ...] | None) -> LoraFormatError:
    if matrix is not None and not _same_size(shape, matrix):
        what = f"the update gives [out, in] = {list(matrix)}, the base tensor is {list(shape)}"
        return fault("LF-606", what, where=key, fix="is this the base that the adapter was trained on?")
    batch = ["batch"] * (len(matrix) - 2 if matrix is not None else 0)
    linear, kernel = (",".join([*batch, *axes]) for axes in (("out", "in"), ("in", "out")))
    fix = f"say it: --axes '{key}={linear}' (as a torch Linear) or '={kernel}' (Conv1D, a JAX kernel)"
    if len(shape) > len(batch) + 2:
        fix = f"say it: --axes '{key}=out,{','.join(['in'] * (len(shape) - 1))}' (a torch convolution)"
    return fault("LF-604", f"nothing says which axis of {list(shape)} is out and which is in", where=key, fix=fix)


def _same_size(shape: tuple[int, ...], matrix: tuple[int, ...]) -> bool:
    """Whether one matrix of a stack has as many values in both; of two axes, whether both sizes are there."""
    batch = len(matrix) - 2
    if len(shape) == len(matrix):
        return sorted(shape[batch:]) == sorted(matrix[batch:])
    return math.prod(shape[batch:]) == math.prod(matrix[batch:])


def _check(key: str, update: Update, placement: Placement, matrix: tuple[int, ...] | None) -> None:
    wanted = placement.matrix_shape
    if "rows" in update and "replace" not in update and (why := update["rows"].misfit(placement.shape)):
        raise fault("LF-606", why, where=key, fix="is this the base that the adapter was trained on?")
    if matrix is None or (len(matrix) == len(wanted) and matrix[-2:] == wanted[-2:]):
        return
    turned = matrix[-2:] == wanted[-2:][::-1]
    what = f"the update gives [out, in] = {list(matrix)}, the base tensor read as {placement.spec} has {list(wanted)}"
    rule, fix = ("LF-605", "the orientation is turned") if turned else ("LF-606", "another base?")
    raise fault(rule, what, where=key, fix=fix)
