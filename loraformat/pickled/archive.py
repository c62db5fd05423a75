"""The zip archive that torch writes since 1.6: where the pickle and every storage lie. Nothing is unpacked.

Entries are stored, not compressed, each on a boundary of 64 bytes, so that a storage is a range of the file.
"""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

from loraformat.errors import fault

__all__ = ["MAGIC", "Entry", "entries", "read_archive"]

MAGIC = b"PK\x03\x04"
_PICKLE_CAP = 32 << 20
_DESCRIPTOR = b"PK\x07\x08"
_LOCAL = struct.Struct("<4s22xHH")
_CENTRAL = struct.Struct("<28xHHH12x")  # the lengths of name, extra field and comment


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored entry: the bytes [start, stop) of the file, its own header, and the places that state its CRC-32."""

    start: int
    stop: int
    header: int
    checksums: tuple[int, ...]


def entries(data: Any, size: int) -> dict[str, Entry]:
    """Name → entry of an archive in a buffer of ``size`` bytes.

    Raises:
        LoraFormatError: LF-510 compressed, encrypted, overlapping or repeated entries, or no archive at all.
    """
    try:
        opened = zipfile.ZipFile(_Buffer(data, size))
        listed, directory = opened.infolist(), opened.start_dir
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, struct.error, EOFError) as error:
        raise fault("LF-510", f"the archive is damaged: {error}") from None
    found: dict[str, Entry] = {}
    for info in listed:
        if info.filename in found:
            raise fault("LF-510", "the archive has the entry twice", where=info.filename)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            fix = "torch.save does not compress: unpack it and save it again"
            raise fault("LF-510", "the archive's entry is compressed or encrypted", where=info.filename, fix=fix)
        found[info.filename] = _entry(data, size, info, directory)
        directory += _CENTRAL.size + sum(_CENTRAL.unpack(data[directory : directory + _CENTRAL.size]))
    end, before = 0, ""
    for name, entry in sorted(found.items(), key=lambda item: item[1].header):
        if entry.header < end:
            raise fault("LF-510", f"the archive's entry overlaps {before}", where=name)
        end, before = entry.stop, name
    return found


def _entry(data: Any, size: int, info: zipfile.ZipInfo, directory: int) -> Entry:
    offset = info.header_offset
    if not 0 <= offset <= size - _LOCAL.size:
        raise fault("LF-510", "the archive's entry lies outside the file", where=info.filename)
    magic, name, extra = _LOCAL.unpack(data[offset : offset + _LOCAL.size])
    start = offset + _LOCAL.size + name + extra
    if magic != MAGIC or start + info.file_size > size:
        raise fault("LF-510", "the archive's entry lies outside the file", where=info.filename)
    stop = start + info.file_size
    # With flag 3 the local header leaves the CRC to a descriptor behind the data (APPNOTE.TXT 4.3.9; torch does so).
    local = stop + len(_DESCRIPTOR) if info.flag_bits & 8 else offset + 14
    if info.flag_bits & 8 and data[stop : stop + 4] != _DESCRIPTOR:
        raise fault("LF-510", "the archive's entry has no descriptor behind its data", where=info.filename)
    return Entry(start, stop, offset, (local, directory + 16))


def read_archive(data: Any, size: int) -> tuple[io.BytesIO, dict[str, tuple[int, int]]]:
    """(the pickle, storage key → byte range)."""
    found = entries(data, size)
    roots = [name.removesuffix("data.pkl") for name in found if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise fault("LF-510", f"the archive has {len(roots)} pickles named */data.pkl; torch.save writes one")
    root, program = roots[0], found[f"{roots[0]}data.pkl"]
    order = found.get(f"{root}byteorder")
    if order is not None and bytes(data[order.start : order.stop]) != b"little":
        raise fault("LF-510", "the values are big-endian: save them again on a little-endian machine")
    if program.stop - program.start > _PICKLE_CAP:
        raise fault("LF-510", f"the pickle has {program.stop - program.start:,} bytes; the most is {_PICKLE_CAP:,}")
    start = f"{root}data/"
    storages = {name.removeprefix(start): (e.start, e.stop) for name, e in found.items() if name.startswith(start)}
    return io.BytesIO(bytes(data[program.start : program.stop])), storages


class _Buffer(io.RawIOBase):
    """A mapped file for ``zipfile``, which wants one with a position."""

    def __init__(self, data: Any, size: int) -> None:
        self.data, self.size, self.position = data, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        position = offset + (0, self.position, self.size)[whence]
        if position < 0:
            raise ValueError("a position before the file")
        self.position = position
        return position

    def read(self, count: int | None = -1) -> bytes:
        stop = self.size if count is None or count < 0 else min(self.size, self.position + count)
        chunk = bytes(self.data[self.position : stop])
        self.position += len(chunk)
        return chunk
