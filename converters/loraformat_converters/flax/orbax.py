"""Orbax checkpoints (orbax-checkpoint 0.12.8): a folder whose ``_METADATA`` names every array."""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from loraformat.errors import LoraFormatError, fault
from loraformat.unpacked import check_unpacked

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.atomic import Writer

    Array = npt.NDArray[Any]

__all__ = ["read", "recognises", "writers"]

_INDEX = "_METADATA"
_CAP = 64 * 2**20
_MISSING = "Orbax checkpoints are read and written by orbax-checkpoint"


def recognises(path: Path) -> bool:
    """A folder with the index of an Orbax checkpoint of arrays."""
    return path.is_dir() and (path / _INDEX).is_file()


def read(path: Path) -> Mapping[str, Array]:
    """Path → array; the names are known by the index, the arrays are read all at once when the first is asked for."""
    return _Checkpoint(path)


class _Checkpoint(Mapping[str, "Array"]):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = _names(path)

    def __getitem__(self, name: str) -> Array:
        if name not in self.names:
            raise KeyError(name)
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _arrays(self) -> dict[str, Array]:
        library = _library()
        try:
            with _silent(), library.Checkpointer(library.PyTreeCheckpointHandler()) as reader:
                index = reader.metadata(self.path.absolute()).item_metadata
                if index is None:
                    raise ValueError("its storage finds no arrays: a file of it is damaged or missing")
                check_unpacked(self.path, _stated(index.tree))
                wanted = _mapped(index.tree, lambda _: library.RestoreArgs(restore_type=np.ndarray))
                tree = reader.restore(self.path.absolute(), args=library.args.PyTreeRestore(restore_args=wanted))
        except LoraFormatError:
            raise
        except Exception as error:  # whatever its storage engine raises for a damaged folder
            raise fault("LF-503", f"{self.path} cannot be restored: {str(error).splitlines()[0]}") from None
        found = dict(_leaves(tree, ()))
        if found.keys() != set(self.names):
            raise fault("LF-503", f"{self.path} holds other arrays than its {_INDEX} names")
        return found


@contextmanager
def _silent() -> Iterator[None]:
    """Orbax's own log of a damaged folder quotes the file's bytes to the terminal; what is wrong, the fault says."""
    _forget_pending()  # before the first read: they end when they will
    logging.getLogger("asyncio").addFilter(_of_others)
    log = logging.getLogger("absl")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _of_others(record: logging.LogRecord) -> bool:
    """Whether it is no word of a read of Orbax that nobody waits for any more, which asyncio logs whenever it is collected."""
    said = record.getMessage()
    return not ("exception was never retrieved" in said and ("orbax" in said or 'Error opening "zarr' in said))


def _forget_pending() -> None:
    """Reads that were under way when one failed end in threads of tensorstore (0.1.86), each by a traceback of its own."""
    before = sys.unraisablehook
    if getattr(before, "forgets", False):
        return

    def told(pending: sys.UnraisableHookArgs) -> None:
        if not (isinstance(pending.exc_value, RuntimeError) and "Event loop is closed" in str(pending.exc_value)):
            before(pending)

    told.forgets = True  # type: ignore[attr-defined]
    sys.unraisablehook = told


def _names(path: Path) -> tuple[str, ...]:
    """Of every array: an empty map is in the index too, as what nothing is read for."""
    file = path / _INDEX
    try:
        if file.stat().st_size > _CAP:
            raise fault("LF-503", f"{file} has more than 64 MiB")
        entries = json.loads(file.read_text(encoding="utf-8"))["tree_metadata"].values()
        stored = [entry for entry in entries if not entry.get("value_metadata", {}).get("skip_deserialize")]
        return tuple("/".join(str(word["key"]) for word in entry["key_metadata"]) for entry in stored)
    except OSError as error:
        raise fault("LF-701", f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise fault("LF-503", f"{file} is no index of an Orbax checkpoint: {error}") from None


def _library() -> Any:
    try:
        import orbax.checkpoint as library
    except ImportError:
        raise fault("LF-704", _MISSING, fix="pip install 'loraformat[jax]'") from None
    return library


def _mapped(tree: Any, change: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_mapped(value, change) for value in tree]
    return change(tree)


def _stated(tree: Any) -> int:
    """Bytes of all arrays, as their index has them."""
    if isinstance(tree, Mapping | list | tuple):
        return sum(map(_stated, tree.values() if isinstance(tree, Mapping) else tree))
    shape, dtype = getattr(tree, "shape", None), getattr(tree, "dtype", None)
    return math.prod(shape) * np.dtype(dtype).itemsize if shape is not None and dtype is not None else 0


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Array]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from _leaves(value, (*path, str(i)))
    else:
        yield "/".join(path), np.asarray(tree)


def writers(arrays: Mapping[str, Array]) -> dict[str, Writer]:
    """The files of a checkpoint that Orbax itself writes of the nested map, each as a writer."""
    from loraformat_converters.flax.tree import nested

    library = _library()
    folder = tempfile.TemporaryDirectory()
    place = Path(folder.name) / "checkpoint"
    with library.Checkpointer(library.PyTreeCheckpointHandler()) as writer:
        writer.save(
            place.absolute(), args=library.args.PyTreeSave(nested({k: np.asarray(v) for k, v in arrays.items()}))
        )
    files = {str(file.relative_to(place)): file.read_bytes() for file in sorted(place.rglob("*")) if file.is_file()}
    folder.cleanup()

    def one(data: bytes) -> Writer:
        def write(file: BinaryIO) -> None:
            file.write(data)

        return write

    return {name: one(data) for name, data in files.items()}
