"""Finding a target by its values: ``fingerprint``, equal to the tensor in ``--base``, and ``sketch``, like it.

Both work where a graph kept no names. They answer with every site that they cannot tell apart: weights of equal values
are twins, and only a name says which of them is meant.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraformat.dtypes import numpy_dtype
from loraformat.errors import LoraFormatError, fault
from loraformat.likeness import Recognised, cosine, has_scale, recognise, unlike
from loraformat.resolve import Hints, Match
from loraformat.sketch import sketch, telling
from loraformat_converters.onnx.graph.index import Site
from loraformat_converters.onnx.graph.model import FLOATS
from loraformat_converters.onnx.graph.site import Order
from loraformat_converters.onnx.graph.values import Values, fingerprint

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.axes import Placement
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Finder", "Sighting", "own_sketch"]


_RUNS = 512
"""How many runs of rows are looked at in one weight: more would be no packed weight, but a vocabulary."""


@dataclass(frozen=True)
class Sighting:
    """The sites whose values are those of a target.

    Attributes:
        rung: ``fingerprint`` or ``sketch``.
        told: what was seen, in words.
        cosine: of the best; 1.0 for equal values.
        rows: which rows of the sites' matrix the target is, where they hold several.
        order: of the target's rows there, where it is not the only one that they may have.
    """

    rung: str
    told: str
    sites: tuple[Site, ...]
    cosine: float = 1.0
    rows: tuple[int, int] | None = None
    order: Order = None


class Finder:
    """Looks for the targets of one adapter among the sites of one graph."""

    def __init__(self, sites: Sequence[Site], values: Values, adapter: Adapter, hints: Hints) -> None:
        self.sites, self.values, self.adapter = sites, values, adapter
        self.base = hints.base
        self.matches = self._matches()
        self._wanted: dict[tuple[str, str], tuple[str, ...]] = {}
        self._drawn: dict[str, Array | None] = {}

    def _matches(self) -> dict[str, Match]:
        """Target → where it lies in ``--base``, as far as that is known."""
        if self.base is None:
            return {}
        found = self.base.resolve(self.adapter, Hints()).targets
        return {key: matches[0] for key, matches in found.items() if matches}

    def _weight(self, key: str) -> tuple[Array, Placement | None] | None:
        """The tensor of ``--base``; without a placement where nothing tells its orientation."""
        if self.base is None:
            return None
        known = self.base.parameters()
        match = self.matches.get(key)
        name = match.name_in(known) if match else (key if key in known else None)
        if name is None:
            return None
        weight = self.base.read(name)
        if match is not None and weight.shape != match.placement.shape:
            return None  # a vocabulary that the adapter resizes
        return weight, match.placement if match else None

    def look(self, key: str, named: Sequence[Site] = ()) -> list[Sighting]:
        """What is seen of a target: at the sites that go by its name, and if it is not there, everywhere.

        Raises:
            LoraFormatError: LF-616 what is seen is a multiple of its weight; LF-603 it is seen in several runs or orders of rows.
        """
        if own_sketch(self.adapter[key]) is None and self.base is None:
            return []
        fit = self._of_shape(key)
        here, elsewhere = ([site for site in fit if (site in named) is there] for there in (True, False))
        equal = self._equal(key, here) or self._equal(key, elsewhere)
        if equal and own_sketch(self.adapter[key]) is None:  # a sketch of the same tensor would say it again
            return [equal]
        alike = self._alike(key, here) or self._alike(key, elsewhere)
        if not alike and not equal:
            alike = self._within(key)
        if alike:
            self._require_scale(key, alike)
        return [sighting for sighting in (equal, alike) if sighting]

    def _require_scale(self, key: str, seen: Sighting) -> None:
        wanted = self._sketch(key)
        for site in seen.sites:
            drawn = self.values.sketch(site, seen.order, seen.rows)
            if wanted is not None and drawn is not None and (problem := unlike(key, wanted, drawn, site.root_name)):
                raise LoraFormatError([problem])

    def silence(self, key: str) -> str:
        """What to add where nothing was found: how near the nearest weight came."""
        wanted = self._sketch(key)
        drawn = [s for site in self._of_shape(key) if (s := self.values.sketch(site)) is not None]
        if wanted is None or not drawn:
            return ""
        return f", and none is like its sketch (cosine ≤ {max(cosine(wanted, other) for other in drawn):.2f})"

    def _of_shape(self, key: str) -> list[Site]:
        shape = _matrix_shape(self.adapter[key], self.matches.get(key))
        embedding = self.adapter[key].op == "embedding"
        fit = (s for s in self.sites if shape is not None and self.values.shape(s) == shape)
        return [site for site in fit if site.looks_up == embedding]

    def _equal(self, key: str, sites: Sequence[Site]) -> Sighting | None:
        """The sites whose weight is the tensor of ``--base``, cast to the graph's dtype."""
        equal: list[tuple[Site, Order]] = []
        for site in sites:
            dtype = FLOATS.get(site.root.data_type)
            wanted = self._fingerprints(key, dtype) if dtype is not None else ()
            equal += [(site, order) for order in site.orders if self.values.fingerprint(site, order) in wanted]
        if not equal or self.base is None:
            return None
        return _seen(key, "fingerprint", f"equals {key} of {self.base.path.name}", equal)

    def _fingerprints(self, key: str, dtype: str) -> tuple[str, ...]:
        """Of the tensor in ``--base`` as [out, in]; both readings of one whose orientation nothing tells."""
        if (key, dtype) not in self._wanted:
            found = self._weight(key)
            readings: list[Array] = []
            if found is not None:
                weight, place = found
                turned = [weight, weight.T] if weight.ndim == 2 else []
                readings = turned if place is None else [place.to_matrix(weight)]
            self._wanted[key, dtype] = tuple(fingerprint(m.astype(numpy_dtype(dtype))) for m in readings)
        return self._wanted[key, dtype]

    def _alike(self, key: str, sites: Sequence[Site]) -> Sighting | None:
        """The sites whose weight the target's sketch recognises."""
        wanted = self._sketch(key)
        if wanted is None or not wanted.any():
            return None
        readings = [(site, order) for site in sites for order in site.orders]
        known: dict[Hashable, Array] = {}
        for site, order in readings:
            drawn = self.values.sketch(site, order)
            if drawn is not None:
                known[self.values.key(site), order] = drawn
        met = recognise(wanted, known)
        if not met.names:
            return None
        fits = [(site, order) for site, order in readings if (self.values.key(site), order) in met.names]
        return _seen(key, "sketch", _told(met), fits, met.cosine)

    def _within(self, key: str) -> Sighting | None:
        """The run of rows that the target's sketch recognises, in a weight that holds several parameters."""
        wanted, shape = self._sketch(key), _matrix_shape(self.adapter[key], self.matches.get(key))
        if wanted is None or not wanted.any() or shape is None or len(shape) != 2:
            return None
        known: dict[Hashable, Array] = {}
        places: dict[Hashable, list[tuple[Site, int]]] = {}
        for site in self.sites:
            whole = None if site.vector or site.looks_up else self.values.shape(site)
            if whole is None or len(whole) != 2 or whole[1] != shape[1] or whole[0] <= shape[0]:
                continue
            step = math.gcd(whole[0], shape[0])
            if whole[0] // step > _RUNS:
                continue
            for start, drawn in self.values.sketches(site, shape[0], step).items():
                run = (self.values.key(site), start)
                known[run] = drawn
                places.setdefault(run, []).append((site, start))
        met = recognise(wanted, known)
        found = [place for run in met.names for place in places[run]]
        if not found:
            return None
        sites, starts = [site for site, _ in found], sorted({start for _, start in found})
        if len(starts) > 1:
            what = f"its sketch means {len(starts)} runs of rows of {sites[0].root_name}: from {starts[0]}, from {starts[1]}"
            raise fault("LF-603", what, where=key)
        rows = (starts[0], starts[0] + shape[0])
        told = f"rows {rows[0]} to {rows[1]} of {self.values.shape(sites[0])}, {_told(met)}"
        return Sighting("sketch", told, tuple(sites), met.cosine, rows)

    def _sketch(self, key: str) -> Array | None:
        """The adapter's own; that of the tensor in ``--base`` where it has none that tells a scale.

        Beside an unplaced target it says nothing.
        """
        if key not in self._drawn:
            drawn = own = own_sketch(self.adapter[key])
            if own is None or not has_scale(own):
                weight, place = self._weight(key) or (None, None)
                drawn = sketch(weight, place) if weight is not None and place is not None and telling(place) else own
            self._drawn[key] = drawn
        return self._drawn[key]


def _seen(key: str, rung: str, told: str, found: Sequence[tuple[Site, Order]], cosine: float = 1.0) -> Sighting:
    """Sites in whose values a target was seen; LF-603 if its rows would be in several orders there."""
    sites, orders = tuple(site for site, _ in found), {order for _, order in found}
    if len(orders) > 1:
        raise fault(
            "LF-603", f"its values are those of {sites[0].root_name} in {len(orders)} orders of rows", where=key
        )
    (order,) = orders
    return Sighting(rung, told, sites, cosine, order=order)


def own_sketch(update: Update) -> Array | None:
    """The sketch that the adapter brings for a target, where it tells one weight from another."""
    return update.sketch if update.placement is not None and telling(update.placement) else None


def _matrix_shape(update: Update, match: Match | None) -> tuple[int, ...] | None:
    place = update.placement or (match.placement if match else None)
    return place.matrix_shape if place is not None else update.matrix_shape()


def _told(met: Recognised[Hashable]) -> str:
    return f"cosine {met.cosine:.3f}, the next {met.second:.2f}"
