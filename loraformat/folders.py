"""The files of a folder that is copied: which there are, and that none leads out of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from loraformat.errors import LoraFormatError, Problem

__all__ = ["files_in", "strange", "walk"]


def files_in(folder: Path) -> list[str]:
    """Every file of the folder, by its path in it.

    Raises:
        LoraFormatError: LF-610 a link that leads out of the folder, or what is neither a file nor a folder.
    """
    names = sorted(walk(folder))
    if problems := [Problem("LF-610", why, name) for name in names if (why := strange(folder, folder / name))]:
        raise LoraFormatError(problems)
    return names


def walk(folder: Path) -> Iterator[str]:
    """Every path of a file in the folder, with ``/``.

    None in a folder whose name begins with a dot, which a version control or a download keeps; a link to a folder is
    given itself.
    """
    for place, folders, files in os.walk(folder):
        linked = [name for name in folders if (Path(place) / name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".") and name not in linked]
        yield from ((Path(place) / name).relative_to(folder).as_posix() for name in (*files, *linked))


def strange(folder: Path, file: Path) -> str | None:
    """Why a file of the folder is not copied: it is a link that leaves the folder, or no file at all."""
    real, home = Path(os.path.realpath(file)), folder.resolve()  # Path.resolve raises on a loop of links
    homes = [home]
    if home.parent.name == "snapshots":  # huggingface_hub: <repo>/snapshots/<revision>/file → <repo>/blobs/<digest>
        homes.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in homes):
        return f"it is a link that leaves {folder}"
    if not real.exists() or not stat.S_ISREG(real.stat().st_mode):
        return "it is no file"
    return None
