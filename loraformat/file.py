"""The native file, read and written: a plain safetensors file with one reserved metadata key."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loraformat import container, metadata, serializer
from loraformat.atomic import write_file
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.parse import parse
from loraformat.parts import roles_of
from loraformat.shapes import shape_problems
from loraformat.values import value_problems

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter

    Array = npt.NDArray[Any]

__all__ = ["KEY", "check", "read", "read_tensors", "save", "tensors_of", "writer"]

KEY = "loraformat"
"""The reserved key in ``__metadata__``."""


def read(file: container.Container | str | os.PathLike[str]) -> tuple[Adapter, list[Problem]]:
    """The adapter in a native file and the warnings; its tensors are views of the mapped file.

    Raises:
        LoraFormatError: LF-1xx … LF-4xx, every fault found.
    """
    held = file if isinstance(file, container.Container) else container.Container(file)
    return read_tensors(held, held.metadata)


def read_tensors(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> tuple[Adapter, list[Problem]]:
    """As ``read``, of tensors and ``__metadata__`` that are at hand already."""
    text = metadata.get(KEY)
    if text is None:
        what = f"no {KEY!r} key in __metadata__: not a loraformat file"
        raise fault("LF-201", what, fix="convert it first: loraformat convert SRC DST")
    return parse(text, tensors)


def tensors_of(adapter: Adapter) -> Iterator[tuple[str, Array]]:
    """Every tensor of the file, as (``<key>.<role>``, array)."""
    for key, update in adapter.items():
        for part in update.parts:
            for role, tensor in roles_of(part):
                yield f"{key}.{role}", tensor
        if update.sketch is not None:
            yield f"{key}.sketch", update.sketch


def check(adapter: Adapter) -> tuple[str, Mapping[str, Array]]:
    """(metadata text, tensors) as a file of ``adapter`` would hold them, or every reason why none can be written."""
    problems: list[Problem] = []
    for key, update in adapter.items():
        problems += shape_problems(key, update)
    problems = problems or [p for p in value_problems(adapter) if p.severity == "error"]
    if problems:
        raise LoraFormatError(problems)
    try:
        text = metadata.render(adapter)
    except ValueError as error:
        raise fault("LF-202", f"the metadata has no canonical form: {error}") from None
    tensors = dict(tensors_of(adapter))
    parse(text, tensors)  # what we would refuse to read we do not write
    return text, tensors


def writer(adapter: Adapter) -> Any:
    """A function that writes the file's bytes: the same for the same adapter."""
    text, tensors = check(adapter)

    def write(file: BinaryIO) -> None:
        serializer.write(file, tensors, {KEY: text})

    return write


def save(adapter: Adapter, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write the native file, atomically.

    Raises:
        LoraFormatError: LF-2xx … LF-4xx the adapter is not sound; LF-702, LF-703 the file cannot be written.
    """
    write_file(Path(path), writer(adapter), force=force)
