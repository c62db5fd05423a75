"""What a layout is: a way in which some tool stores adapters, as an object that reads and writes it.

A third party adds one with an entry point in the group ``loraformat.layouts``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, runtime_checkable

from loraformat import file, serializer
from loraformat.errors import Problem

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.atomic import Writer
    from loraformat.base import Base
    from loraformat.scale import ScaleRule
    from loraformat.source import Source

__all__ = [
    "NATIVE", "Layout", "Native", "Output", "ReadOptions", "Reading", "WriteOptions", "tensors_file", "text_file",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the user states that a source may not: used where the source is silent, an error where it disagrees.

    Attributes:
        base: is asked for the shapes of its parameters where a source leaves open which of them a tensor belongs to.
        config: the ``config.json`` of the base model, for what a layout takes from it, such as the number of heads.
        split_qkv: how many trained pairs a fused query-key-value pair was put together from.
        model: what it was written for: a model with inputs for an adapter (``--for``).
    """

    alpha: float | None = None
    rank: int | None = None
    scale_rule: ScaleRule | None = None
    base: Base | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    split_qkv: int | None = None
    model: Base | None = None


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """What a layout may have to know to write an adapter. See ``ReadOptions``.

    Attributes:
        ending: of the output's name (``.npz``), for a layout that several containers hold; empty for a folder's.
        model: what will run it: a model with inputs for an adapter (``--for``).
    """

    base: Base | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    ending: str = ""
    model: Base | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """An adapter, and what its reader wants said about it."""

    adapter: Adapter
    warnings: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Output:
    """What a layout would write: one file (its name is empty), or the files of a folder. Nothing is written yet.

    ``warnings``: what the tool will read otherwise, though with equal numbers, such as a rank padded with zeros.
    """

    files: Mapping[str, Writer]
    folder: bool
    warnings: list[Problem] = field(default_factory=list)


def tensors_file(tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> Writer:
    """What writes these as a safetensors file, for an ``Output``."""

    def write(file: BinaryIO) -> None:
        serializer.write(file, tensors, metadata)

    return write


def text_file(text: str) -> Writer:
    """What writes this in UTF-8, for an ``Output``."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    return write


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

    endings: tuple[str, ...]
    """Endings of a file's name that mean this layout when one is written; empty for what cannot be told so."""

    names: frozenset[str]
    """The name spaces whose keys it can write; empty: any."""

    def detect(self, source: Source) -> str | None:
        """The evidence that ``source`` is of this layout, as a phrase; None if it is not."""

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """The adapter, complete: every tensor understood, every scale stated, or LoraFormatError."""

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """The files that this layout's own tool would load with equal results, or LF-508."""


class Native:
    """The loraformat file, as one layout among others."""

    name = "native"
    carries = frozenset({"replace", "lora", "loha", "lokr", "delta", "magnitude", "rows"})
    writes = True
    describes = "the loraformat file (.lora.safetensors)"
    scale = "alpha and its rule, beside each part"
    markers: frozenset[str] = frozenset()
    endings: tuple[str, ...] = (".safetensors",)
    names: frozenset[str] = frozenset()

    def detect(self, source: Source) -> str | None:
        """The reserved key in the header."""
        if source.file is None or source.file.suffix != ".safetensors":
            return None
        return f"__metadata__ has the key {file.KEY!r}" if file.KEY in source.header else None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """The file says everything itself: options may only agree with it."""
        adapter, warnings = file.read_tensors(source.tensors, source.header)
        return Reading(adapter, warnings)

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """One file."""
        return Output({"": file.writer(adapter)}, folder=False)


NATIVE = Native()
