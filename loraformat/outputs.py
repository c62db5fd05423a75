"""Whether an output may be written: asked before any work is done, and before the first byte."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from loraformat.errors import fault
from loraformat.ranges import clones

__all__ = ["check_file", "check_free", "check_room"]


def check_free(path: Path, force: bool) -> None:
    """Refuse before any work is done: LF-702 the output exists; LF-703 its folder does not, or that is no name for it."""
    if path.name in ("", "-", ".."):
        what = f"{str(path)!r} is no name for an output: it is written whole or not at all, under a name of its own"
        raise fault("LF-703", what)
    if os.path.lexists(path) and not force:
        raise fault("LF-702", f"{path} exists", fix="give --force to replace it, or another name")
    if not path.parent.is_dir():
        raise fault("LF-703", f"the folder {path.parent} does not exist", fix=f"mkdir -p {path.parent}")


def check_room(path: Path, count: int, copies: Sequence[Path] = ()) -> None:
    """LF-703 where the disk has not ``count`` bytes free: sooner said than after an hour.

    Args:
        copies: files that some of the bytes are copies of, which take no room where the file system refers to them.
    """
    free = shutil.disk_usage(path.parent).free
    if free >= count:
        return
    new = count - sum(copy.stat().st_size for copy in copies)
    if free < new or not (copies and clones(copies[0], path.parent)):
        raise fault("LF-703", f"{path} takes {count:,} bytes, and the disk has {free:,} left")


def check_file(path: Path, force: bool) -> None:
    """The same for an output that is a file, which takes the place of none but a plain file."""
    check_free(path, force)
    if path.is_dir():
        raise fault("LF-703", f"{path} is a folder; the output is a file")
    if path.exists() and not path.is_file():
        raise fault("LF-703", f"{path} is no plain file; the output would take its place")
