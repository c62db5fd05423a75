"""What a run reads is never what it writes over, not with ``--force`` either: the base is the way back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from loraformat.base import Base, Stored
from loraformat.errors import fault

__all__ = ["check_apart"]


def check_apart(out: str | os.PathLike[str], *read: Base | str | os.PathLike[str] | None) -> None:
    """LF-703 where ``out`` is one of the files that are read.

    Args:
        read: bases, with every file that they consist of, and paths that the run names for something else; None is none.
    """
    path = Path(out)
    for file, what in (pair for item in read if item is not None for pair in _files(item)):
        if _same(path, file):
            raise fault("LF-703", f"{path} is {what}", fix="write to another name: what is read is the way back")


def _same(one: Path, two: Path) -> bool:
    return one.samefile(two) if one.exists() and two.exists() else one.resolve() == two.resolve()


def _files(item: Base | str | os.PathLike[str]) -> Iterator[tuple[Path, str]]:
    if isinstance(item, str | os.PathLike):
        yield Path(item), "named for something else too"
        return
    yield item.path, "the base itself"
    if isinstance(item, Stored):
        yield from ((file, f"a file of the base {item.path}") for file in item.stored())
