"""Where an update acts: beside its operator, in its operator's product, or in its weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from loraformat_converters.onnx.attaching.branches import FORMS, Form
from loraformat_converters.onnx.attaching.widen import widens
from loraformat_converters.onnx.changing.spots import Spot
from loraformat_converters.onnx.graph.site import Site

if TYPE_CHECKING:
    from loraformat.base import Options
    from loraformat.updates import Update

__all__ = ["Place", "Topology", "is_pair", "place_of", "topology_of"]

Topology = Literal["separate", "concat", "folded"]
"""Where pairs act, if they can act there."""

Place = Literal["beside", "product", "weight"]


def place_of(spot: Spot, topology: Topology) -> Place:
    """Where the changes of a weight act: where the topology has them, if they are pairs and it is a plain weight."""
    if not _has_branch(spot):
        return "weight"
    if topology == "concat" and widens(spot):
        return "product"
    plain = all(site.sealed is None and site.product is None for site in spot.sites)
    return "weight" if topology == "folded" and plain else "beside"


def _has_branch(spot: Spot) -> bool:
    """Whether every change of this weight is a pair, or a pair with a magnitude, that its operators can run beside it."""
    first, form = spot.sites[0], FORMS.get(spot.sites[0].like)
    if form is None or first.vector or any(s.operand != first.operand for s in spot.sites):
        return False
    if any(FORMS.get(site.like) is not form for site in spot.sites):
        return False
    return all(is_pair(change.update, form, first) for change in spot.changes)


def is_pair(update: Update, form: Form, site: Site) -> bool:
    """Whether it is a pair, or a pair with a magnitude that can rescale the operator's output."""
    if update.kind not in ("lora", "dora") or update["lora"].mid is not None:
        return False
    return update.kind == "lora" or (update["magnitude"].magnitude_axes is None and form.spread(site) is not None)


def topology_of(options: Options) -> Topology:
    """As it is asked for; else as is fast on the provider: facts of bench/onnx_modes.py."""
    if options.topology == "auto":
        return "concat" if options.provider == "cuda" and not options.prefold else "separate"
    return options.topology  # type: ignore[return-value]
