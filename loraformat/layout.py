"""What a layout is: a way in which some tool stores adapters, as an object that reads and writes it.

A third party adds one with an entry point in the group ``loraformat.layouts``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from loraformat import file
from loraformat.errors import Problem

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.atomic import Writer
    from loraformat.base import Base
    from loraformat.scale import ScaleRule
    from loraformat.source import Source

__all__ = ["NATIVE", "Layout", "Native", "Output", "ReadOptions", "Reading"]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the user states that a source may not: used where the source is silent, an error where it disagrees.

    ``base`` is asked for the shapes of its parameters where a source leaves open which of them a tensor belongs to.
    """

    alpha: float | None = None
    rank: int | None = None
    scale_rule: ScaleRule | None = None
    base: Base | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """An adapter, and what its reader wants said about it."""

    adapter: Adapter
    warnings: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Output:
    """What a layout would write: one file, or the files of a folder. Nothing is written yet."""

    files: Mapping[str, Writer]
    folder: bool


@runtime_checkable
class Layout(Protocol):
    """The contract. A layout is stateless and does no I/O of its own but through ``Source``."""

    name: str
    """The word that ``--from`` and ``--to`` take; also its key in ``extensions``."""

    carries: frozenset[str]
    """The part kinds that it can store."""

    writes: bool
    """Whether it can be written; one that cannot raises LF-508."""

    describes: str
    """What a person calls it."""

    scale: str
    """Where it keeps the scale, as a phrase."""

    markers: frozenset[str]
    """File names that make a folder one adapter of this layout."""

    def detect(self, source: Source) -> str | None:
        """The evidence that ``source`` is of this layout, as a phrase; None if it is not."""

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """The adapter, complete: every tensor understood, every scale stated, or LoraFormatError."""

    def write(self, adapter: Adapter) -> Output:
        """The files that this layout's own tool would load with equal results, or LF-508."""


class Native:
    """The loraformat file, as one layout among others."""

    name = "native"
    carries = frozenset({"replace", "lora", "loha", "lokr", "delta", "magnitude", "rows"})
    writes = True
    describes = "the loraformat file (.lora.safetensors)"
    scale = "alpha and its rule, beside each part"
    markers: frozenset[str] = frozenset()

    def detect(self, source: Source) -> str | None:
        """The reserved key in the header."""
        if source.file is None or source.file.suffix != ".safetensors":
            return None
        return f"__metadata__ has the key {file.KEY!r}" if file.KEY in source.header else None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """The file says everything itself: options may only agree with it."""
        adapter, warnings = file.read_tensors(source.tensors, source.header)
        return Reading(adapter, warnings)

    def write(self, adapter: Adapter) -> Output:
        """One file."""
        return Output({"": file.writer(adapter)}, folder=False)


NATIVE = Native()
