"""What keeps a weight from having slots, or an update from being fed: every reason, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from loraformat.errors import LoraFormatError, Problem
from loraformat_converters.onnx.attaching.branches import FORMS, LINEAR
from loraformat_converters.onnx.attaching.pairs import Form, folded, laid
from loraformat_converters.onnx.attaching.slot_names import gain_of, inputs_of
from loraformat_converters.onnx.attaching.topology import is_pair
from loraformat_converters.onnx.changing.spots import Spot
from loraformat_converters.onnx.graph.index import Index

if TYPE_CHECKING:
    from loraformat.base import Options
    from loraformat.updates import Update

__all__ = ["FORMS_FED", "obstacles"]

FORMS_FED: Mapping[str, Form] = {
    **dict.fromkeys((*LINEAR, "Gather"), "linear"),
    **dict.fromkeys(("Conv", "ConvTranspose"), "conv"),
}
"""The operators that take a pair that is fed, and how it lies."""


def obstacles(spots: Sequence[Spot], options: Options, index: Index) -> Iterator[Problem]:
    """Why a weight, or a change of it, has no slot."""
    seen: set[str] = set()
    for spot in (part for whole in spots for part in whole.parts()):
        site = spot.sites[0]
        if spot.key in seen:
            yield Problem(
                "LF-608", "the graph reads its weight in two ways, and a slot lies in one", spot.key, "--mode branch"
            )
        seen.add(spot.key)
        if (
            site.like not in FORMS_FED
            or site.vector
            or any(s.operand != site.operand or s.like != site.like for s in spot.sites)
        ):
            what = f"{site.like} takes no pair that is fed" + (" to a vector" if site.vector else "")
            yield Problem("LF-608", what, spot.key, "--mode branch, or --only for the other targets")
            continue
        for change in spot.changes:
            try:
                names = _names(spot, change.update, options)
            except LoraFormatError as error:
                yield from error.problems
                break
            if taken := [name for name in names if name in index.taken]:
                yield Problem("LF-608", f"the model has a value {taken[0]} already", spot.key, "another --slot-names")
                break
    yield from _too_wide(spots, options)


def _names(spot: Spot, update: Update, options: Options) -> Sequence[str]:
    """The inputs that an update is fed by; LF-508, LF-705 of one that cannot be."""
    site, style = spot.sites[0], options.slot_names
    names = inputs_of(spot.key, style)  # type: ignore[arg-type]
    if is_pair(update, FORMS[site.like], site) and "magnitude" in update:
        return (*names, gain_of(spot.key, style))  # type: ignore[arg-type]
    kernel = [site.operand.shape[a] for a in site.operand.in_][1:]
    laid(spot.key, folded(update), FORMS_FED[site.like], kernel)
    return names


def _too_wide(spots: Sequence[Spot], options: Options) -> Iterator[Problem]:
    if options.pad_rank is None:
        return
    for spot in spots:
        for change in spot.changes:
            if "lora" in change.update and change.update["lora"].r > options.pad_rank:
                yield Problem(
                    "LF-606", f"its rank is {change.update['lora'].r}, over --pad-rank {options.pad_rank}", change.key
                )
