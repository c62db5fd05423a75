"""Copies: a call of a module whose weight a tool packed with others', under no name.

ONNX Runtime's optimizer puts q, k and v of each attention into a tensor of its own. Of a module that is called several
times (the layers of ALBERT are one) it may fuse some calls and leave others, which still go by the module's name: changed
there alone, the model would be neither the old nor the new.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from loraformat.errors import Problem
from loraformat.likeness import ACCEPT, cosine
from loraformat_converters.onnx.attaching.apart import widths

if TYPE_CHECKING:
    from loraformat_converters.onnx.changing.spots import Change
    from loraformat_converters.onnx.graph.site import Site
    from loraformat_converters.onnx.graph.values import Values

__all__ = ["copied"]

_PACKED = ("com.microsoft.Attention", "com.microsoft.QAttention")


def copied(values: Values, changes: Mapping[tuple[Site, ...], Sequence[Change]]) -> Iterator[Problem]:
    """LF-609 for every change of a weight that an attention holds too, which no target means."""
    meant = {site.number for sites in changes for site in sites}
    packed = [site for site in values.index.sites if site.operator in _PACKED and site.number not in meant]
    for (first, *_), (change, *_) in changes.items():
        if change.rows is None and (site := next((one for one in packed if _holds(values, one, first)), None)):
            what = f"{first.node.name} reads its weight, and {site.node.name} holds it too, as rows of {site.root_name}"
            fix = "put it into the model as it was before the attention was fused"
            yield Problem("LF-609", what, change.key, fix)


def _holds(values: Values, packed: Site, site: Site) -> bool:
    """Whether q, k or v of an attention is the weight of a product."""
    if site.vector or len(site.operand.shape) != 2:
        return False
    sizes, (out, in_) = widths(packed), site.placement.matrix_shape
    own = values.sketch(site) if in_ == packed.placement.matrix_shape[-1] and out in sizes else None
    if own is None:
        return False
    starts = [start for start, size in zip(accumulate((0, *sizes)), sizes, strict=False) if size == out]
    runs = (values.sketch(packed, rows=(start, start + out)) for start in starts)
    return any(run is not None and cosine(own, run) >= ACCEPT for run in runs)
