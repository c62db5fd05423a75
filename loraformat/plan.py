"""What a verb will do, as data, before the first byte is written; and what it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.tiles import Norms

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.base import Options
    from loraformat.resolve import Resolution

__all__ = ["Job", "Outcome", "Plan", "Proof", "difference", "size"]


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter and the places of its targets; ``name`` is what it is called where it stays apart (``attach``).

    Of a share of an adapter whose keys name components, ``components`` are all of these.
    """

    adapter: Adapter
    resolution: Resolution
    name: str = "default"
    components: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be read and written, and the most memory that it takes.

    Attributes:
        verb: ``merge`` or ``attach``.
        jobs: what is applied, in this order.
        steps: one line a target, in the words of the base.
        reads, writes: bytes.
        peak: bytes of anonymous memory beyond the imports.
        notes: what a person should know: tied weights, copied data files.
        state: what the base itself needs to apply the plan; opaque to everyone else.
        estimate: makes, of a run of rows of each weight that changes, what rounding loses of ΔW; None where nobody knows.
        copies: files that are copied as they are, which takes no room where the file system has references for that.
    """

    verb: str
    jobs: tuple[Job, ...]
    options: Options
    steps: tuple[str, ...]
    reads: int
    writes: int
    peak: int
    notes: tuple[str, ...] = ()
    state: Any = None
    estimate: Callable[[], Mapping[str, float]] | None = None
    copies: tuple[Path, ...] = ()

    @property
    def rungs(self) -> str:
        """How the targets of all jobs were found."""
        return "; ".join(dict.fromkeys(job.resolution.rungs for job in self.jobs))

    def as_json(self) -> dict[str, Any]:
        """The object that ``--plan --json`` prints."""
        return {
            "schema": 1,
            "verb": self.verb,
            "out": str(self.options.out),
            "steps": list(self.steps),
            "reads": self.reads,
            "writes": self.writes,
            "peak": self.peak,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was written: per target the norms, in all the bytes; and which files a run that was killed had finished."""

    norms: Mapping[str, Norms] = field(default_factory=dict)
    written: int = 0
    grown: int = 0
    resumed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Proof:
    """How far a written graph's outputs are from those of base + adapter, got in another way.

    Attributes:
        error: the largest relative difference (L2) of an output.
        limit: what it may be, for weights of this type.
        moved: how far the outputs are from the base's: a proof of an adapter that does nothing proves nothing.
        output: which output differs most.
        unfused: operators that the runtime fuses less often than in the base: name → (before, after).
    """

    error: float
    limit: float
    moved: float
    output: str
    unfused: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether the written graph is right."""
        return self.error <= self.limit

    def __str__(self) -> str:
        word = "≤" if self.holds else ">"
        told = f"max rel err {self.error:.1e} {word} {self.limit:.0e} at {self.output}, moved by {self.moved:.2g}"
        lost = ", ".join(f"{name} {before} → {after}" for name, (before, after) in self.unfused.items())
        return f"{told} · no longer fused: {lost}" if lost else told


def size(count: float) -> str:
    """Bytes for a person: ``13.2 MB``."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def difference(count: float) -> str:
    """Bytes more or less: ``+25.8 kB``."""
    return f"{'-' if count < 0 else '+'}{size(abs(count))}"
