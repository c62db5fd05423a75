"""Plots for ``docs/``: time and peak memory against size, the peers beside us."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.measure import Timing

__all__ = ["ratios", "time_and_memory"]

DOCS = Path(__file__).parent.parent / "docs"


def time_and_memory(
    name: str, what: str, series: Mapping[str, Mapping[float, Timing]], silent: tuple[str, ...], *, log: bool = False
) -> None:
    """``docs/NAME.svg``: medians with their spread, and peaks; nothing where matplotlib is not installed.

    Args:
        what: the size that is varied, with its unit.
        series: label → size → measurement.
        silent: labels whose memory says nothing, such as that of ``cp``.
        log: whether sizes and seconds differ by powers of ten.
    """
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    pyplot.rcParams["svg.hashsalt"] = "loraformat"  # the same numbers give the same file
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for i, (label, of) in enumerate(series.items()):
        sizes, timings, color = list(of), list(of.values()), f"C{i}"
        medians = [t.median for t in timings]
        spread = [[t.median - min(t.seconds) for t in timings], [max(t.seconds) - t.median for t in timings]]
        style = "s--" if label in silent else "o-"
        left.errorbar(sizes, medians, spread, fmt=style, capsize=3, label=label, color=color)
        if label not in silent:
            right.plot(sizes, [t.peak / 2**20 for t in timings], style, label=label, color=color)
    left.set(xlabel=what, ylabel="seconds")
    right.set(xlabel=what, ylabel="peak resident memory, MiB", yscale="log", ylim=(10, None))
    if log:
        left.set(xscale="log", yscale="log")
        right.set(xscale="log")
    else:
        left.set(ylim=(0, None), xlim=(0, None))
        right.set(xlim=(0, None))
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(series), frameon=False)
    DOCS.mkdir(exist_ok=True)
    figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})


def ratios(name: str, what: str, panels: Mapping[str, Mapping[str, Mapping[int, float]]]) -> None:
    """``docs/NAME.svg``: panel → label → size → ratio to what costs 1."""
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "loraformat"
    figure, axes = pyplot.subplots(1, len(panels), figsize=(8, 3.6), layout="constrained", sharey=True)
    labels = sorted({label for lines in panels.values() for label in lines})
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, points in lines.items():
            sizes = sorted(points)
            axis.plot(sizes, [points[n] for n in sizes], "o-", label=label, color=f"C{labels.index(label)}")
        axis.axhline(1.0, color="black", linewidth=0.8)
        ticks = sorted({n for points in lines.values() for n in points})
        axis.set(title=title, xlabel=what, xscale="log", xticks=ticks, xticklabels=ticks)
        axis.minorticks_off()
    axes[0].set(ylabel="time, as a ratio to no adapter")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    DOCS.mkdir(exist_ok=True)
    figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})
