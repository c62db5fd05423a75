"""The stream that torch wrote before 1.6: five pickles, then each storage as its length and its values."""

from __future__ import annotations

import io
from typing import Any

from loraformat.errors import fault
from loraformat.pickled.machine import run
from loraformat.pickled.tensors import Storage, View, read_views

__all__ = ["MAGIC", "read_stream"]

# torch 2.13 serialization.py MAGIC_NUMBER, pickled with protocol 2
MAGIC = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
_PICKLE_CAP = 32 << 20


def read_stream(data: Any, size: int) -> tuple[dict[str, View], dict[str, tuple[int, int]]]:
    """(tensor name → view, storage key → byte range) of a stream in a buffer of ``size`` bytes."""
    program = io.BytesIO(bytes(data[: min(size, _PICKLE_CAP)]))
    program.seek(len(MAGIC))
    version, system = run(program, _nothing, _nothing), run(program, _nothing, _nothing)
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise fault("LF-510", f"a stream of version {version!r}; 1001, little-endian, is known")
    views = read_views(program)
    keys = run(program, _nothing, _nothing)
    storages = {view.storage.key: view.storage for view in views.values()}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise fault("LF-510", "the stream's list of storages is damaged")
    return views, _ranges(data, size, program.tell(), keys, storages)


def _ranges(
    data: Any, size: int, position: int, keys: list[str], storages: dict[str, Storage]
) -> dict[str, tuple[int, int]]:
    """Every storage begins with its number of values; what no tensor uses has no known width, and must be the last."""
    found: dict[str, tuple[int, int]] = {}
    for key in keys:
        if key not in storages or key in found:
            raise fault("LF-510", "the stream has a storage that no tensor uses, or one twice", where=key)
        found[key] = (position + 8, position + 8 + storages[key].nbytes)
        position = found[key][1]
        if position > size:
            raise fault("LF-510", f"the file is truncated: it has {size:,} bytes, storage {key} ends at {position:,}")
    if position != size:
        raise fault("LF-510", f"the file has {size - position:,} bytes after its last storage")
    return found


def _nothing(name: Any) -> Any:
    raise fault("LF-510", f"the stream's head asks for {name}")
