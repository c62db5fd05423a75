"""In which axes the adapter's own parameter lies, where an update speaks of them: by evidence, or a refusal.

A graph tells how its operator reads the stored tensor, not how the parameter lay in the model that was exported. For
a sum of factors that is all one needs. A whole tensor that replaces another, or rows of it, must be laid first.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from loraformat.axes import Placement
from loraformat.errors import fault
from loraformat.turned import neutral, turned
from loraformat_converters.onnx.graph.index import Site

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from loraformat.updates import Update

__all__ = ["parameter_of"]


def parameter_of(key: str, update: Update, site: Site, stated: str | None) -> Placement | None:
    """The parameter's own placement; None where only the matrix matters and nobody states it.

    Args:
        stated: what the user said (``--axes``).

    Raises:
        LoraFormatError: LF-604 a square matrix that nothing orients; LF-605 two statements differ; LF-606 other sizes;
            LF-705 axes that cannot be.
    """
    said = None if stated is None else _stated(key, stated, site.placement)
    known = _placed(update, site)
    if said is not None and known is not None and said != known:
        what = f"--axes says {said.spec}, the adapter was placed as {known.spec}"
        raise fault("LF-605", what, where=key, fix="one of them is wrong")
    found = known or said
    if said is None and neutral(update):
        _check_square(key, update, site)
    if found is None and neutral(update):
        return None
    if found is None:
        found = site.operand if site.natural and not site.vector else _by_shape(key, update, site)
    if found is not None:
        turned(update, found, site.placement)  # what cannot be turned is told now
    return found


def _check_square(key: str, update: Update, site: Site) -> None:
    """LF-604 for square matrices whose file calls out what need not be the operator's out.

    Of a parameter [n, m] or [E, n, m] that is no module's weight peft 0.21.2 takes n for out, whatever the module does
    with it, unless it says ``is_transposed``, which no file repeats. The stack comes unplaced, the other as [out, in].
    """
    out, in_ = site.placement.matrix_shape[-2:]
    placed = update.placement
    if placed is None:
        doubtful = bool(site.placement.batch)
    else:
        by_word = placed.spec == "out,in" and "weight" not in key.rpartition(".")[2]
        doubtful = by_word and placed != site.placement and not site.vector
    if doubtful and out == in_:
        what = f"{list(site.placement.matrix_shape)}: square matrices, which the file does not orient"
        say = "" if placed else f"if out is what the operator gives: --axes '{key}={site.placement.spec}'; else "
        fix = f"{say}merge into the checkpoint, then export"
        raise fault("LF-604", what, where=key, fix=fix)


def _placed(update: Update, site: Site) -> Placement | None:
    """What the file says; a vector needs no word, be it of one axis or, such as [1, n, 1, 1], as it is stored."""
    if update.placement is not None or neutral(update) or not site.vector:
        return update.placement
    if _fits(update, site.placement.shape):
        return site.placement
    return Placement((math.prod(site.placement.shape),), (0,), ())


def _stated(key: str, spec: str, root: Placement) -> Placement:
    """The user's words with the sizes that the graph has."""
    try:
        blank = Placement.of((1,) * len(spec.split(",")), spec)
    except ValueError as error:
        raise fault("LF-705", f"--axes: {error}", where=key) from None
    shape = [1] * len(blank.shape)
    for mine, theirs in ((blank.out, root.out), (blank.in_, root.in_), (blank.batch, root.batch)):
        sizes = [root.shape[a] for a in theirs]
        if len(mine) != len(sizes):
            if len(mine) != 1 or not sizes:
                what = f"--axes says {spec}, the graph computes with {list(root.matrix_shape)} (batch, out, in)"
                raise fault("LF-705", what, where=key)
            sizes = [math.prod(sizes)]
        for axis, size in zip(mine, sizes, strict=True):
            shape[axis] = size
    return Placement(tuple(shape), blank.out, blank.in_, blank.batch)


def _by_shape(key: str, update: Update, site: Site) -> Placement:
    """The only reading of the update's own tensors as the operator's matrix."""
    fits = list(_readings(update, site.placement.matrix_shape))
    if len(fits) == 1:
        return fits[0]
    shape = _shape(update, site.placement.matrix_shape)
    if not fits:
        what = f"the update's tensor {shape} is no matrix {list(site.placement.matrix_shape)} (batch, out, in)"
        raise fault("LF-606", what, where=key, fix="is this the base that the adapter was trained on?")
    what = f"a tensor {shape} may be read as {' or '.join(p.spec for p in fits)}"
    fix = (
        f"say how the parameter lies: --axes '{key}=out,in' (a torch Linear) or '=in,out' (Conv1D, a JAX kernel); "
        "or --base CHECKPOINT, whose config.json does"
    )
    raise fault("LF-604", what, where=key, fix=fix)


def _readings(update: Update, matrix: tuple[int, ...]) -> Iterator[Placement]:
    """Every order of batch, out and in in which the update's tensors fit."""
    out, in_ = len(matrix) - 2, len(matrix) - 1
    for order in itertools.permutations(range(len(matrix))):
        shape = tuple(matrix[group] for group in order)
        if _fits(update, shape):
            batch = tuple(order.index(group) for group in range(out))
            yield Placement(shape, (order.index(out),), (order.index(in_),), batch)


def _fits(update: Update, shape: tuple[int, ...]) -> bool:
    if "replace" in update and update["replace"].replace.shape != shape:
        return False
    if "rows" not in update:
        return True
    part = update["rows"]
    if part.values.ndim != len(shape) or int(part.indices[-1]) >= shape[part.axis]:
        return False
    return _equal(part.values.shape, shape, but=part.axis)


def _equal(one: Iterable[int], other: Iterable[int], but: int) -> bool:
    return all(m == n for axis, (m, n) in enumerate(zip(one, other, strict=True)) if axis != but)


def _shape(update: Update, matrix: tuple[int, ...]) -> list[int]:
    if "replace" in update:
        return list(update["replace"].replace.shape)
    return list(update["rows"].values.shape) if "rows" in update else list(matrix)
