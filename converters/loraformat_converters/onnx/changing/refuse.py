"""What keeps an update from being put into a graph: every reason, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from loraformat.errors import LoraFormatError, Problem
from loraformat.packed import spreads
from loraformat_converters.onnx.graph.trace import CODES

if TYPE_CHECKING:
    from loraformat.updates import Update
    from loraformat_converters.onnx.changing.spots import Change
    from loraformat_converters.onnx.graph.index import Site

__all__ = ["obstacles"]


_WAY = "--requantize rounds to its steps, and says what survives"

_BEFORE = "put it into the model as it was before quantisation, or leave this weight out of that"

_ATTACH = "attach it: the change then runs beside the weight"

_SCATTER = 11
"""The first opset with ScatterND, without which rows of a weight cannot be set in the graph."""


Requantises = Callable[["Site"], bool]
"""Whether a quantised weight may be rounded to its codes again, and can be."""


def obstacles(
    verb: str,
    changes: Mapping[tuple[Site, ...], Sequence[Change]],
    opset: int,
    requantises: Requantises | None = None,
) -> Iterator[Problem]:
    """At most one problem a change, the first that matters.

    Args:
        requantises: of a merge that was asked to round to codes again.
    """
    owners: dict[int, tuple[Site, ...]] = {}
    for sites, wanted in changes.items():
        for change in wanted:
            yield from list(_obstacle(verb, change, sites, requantises))[:1]
            if verb == "attach" and "rows" in change.update and opset < _SCATTER:
                what = f"opset {opset} has no operator that sets rows of a weight (ScatterND is of opset {_SCATTER})"
                yield Problem("LF-608", what, change.key, "merge it")
        if any(owners.setdefault(site.number, sites) is not sites for site in sites):
            what = f"two adapters change {sites[0].root_name}, one at some of its uses, one at others"
            yield Problem("LF-609", what, wanted[0].key, "apply one after the other: merge, then merge into the result")


def _obstacle(verb: str, change: Change, sites: tuple[Site, ...], requantises: Requantises | None) -> Iterator[Problem]:
    key, update, first = change.key, change.update, sites[0]
    in_codes = requantises is not None and first.sealed is not None and _alike(sites) and requantises(first)
    asked = requantises is not None
    refused = next((site for site in sites if site.refusal and not (asked and site.refusal == site.apart)), None)
    if refused is not None:
        way = _BEFORE if refused.root.data_type in CODES else ""
        if refused.refusal == refused.apart:
            way = _WAY if verb == "merge" else f"merge it: {_WAY}; or {_BEFORE}"
        yield Problem("LF-608", f"{refused.node.name or refused.operator}: {refused.refusal}", key, way)
    if not in_codes:
        yield from _sealed(verb, change, sites, asked=asked)
    if change.permute is not None and not update.linear:
        what = f"{first.node.name or first.operator}: its gates lie in another order, and {update.kind} is no sum"
        yield Problem("LF-608", what, key, "merge it into the checkpoint, then export")
    if change.rows is not None and not spreads(update):
        what = f"{first.node.name or first.operator}: its weight holds several parameters, and {update.kind} is no sum"
        yield Problem("LF-608", what, key, "put it into the model as it was before it was optimised")
    if len({(site.factor, site.placement) for site in sites}) > 1:
        what = "its uses read the weight in two orientations, or scale it differently"
        yield Problem("LF-608", what, key, "name the node that is meant: --names")
    if update.op == "embedding" and not first.looks_up:
        yield Problem("LF-608", f"an embedding's update cannot act on {first.operator}", key)
    yield from _misfit(change, update, first)


def _alike(sites: tuple[Site, ...]) -> bool:
    """Whether all uses make the same floats of the codes."""
    return len({(s.values[-1], s.product and (s.product.scale, s.product.zero)) for s in sites}) == 1


def _sealed(verb: str, change: Change, sites: tuple[Site, ...], *, asked: bool) -> Iterator[Problem]:
    """A weight that cannot hold a change, and what cannot be put beside one. ``asked``: to round to its codes again."""
    site = next((site for site in sites if site.sealed), None)
    if site is None:
        return
    named, update = site.node.name or site.operator, change.update
    if verb == "merge":
        what = f"{named}: {site.sealed}" + (", in steps that are not known exactly" if asked else "")
        fix = "put it into the model as it was before" if site.apart else _ATTACH
        more = f"; {_WAY}" if not asked and site.root.data_type in CODES else ""
        yield Problem("LF-608", what, change.key, fix + more)
    elif "rows" in update or "replace" in update:
        what = f"{named}: {site.sealed}, and {update.kind} is no change beside a weight, but another one"
        yield Problem("LF-608", what, change.key, "put it into the model as it was before that, or leave it out")
    elif site.dequantises and update.kind not in ("lora", "dora"):
        what = f"{named}: {site.sealed}: only a pair A, B runs beside it, and this is {update.kind}"
        yield Problem("LF-608", what, change.key, "loraformat convert --to-lora R makes one of it, and says how near")
    elif "magnitude" in update and site.bias is None:
        what = f"{named}: a magnitude rescales all but the bias, which is in the product as integers"
        yield Problem("LF-608", what, change.key, "put it into the model as it was before quantisation")


def _misfit(change: Change, update: Update, site: Site) -> Iterator[Problem]:
    """Other sizes, or axes that cannot be turned into the graph's."""
    matrix, wanted = update.matrix_shape(), site.placement.matrix_shape
    if change.rows is not None:
        wanted = (*wanted[:-2], change.rows[1] - change.rows[0], wanted[-1])
    if matrix is not None and not _covers(matrix, wanted):
        what = f"the update gives [out, in] = {list(matrix)}, {site.node.name or site.operator} computes with {list(wanted)}"
        yield Problem("LF-606", what, change.key, "is this the base that the adapter was trained on?")
        return
    try:
        turned = change.turned(site.placement)
    except LoraFormatError as error:
        yield from error.problems
        return
    if "replace" in turned and turned["replace"].replace.shape != site.placement.shape:
        new, old = list(turned["replace"].replace.shape), list(site.placement.shape)
        what = f"the update resizes {old} to {new}; the shapes of a graph are fixed when it is exported"
        yield Problem("LF-606", what, change.key, "resize the model's vocabulary first, then export it")


def _covers(matrix: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal, but for batch sizes of 1 (shared by all)."""
    sizes = zip(matrix, wanted, strict=False)
    return len(matrix) == len(wanted) and all(
        m == n or (m == 1 and i < len(wanted) - 2) for i, (m, n) in enumerate(sizes)
    )
