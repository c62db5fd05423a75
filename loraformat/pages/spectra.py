"""Spectra: for each kind of target the singular values of its ΔW, each a share of the largest, mean and range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from loraformat.pages.html import Markup, element, said
from loraformat.spans import span
from loraformat.verbs.anatomy import kind_of, spectra_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.verbs.anatomy import Anatomy, Organ

    F64 = npt.NDArray[np.float64]

__all__ = ["spectra"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 250, 96, 26, 16
_POINTS = 64


def spectra(found: Anatomy) -> Markup:
    """A figure for each kind of target that is not dead, with its numbers below."""
    kinds: dict[str, list[Organ]] = {}
    for key, organ in found.organs.items():
        if not organ.dead:
            kinds.setdefault(kind_of(key), []).append(organ)
    return element("div", [_figure(kind, organs) for kind, organs in kinds.items()], class_="figures")


def _figure(kind: str, organs: Sequence[Organ]) -> Markup:
    effective = [organ.effective_rank for organ in organs]
    width = max(organ.sigma.shape[1] for organ in organs)
    told = f"effective rank {span(effective)} of {width} · 90 % of ‖ΔW‖² in {span(o.rank_for(0.9) for o in organs)}"
    times = f" ×{len(organs)}" if len(organs) > 1 else ""
    return element(
        "figure", _drawn(organs, f"singular values: {told}"), element("figcaption", said(kind), times), _soft(told)
    )


def _drawn(organs: Sequence[Organ], label: str) -> Markup:
    grid = spectra_of(organs)
    length = grid.shape[1]
    grid = grid[:, np.unique(np.linspace(0, length - 1, min(length, _POINTS)).round().astype(int))]
    low, mean, high = grid.min(axis=0), grid.mean(axis=0), grid.max(axis=0)
    if len(mean) == 1:  # a line needs two points
        low, mean, high = (np.repeat(values, 2) for values in (low, mean, high))
    bottom = _HEIGHT - _BOTTOM
    axis = element("path", d=f"M{_LEFT} 6V{bottom}H{_WIDTH - 4}", class_="axis", fill="none")
    band = element("polygon", points=f"{_points(high)} {_points(low[::-1], back=True)}", class_="band")
    line = element("polyline", points=_points(mean), class_="mean")
    words = [
        element("text", "1", x=_LEFT - 6, y=13, text_anchor="end"),
        element("text", "0", x=_LEFT - 6, y=bottom, text_anchor="end"),
        element("text", "1", x=_LEFT, y=_HEIGHT - 2),
        element("text", str(length), x=_WIDTH - 4, y=_HEIGHT - 2, text_anchor="end"),
    ]
    return element("svg", axis, band, line, words, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label)


def _points(values: F64, *, back: bool = False) -> str:
    across = np.linspace(_LEFT, _WIDTH - 4, len(values))
    down = (_HEIGHT - _BOTTOM) - values * (_HEIGHT - _BOTTOM - 8)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across[::-1] if back else across, down, strict=True))


def _soft(text: str) -> Markup:
    return element("p", text, class_="soft")
