"""numpy's npz: a zip of arrays, each under its path."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from loraformat.errors import fault
from loraformat.unpacked import check_unpacked

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["read", "write"]


def read(path: Path) -> dict[str, Array]:
    """Path → array; nothing is unpickled. LF-503: damaged, or not an archive of plain arrays."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.flag_bits & 1 for entry in entries):
            raise ValueError("an entry is encrypted")
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("two entries have one name")
        check_unpacked(path, sum(entry.file_size for entry in entries))
        with np.load(path, allow_pickle=False) as arrays:
            found = {str(name): arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, MemoryError, NotImplementedError) as error:
        raise fault("LF-503", f"{path} is no npz archive of plain arrays: {error}") from None
    except zlib.error as error:
        raise fault("LF-503", f"{path} is damaged: {error}") from None
    for name, array in found.items():
        if array.dtype.kind == "V":
            raise fault(
                "LF-314", f"numpy stores its dtype as {array.dtype.str}, which tells no number format", where=name
            )
    return found


def write(file: BinaryIO, arrays: Mapping[str, Array]) -> None:
    """Stored, not compressed; LF-508 for bfloat16, which numpy's format has no name for."""
    for name, array in arrays.items():
        if array.dtype.kind == "V" or array.dtype.name == "bfloat16":
            raise fault(
                "LF-508", f"npz has no name for {array.dtype}", where=name, fix="--dtype float32, or another container"
            )
    np.savez(file, **{name: np.asarray(array) for name, array in arrays.items()})  # type: ignore[arg-type]
