"""Measuring: variants interleaved in one run, medians and spread, ratios to a peer or a physical limit."""

from __future__ import annotations

import compileall
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Run", "Timing", "command", "interleave", "row"]

Run = Callable[[], tuple[float, float, int]]
"""Runs something once: (wall seconds, processor seconds, peak resident bytes)."""


@dataclass(frozen=True)
class Timing:
    """Wall and processor seconds of every run and the largest resident set, in bytes.

    What else the machine does shows in the wall seconds, and far less in the processor's.
    """

    seconds: Sequence[float]
    processor: Sequence[float]
    peak: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def command(*words: str, anonymous: bool = False) -> Run:
    """A runner of a command; its output is thrown away.

    Args:
        anonymous: the peak is that of the memory that no file backs (RssAnon), looked at every 5 ms; else the largest
            resident set, in which mapped files count.
    """

    def run() -> tuple[float, float, int]:
        begin = time.perf_counter()
        pid = os.posix_spawn(
            words[0],
            words,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)],
        )
        own = _anonymous(pid) if anonymous else None
        _, status, usage = os.wait4(pid, 0)
        if status:
            raise RuntimeError(f"{' '.join(words)} failed with status {status}")
        peak = usage.ru_maxrss * 1024 if own is None else own
        return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, peak

    return run


def _anonymous(pid: int) -> int:
    """The peak of a process's anonymous memory, in bytes, once it has ended."""
    peak = 0
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))])
        time.sleep(0.005)
    return peak


def interleave(variants: Mapping[str, Run], runs: int) -> dict[str, Timing]:
    """Every variant ``runs`` times, one after the other, after one round that warms the caches."""
    for package in ("loraformat", "converters"):  # as pip does; a tree of sources may be without
        compileall.compile_dir(Path(__file__).parent.parent / package, quiet=1)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    processor: dict[str, list[float]] = {name: [] for name in variants}
    peaks = dict.fromkeys(variants, 0)
    for i in range(runs + 1):
        for name, run in variants.items():
            wall, worked, peak = run()
            if i:
                seconds[name].append(wall)
                processor[name].append(worked)
                peaks[name] = max(peaks[name], peak)
    return {name: Timing(seconds[name], processor[name], peaks[name]) for name in variants}


def row(name: str, timing: Timing, peer: Timing, budget: str) -> str:
    """``info   0.26 s (0.25–0.30)   0.25 s   60 MiB   1.95 ×   budget ≤ 2.5 ×``."""
    low, high = min(timing.seconds), max(timing.seconds)
    ratio = timing.median / peer.median
    spread = f"({low:.3f}–{high:.3f})"
    worked, mebibytes = statistics.median(timing.processor), timing.peak / 2**20
    return (
        f"{name:28} {timing.median:7.3f} s {spread:16} {worked:7.2f} s {mebibytes:7.0f} MiB   {ratio:5.2f} ×   {budget}"
    )
