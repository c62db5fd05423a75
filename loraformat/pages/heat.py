"""The heat map: a row for each layer, a column for each module, in each cell how much the adapter changes there."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.pages.html import Markup, element, said

if TYPE_CHECKING:
    from loraformat.pages.facts import Facts

__all__ = ["Heat", "heat_map"]

_ROWS = 300  # beyond it, what lies deeper than the first number is put together
_NO_LAYER = "—"


@dataclass(frozen=True, slots=True)
class Heat:
    """Values by layer and module.

    Attributes:
        cells: (layer, module) → value; None where there is a target and no value.
        relative: whether they are ‖ΔW‖ / ‖W‖; else ‖ΔW‖.
    """

    cells: Mapping[tuple[str, str], float | None]
    relative: bool

    @classmethod
    def of(cls, facts: Facts) -> Heat:
        """‖ΔW‖ / ‖W‖ where the base is known, of several targets in one cell together."""
        squares: dict[str, tuple[float, float] | None] = {}
        for key in facts.adapter:
            norms, organ = facts.norms.get(key), facts.anatomy.organs.get(key)
            if facts.norms:
                squares[key] = (norms.delta, norms.base) if norms and norms.change is not None else None
            else:
                squares[key] = (organ.norm**2, 1.0) if organ else None
        last = {key: _split(key, -1) for key in squares}
        few = len({layer for layer, _ in last.values()}) <= _ROWS
        places = last if few else {key: _split(key, 0) for key in squares}
        sums: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for key, pair in squares.items():
            sums.setdefault(places[key], []).extend([pair] if pair else [])
        return cls({place: _together(pairs, bool(facts.norms)) for place, pairs in sums.items()}, bool(facts.norms))

    @property
    def full(self) -> float:
        """What is shown in full colour: the largest value, unless it would take the colour from all others."""
        values = sorted(value for value in self.cells.values() if value is not None)
        return min(values[-1], 2 * values[int(0.9 * (len(values) - 1))] or values[-1]) if values else 0.0

    @property
    def capped(self) -> bool:
        """Whether some value is more than what is shown in full colour."""
        return any(value is not None and value > self.full for value in self.cells.values())


def heat_map(heat: Heat) -> Markup:
    """A table that is read as well as seen."""
    layers = sorted({layer for layer, _ in heat.cells}, key=_natural)
    modules = sorted({module for _, module in heat.cells}, key=_natural)
    unit = "‖ΔW‖ / ‖W‖ in per cent" if heat.relative else "‖ΔW‖"
    head = element("tr", element("th", "layer", scope="col"), [element("th", said(m), scope="col") for m in modules])
    rows = [
        element("tr", element("th", said(layer), scope="row"), [_cell(heat, layer, module) for module in modules])
        for layer in layers
    ]
    above = element("p", f"{unit}, by layer and module; – where the adapter changes nothing", class_="soft")
    table = element("table", element("thead", head), element("tbody", rows), class_="heat")
    end = f"{_short(heat.full, heat.relative)}{' and more' if heat.capped else ''}"
    scale = element("p", "0", element("span", aria_hidden="true"), end, class_="scale")
    return Markup(above + element("div", table, class_="scroll", tabindex=0, role="region", aria_label=unit) + scale)


def _cell(heat: Heat, layer: str, module: str) -> Markup:
    if (layer, module) not in heat.cells:
        return element("td", "–", class_="none")
    value = heat.cells[layer, module]
    if value is None:
        return element("td", "·", class_="none", title="absolute values: no ΔW without the base")
    share = min(1.0, value / heat.full) if heat.full else 0.0
    return element("td", _short(value, heat.relative), style=f"--v:{share:.3f}")


def _split(key: str, which: int) -> tuple[str, str]:
    """(layer, module): cut after the last number of the name, or the first."""
    name = key.removesuffix(".weight")
    numbers = [match.end() for match in re.finditer(r"(?<![A-Za-z0-9])\d+(?=[./_])", name)]
    if not numbers:
        return _NO_LAYER, name
    cut = numbers[which]
    return name[:cut], name[cut + 1 :]


def _together(pairs: list[tuple[float, float]], relative: bool) -> float | None:
    if not pairs:
        return None
    delta, base = (math.fsum(pair[i] for pair in pairs) for i in (0, 1))
    return math.sqrt(delta / base) if relative and base else math.sqrt(delta)


def _short(value: float, relative: bool) -> str:
    return f"{100 * value:.3g}" if relative else f"{value:.3g}"


def _natural(text: str) -> list[tuple[int, str]]:
    """Numbers by their size, and before words."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", text)]
