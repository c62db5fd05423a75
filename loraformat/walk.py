"""Which adapters lie under a folder, whatever else does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["adapters_under"]

# By name alone, whatever is in them: a pickle can look like anything, and one that is passed over was not checked.
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx_adapter", ".npz", ".msgpack", ".h5")


def adapters_under(path: Path, markers: frozenset[str]) -> Iterator[Path]:
    """What is to be read as an adapter in the folder ``path`` and all folders in it, by name.

    A folder with a file of one of the names ``markers`` is one adapter; in any other, each tensor file is one.
    Folders that are links are not entered, so that no loop is. A folder that cannot be read, and one without any
    adapter at all, is given too: reading it says what is wrong with it.
    """
    folders, found = [path], False
    while folders:
        folder = folders.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            entries = []
            found = True
            yield folder
        inner = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
        if any(entry.name in markers for entry in entries):
            here = [folder]
        else:
            here = [folder / e.name for e in entries if e.name.lower().endswith(_ENDINGS) and not os.path.isdir(e)]
        found = found or bool(here)
        yield from here
        folders += [folder / entry.name for entry in reversed(inner)]
    if not found:
        yield path
