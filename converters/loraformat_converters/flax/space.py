"""The names of JAX models, and how they stand to torch's: by Linen's rule, or by the table of a family of models.

Both may know a key: Linen and Tunix a layer's ``…/mlp/up_proj/kernel``. Which it is, a name that only a table has must
tell, or a base.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraformat.axes import Placement
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.naming.decoders import FIX, number, text_config
from loraformat.naming.links import Link, Seat, Share
from loraformat.naming.spaces import TORCH, Known
from loraformat_converters.flax import linen, maxtext_order
from loraformat_converters.flax.families import TABLES, Row, Table
from loraformat_converters.flax.sizes import Sizes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from loraformat.updates import Update

    Indices = npt.NDArray[np.intp]

__all__ = ["Flax", "space"]


class Flax:
    """Paths joined by ``/``."""

    name = "flax"
    describes = "JAX: paths of flax's Linen and NNX, Tunix, gemma, MaxText"

    def links(self, known: Known) -> Iterator[Link]:
        """Every reading of every key; of keys that a table and Linen's rule have, the table's where another is its alone.

        Raises:
            LoraFormatError: LF-604 what a table needs of the model's config.json is not known.
        """
        tables = list(_by_tables(known))
        yield from (link for _, link in tables)
        certain = known.adapter.names != TORCH and any(not row.shared for row, _ in tables)
        told = {link.there.name for _, link in tables} if certain else set()
        yield from (link for link in _by_rule(known) if link.there.name not in told)


def _by_rule(known: Known) -> Iterator[Link]:
    adapter = known.adapter
    for key, update in adapter.items():
        if adapter.names == TORCH:
            pairs = [(key, own) for own in linen.there(key, update, known.there)]
        else:
            torch = linen.here(key, update)
            pairs = [(torch, key)] if torch is not None and (not known.names or torch in known.names) else []
        for torch, own in pairs:
            axes, own_axes = linen.axes(own, update)
            shape = None if adapter.names == TORCH else _flat(update, axes)
            here, leaf = Seat(torch, axes=axes, shape=shape), linen.leaf_of(own)
            op = "embedding" if leaf == "embedding" else None
            yield Link(here, Seat(own, axes=own_axes), f"rule: a {leaf} of flax", op=op)


def _by_tables(known: Known) -> Iterator[tuple[Row, Link]]:
    problems: list[Problem] = []
    model = text_config(known.config).get("model_type")
    for table in TABLES:
        for row in table.rows if model is None or model in table.models else ():
            for key, update in known.adapter.items():
                try:
                    yield from ((row, link) for link in _links(key, update, row, table, known))
                except LoraFormatError as error:
                    problems += error.problems
    if problems:
        raise LoraFormatError(problems)


def _links(key: str, update: Update, row: Row, table: Table, known: Known) -> Iterator[Link]:
    """The links of one key by one row of a table."""
    torch = known.adapter.names == TORCH
    for name, own, index in _places(key, update, row, known):
        name = key if torch else _at_home(name, known)
        if torch and (own not in known.there if known.there else table.by_base):
            continue
        if not torch and known.names and name not in known.names:
            continue
        axes, shape = _laid(update, own, row, index, known)
        if axes is not None and shape is not None and not _fits(update, axes, shape, row, torch):
            continue
        rows: Share | Indices | None = row.share
        scale, evidence = 1.0, table.evidence
        if row.projection:
            rows, scale, said = maxtext_order.of(row.projection, known.config, key)
            evidence = f"{evidence}, {said}"
        looked_up = "embed" in row.own
        here = {"out": "out"}.get(row.axes, "in,out" if looked_up else "out,in")
        flat = None if torch else _flat(update, here, row.share, stacked=index is not None)
        there = Seat(own, rows=rows, index=index, axes=axes, shape=shape)
        op = "embedding" if looked_up else None
        yield Link(Seat(name, axes=here, shape=flat), there, evidence, scale, op)


def _places(key: str, update: Update, row: Row, known: Known) -> Iterator[tuple[str, str, tuple[int, int] | None]]:
    """(torch name, own name, which of how many layers) that a key stands for by a row."""
    torch, (step, first) = known.adapter.names == TORCH, row.layers
    match = _pattern(row.torch).fullmatch(_away(key)) if torch else _pattern(row.own).fullmatch(key)
    if match is None:
        return
    if row.block:
        if torch and row.own.replace("#", "0") not in known.there:
            return
        layers = number(known.config, ("num_hidden_layers",), key)
        first = layers - layers % row.block
    if "#" not in row.torch:
        yield row.torch, row.own, None
    elif torch:
        layer, rest = divmod(int(match[1]) - first, step)
        if layer < 0 or rest:
            return
        if "#" in row.own:
            yield key, row.own.replace("#", str(layer)), None
        elif row.own in known.there:  # nothing else says that the layers are stacked
            yield key, row.own, (layer, number(known.config, ("num_hidden_layers",), key) // step)
    elif "#" in row.own:
        yield row.torch.replace("#", str(step * int(match[1]) + first)), key, None
    else:
        shape = update.matrix_shape() or ()
        for layer in range(shape[0] if len(shape) == 3 else 0):
            yield row.torch.replace("#", str(step * layer + first)), key, (layer, shape[0])


# Where the language model of transformers' models of several kinds of input is: version 5, and their checkpoints before.
_HOMES = ("model.", "model.language_model.", "language_model.model.")


def _away(key: str) -> str:
    """A torch key as the language model alone would have it."""
    home = next((home for home in _HOMES[1:] if key.startswith(home)), None)
    return key if home is None else f"{_HOMES[0]}{key.removeprefix(home)}"


def _at_home(name: str, known: Known) -> str:
    """What a parameter of the language model is called in the model at hand: by a base, else by its config.json."""
    if not name.startswith(_HOMES[0]):
        return name
    forms = [f"{home}{name.removeprefix(_HOMES[0])}" for home in _HOMES]
    if known.names:
        return next((form for form in forms if form in known.names), name)
    return forms["text_config" in known.config]


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\#", r"(\d{1,6})"))


def _laid(
    update: Update, own: str, row: Row, index: tuple[int, int] | None, known: Known
) -> tuple[str | None, tuple[int, ...] | None]:
    """(axes, shape) of the own tensor, with its layers; None for what nothing says."""
    words = row.axes.split(",")
    shape, place = known.there.get(own), update.placement if known.adapter.names != TORCH else None
    if index is None:
        if known.adapter.names != TORCH and place is None and shape is None:
            return (None if len(words) > 2 else row.axes), None
        split = Sizes(known.config).of(row.sizes) if len(words) > 2 else None
        return row.axes, place.shape if place is not None else shape or split
    if place is not None:
        axis = place.batch[0] if place.batch else 0
        return ",".join([*words[:axis], "batch", *words[axis:]]), place.shape
    if shape is None:
        return None, None
    found = [axis for axis in (0, 1) if shape[axis] == index[1]]
    if len(found) != 1:
        what = f"which axis of {list(shape)} counts the {index[1]} layers is not known"
        raise fault("LF-604", what, where=own, fix=FIX)
    return ",".join([*words[: found[0]], "batch", *words[found[0] :]]), shape


def _fits(update: Update, axes: str, shape: tuple[int, ...], row: Row, torch: bool) -> bool:
    """Whether a tensor of this shape, read so, holds the update's matrix; of a placed one, whether it is read so."""
    if len(shape) != len(axes.split(",")):
        return False
    place, matrix = Placement.of(shape, axes), update.matrix_shape()
    if not torch and update.placement is not None:
        return place == update.placement
    if matrix is None:
        return True
    part = row.share.stop - row.share.start if row.share is not None and torch else 1
    whole = row.share.of if row.share is not None and torch else 1
    out, in_ = place.matrix_shape[-2:]
    return (out * part, in_) == (matrix[-2] * whole, matrix[-1])


def _flat(update: Update, axes: str, share: Share | None = None, *, stacked: bool = False) -> tuple[int, ...] | None:
    """The shape of torch's [out, in] for a kernel of JAX, for a share of its rows, or for one of its layers."""
    matrix = update.matrix_shape()
    if matrix is None or len(matrix) != 2 + stacked or axes != "out,in":
        return None
    rows = matrix[-2] if share is None else matrix[-2] * (share.stop - share.start) // share.of
    return rows, matrix[-1]


space = Flax()
