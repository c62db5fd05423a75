"""What keeps a weight from being changed row by row: every reason, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import onnx

from loraformat.errors import Problem
from loraformat_converters.onnx.attaching.branches import LINEAR
from loraformat_converters.onnx.attaching.choice import INDEX, WEIGHTS
from loraformat_converters.onnx.attaching.rows import RowsOf, starts
from loraformat_converters.onnx.changing.spots import Change, Spot
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.operators import attribute

if TYPE_CHECKING:
    from loraformat.base import Options

__all__ = ["obstacles"]

_FIRST_OPSET = 11
"""The first whose Pad and Slice take their numbers as inputs."""


def obstacles(spots: Sequence[Spot], options: Options, index: Index, model: onnx.ModelProto) -> Iterator[Problem]:
    """Why a weight cannot be changed row by row, every one of them."""
    name = INDEX if options.select == "index" else WEIGHTS
    if name in index.taken:
        yield Problem("LF-608", f"the model has a value {name} already", fix="rename it first")
    if index.opset < _FIRST_OPSET:
        yield Problem(
            "LF-608",
            f"a stack is written for opset {_FIRST_OPSET} or newer, and this is {index.opset}",
            fix="convert its opset first",
        )
        return
    rows = RowsOf(model, starts(model, options.rows))
    for spot in spots:
        if why := next(filter(None, (_refusal(site, rows) for site in spot.sites)), ""):
            yield Problem(
                "LF-608", why, spot.key, "--only for the other targets, --rows for other inputs, or --mode swap"
            )
            continue
        for change in spot.changes:
            if change.update.kind == "dora" and all(_rescaled(site, change, rows) for site in spot.sites):
                if options.select == "weights":
                    what = "a dora update is not linear in its weight, in PEFT: a row can choose it, and not mix it"
                    yield Problem("LF-608", what, change.key, "--select index; or merge it, or --mode branch")
                continue
            if change.update.kind != "lora" or change.update["lora"].mid is not None:
                what = f"a {change.update.kind} update is no pair A, B, of which a row could choose one"
                if change.update.kind == "dora" and (like := spot.sites[0].like) not in LINEAR:
                    what = f"a row can choose a dora update of a product only, and {like} is none"
                ways = (
                    "--to-lora R when it is converted, whose residual is printed"
                    if change.update.linear
                    else "merge it, or --mode branch"
                )
                yield Problem("LF-608", what, change.key, ways)


def _rescaled(site: Site, change: Change, rows: RowsOf) -> bool:
    """Whether a row can choose g = m/‖V‖ of a DoRA too: the bias, of which it keeps 1 - g, is one vector for all rows."""
    plain = (
        site.like in LINEAR and change.update["lora"].mid is None and change.update["magnitude"].magnitude_axes is None
    )
    return plain and site.bias is not None and (not site.bias or rows.is_vector(site.bias))


def _refusal(site: Site, rows: RowsOf) -> str:
    if site.like not in (*LINEAR, "Gather", "Conv", "ConvTranspose") or site.vector or site.operand.batch:
        return f"{site.like} has no form in which a row could choose its weight"
    if site.like in LINEAR and site.side == 0:
        return f"{site.like} has its weight on the left, and the rows beside each other on the right"
    state = rows.of(site)
    if isinstance(state, str):
        return state
    if state.axis != 0 or attribute(site.node, "transA", 0):
        return (
            f"{site.node.name or site.like} reads the rows along axis {state.axis}; along axis 0 they can be told apart"
        )
    if site.like in LINEAR and rows.axes(site.x) == 1:
        return f"{site.node.name or site.like} multiplies along the axis of the rows"
    if site.like in ("Conv", "ConvTranspose") and state.per != 1:
        return f"{site.node.name or site.like} reads several entries for a row"
    return ""
