"""A table and the head that is tied to it: trained tokens change both, whatever the exporter made of the one tensor.

PEFT trains tokens of the parameter that the two modules share (peft 0.21.2 ``trainable_token_indices``), and saves
them under one name. torch's dynamo exporter keeps one tensor for both, TorchScript writes a turned copy for the head.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from pathlib import Path

import numpy as np

from loraformat.axes import Placement
from loraformat.parts import Rows
from loraformat.resolve import Match
from loraformat.updates import Update
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.model import array

__all__ = ["moves_along", "partners"]


def moves_along(update: Update) -> bool:
    """Whether both of two tied modules change: rows are trained in the tensor that they share."""
    return all(isinstance(part, Rows) for part in update.parts)


def partners(match: Match, index: Index, meant: Container[int], folder: Path) -> tuple[Match, ...]:
    """The places of the same values at the other end of a tie, but for those that another target means."""
    site, parameter = match.handle, match.parameter
    if parameter is None or len(parameter.shape) != 2:
        return ()
    other = Placement(parameter.shape, parameter.in_, parameter.out)  # what the table looks up, the head gives
    tie = f"tied: it is the tensor of {site.node.name or match.weight}"
    return tuple(
        replace(
            match,
            node=end.node.name,
            weight=end.root_name,
            placement=end.placement,
            evidence=(tie,),
            parameter=other,
            handle=end,
        )
        for end in index.sites
        if end.number not in meant and _is_tied(site, end, folder)
    )


def _is_tied(site: Site, end: Site, folder: Path) -> bool:
    """Whether one of two uses looks up what the other multiplies by: one tensor, or two of equal values."""
    if site.looks_up == end.looks_up or end.vector:
        return False
    if site.placement.matrix_shape != end.placement.matrix_shape[::-1]:
        return False
    if site.root_name == end.root_name:
        return site.placement.out == end.placement.in_
    if site.root.data_type != end.root.data_type or site.sealed or end.sealed:
        return False
    one, two = (place.to_matrix(array(s.root, folder)) for s, place in ((site, site.placement), (end, end.placement)))
    return bool(np.array_equal(one, two.T))
