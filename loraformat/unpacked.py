"""What compressed files may hold: no file of some kilobytes fills the memory by itself."""

from __future__ import annotations

from pathlib import Path

from loraformat.errors import fault

__all__ = ["check_unpacked"]

_SWELL, _SMALL = 64, 2**28
"""What a file may grow by when it is unpacked, and what it may hold in any case."""


def check_unpacked(path: Path, count: int) -> None:
    """LF-503 where ``count`` bytes are stated to be in a file, or a folder, that is far smaller."""
    files = path.rglob("*") if path.is_dir() else (path,)
    if count > max(_SMALL, _SWELL * sum(file.stat().st_size for file in files if file.is_file())):
        raise fault("LF-503", f"{path} unpacks to {count:,} bytes: it holds no weights of that size")
