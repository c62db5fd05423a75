"""The anatomy of an adapter for ``info --deep``: a line for each kind of target, then what is dead, odd or double."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.cli.printing import counted, printable, table
from loraformat.spans import span

if TYPE_CHECKING:
    from loraformat.verbs.anatomy import Anatomy, Organ

__all__ = ["deep_json", "deep_lines", "organ_json"]

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 16
_SHOWN = 5


def deep_lines(found: Anatomy) -> Iterator[str]:
    """For a person."""
    from loraformat.verbs.anatomy import kind_of

    kinds: dict[str, list[Organ]] = {}
    for key, organ in found.organs.items():
        kinds.setdefault(kind_of(key), []).append(organ)
    rows: list[tuple[str, ...]] = [("target", "‖ΔW‖", "effective rank", "90 %", "99 %", "singular values", "")]
    for kind, organs in kinds.items():
        times = f"×{len(organs)}" if len(organs) > 1 else ""
        effective = [organ.effective_rank for organ in organs]
        ranks = [span(organ.rank_for(energy) for organ in organs) for energy in (0.9, 0.99)]
        sizes = span(organ.norm for organ in organs)
        rows.append((printable(kind), sizes, span(effective), *ranks, _spectrum(organs), times))
    yield from table(rows)
    yield "effective rank: exp of the entropy of the singular values; 90 %, 99 %: the rank that holds so much of ‖ΔW‖²"
    if found.dead:
        yield f"dead: {counted(len(found.dead), 'target')} with ΔW = 0: {_some(found.dead)}"
    for key, ratio in found.outliers.items():
        yield f"outlier: {printable(key)}: its ΔW is {ratio:.2g} times what is usual among its like"
    for group in found.duplicates:
        yield f"duplicates: {counted(len(group), 'target')} with the same parts: {_some(group)}"


def organ_json(organ: Organ) -> dict[str, Any]:
    """Of one target, for ``--json``."""
    return {
        "norm": organ.norm,
        "rms": organ.rms,
        "effective_rank": organ.effective_rank,
        "rank_90": organ.rank_for(0.9),
        "rank_99": organ.rank_for(0.99),
        "singular_values": organ.sigma[0].tolist() if len(organ.sigma) == 1 else organ.sigma.tolist(),
    }


def deep_json(found: Anatomy) -> dict[str, Any]:
    """Of the whole, for ``--json``."""
    return {
        "dead": list(found.dead),
        "outliers": dict(found.outliers),
        "duplicates": [list(group) for group in found.duplicates],
    }


def _spectrum(organs: Sequence[Organ]) -> str:
    """The mean singular values, each of its largest, as bars on a scale of their own."""
    from loraformat.verbs.anatomy import spectra_of

    grid = spectra_of(organs)
    if not len(grid):
        return ""
    length, mean = grid.shape[1], grid.mean(axis=0)
    points = mean[np.linspace(0, length - 1, min(length, _WIDTH)).round().astype(int)]
    return "".join(_BARS[min(len(_BARS) - 1, int(value * len(_BARS)))] for value in points)


def _some(keys: Sequence[str]) -> str:
    rest = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(map(printable, keys[:_SHOWN])) + rest
