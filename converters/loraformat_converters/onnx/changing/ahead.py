"""Products that an exporter computed ahead: a call of a module on a constant is a stored tensor, which no change reaches.

torch's exporter folds them, and a cell that starts from a constant state is called on one. The calls that are left are
changed, this one is not: the model would be neither the old nor the new. What says so is the tensor's own values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.errors import Problem
from loraformat_converters.onnx.graph.model import FLOATS, array

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat_converters.onnx.changing.spots import Change
    from loraformat_converters.onnx.graph.index import Site
    from loraformat_converters.onnx.graph.values import Values

    Array = npt.NDArray[Any]

__all__ = ["computed_ahead"]

_PRODUCT = re.compile(r"(linear|addmm|matmul|mm)(_\d+)?")
"""What torch.onnx (2.13, dynamo) calls the value of a product, one that it folded too; its own constants are ``val_7``."""

_SAME = 1e-5
"""How near the nearest c·Wᵀ + b must come, relative to what is stored, where W has more rows than columns."""


def computed_ahead(values: Values, changes: Iterable[tuple[tuple[Site, ...], list[Change]]]) -> Iterator[Problem]:
    """LF-608 for every change of a weight or bias of which a product is stored too."""
    held = {
        name: array(tensor, values.folder).astype(np.float32)
        for name, tensor in values.index.roots.items()
        if _PRODUCT.fullmatch(name) and tensor.data_type in FLOATS and len(tensor.dims) > 1
    }
    for sites, wanted in changes if held else ():
        site = sites[0]
        weight, bias = _of_module(values, site)
        for name, product in held.items():
            x = _constant(product, weight, bias)
            if x is not None and (site.vector or x.any()):
                what = (
                    f"a product of it and a constant was computed when the model was exported, and is stored as {name}"
                )
                fix = "export with that constant as an input, or merge into the checkpoint, then export"
                yield Problem("LF-608", what, wanted[0].key, fix)
                break


def _of_module(values: Values, site: Site) -> tuple[Array | None, Array | None]:
    """(W [out, in], b) of the operator of a site; None for what is not known."""
    mine = [other for other in values.index.sites if other.node is site.node and not other.refusal]
    found: dict[bool, Array] = {}
    for other in mine:
        read = values.read(other)
        if read is not None:
            matrix = read[1].to_matrix(read[0]).astype(np.float32)
            found[other.vector] = matrix.reshape(-1) if other.vector else matrix
    return found.get(False), found.get(True)


def _constant(product: Array, weight: Array | None, bias: Array | None) -> Array | None:
    """c with c·Wᵀ + b = the product; None where there is none, or where nothing tells."""
    out = len(bias) if bias is not None else len(weight) if weight is not None else 0
    if product.shape[-1] != out:
        return None
    rest = product.reshape(-1, out) - (0 if bias is None else bias)
    if not rest.any():
        return np.zeros(1, np.float32) if bias is not None and bias.any() else None
    if weight is None or weight.ndim != 2 or weight.shape[0] <= weight.shape[1]:
        return None
    x, *_ = np.linalg.lstsq(weight, rest.T)
    near = np.linalg.norm(weight @ x - rest.T) <= _SAME * np.linalg.norm(product)
    return np.asarray(x) if near else None
