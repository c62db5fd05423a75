"""Writing a changed model: the graph, and those external data files that it changes or takes along."""

from __future__ import annotations

import glob
import hashlib
import itertools
import mmap
import os
import re
import sys
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import onnx

from loraformat.atomic import write_together
from loraformat.errors import LoraFormatError, fault
from loraformat.locks import take
from loraformat.outputs import check_file
from loraformat.patch import Patch as FilePatch
from loraformat.patch import write_patched
from loraformat.ranges import append
from loraformat.stopping import unbroken
from loraformat_converters.onnx.graph.model import External, external
from loraformat_converters.onnx.graph.scopes import tensors

if TYPE_CHECKING:
    from loraformat.atomic import Writer

__all__ = ["Addition", "Patch", "Storage", "check_size"]

_PAGE = 4096
_MESSAGE = 2**31


@dataclass(frozen=True)
class Patch:
    """New bytes for the external range of one tensor."""

    place: External
    tiles: Callable[[], Iterator[memoryview]]


@dataclass(frozen=True)
class Addition:
    """A tensor that is new in the model and whose bytes go to a file of their own."""

    tensor: onnx.TensorProto
    length: int
    tiles: Callable[[], Iterator[memoryview]]


class Storage:
    """What it takes to write ``model``, read from ``source``, as ``out``.

    Attributes:
        copied: data files that are taken along unchanged.
        beside: other files that belong to the model.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        source: Path,
        out: Path,
        data: Sequence[Patch | Addition],
        tag: str,
        beside: Mapping[str, Writer] | None = None,
    ) -> None:
        self.model, self.out = model, out
        self.beside: Mapping[str, Writer] = beside or {}
        self.patches = [item for item in data if isinstance(item, Patch)]
        self.additions = [item for item in data if isinstance(item, Addition)]
        self.places: dict[str, Path] = {}
        self.tensors: dict[str, list[onnx.TensorProto]] = {}
        for tensor in tensors(model):
            if (place := external(tensor, source.parent)) is not None:
                self.places[place.location] = place.path
                self.tensors.setdefault(place.location, []).append(tensor)
        touched = {patch.place.location for patch in self.patches}
        here = out.parent.resolve() == source.parent.resolve()
        self.copied = [] if here else sorted(self.places.keys() - touched)
        # A written data file has a name of the output's own: it is nobody else's, and an older output is whole
        # until the model itself is renamed.
        tag = _free(out, tag)
        self.renamed = {name: f"{out.name}.{tag}.{i}.data" for i, name in enumerate(sorted({*touched, *self.copied}))}
        self.added = f"{out.name}.{tag}.new.data"

    def name_in_new_folder(self, taken: Container[str]) -> None:
        """Data files by the names that they have in the base: a folder is written, and replaced, as a whole.

        Args:
            taken: names, from the model's folder, of files that another model of the base needs, or that are taken along.
        """
        numbered = (f"{self.out.name}.{i}.data" for i in itertools.count())
        free = (name for name in numbered if name not in taken and name not in self.renamed)
        self.renamed = {name: next(free) if name in taken else name for name in self.renamed}
        self.added = next(free)

    @property
    def copies(self) -> list[Path]:
        """The files that are taken along unchanged."""
        return [self.places[name] for name in self.copied]

    @property
    def data_bytes(self) -> int:
        """Bytes of external data that will be written."""
        files = sum(self.places[name].stat().st_size for name in self.renamed)
        return files + sum(_aligned(item.length) for item in self.additions)

    def writers(self) -> dict[str, Writer]:
        """Name of a file beside ``out`` → what writes it: data files first, the model last."""
        self._relocate()
        graph = _serialized(self.model)
        writers: dict[str, Writer] = {new: self._copier(name) for name, new in self.renamed.items()}
        if self.additions:
            writers[self.added] = self._add
        return {**writers, **self.beside, self.out.name: lambda file: _write_all(file, graph)}

    def write(self, force: bool) -> int:
        """Data files and model, or nothing at all; the bytes written."""
        for path in (self.out, *(self.out.parent / name for name in self.beside)):
            check_file(path, force)
        writers, before = self.writers(), _identity(self.out)
        try:
            write_together({self.out.parent / name: writer for name, writer in writers.items()})
        finally:
            if _identity(self.out) != before:  # the model is in its place, whatever came then
                with unbroken():
                    self._clear(writers.keys())
        return self.out.stat().st_size + self.data_bytes

    def _clear(self, keep: Collection[str]) -> None:
        """Delete the data files of an older output of this name, unless a model beside it refers to them."""
        used = {place.name for place in self.places.values()} | set(keep)
        older = (path for path in _data_of(self.out, "[0-9a-f]{8}") if path.name not in used)
        for path in older:
            if not _needed(path) and _idle(path):
                path.unlink(missing_ok=True)

    def _relocate(self) -> None:
        for name, new in self.renamed.items():
            for tensor in self.tensors[name]:
                next(e for e in tensor.external_data if e.key == "location").value = new
        offset = 0
        for item in self.additions:
            item.tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", self.added), ("offset", offset), ("length", item.length)):
                item.tensor.external_data.add(key=key, value=str(value))
            offset += _aligned(item.length)

    def _copier(self, name: str) -> Writer:
        patches = [
            FilePatch(p.place.offset, p.place.end, p.place.length, p.tiles)
            for p in self.patches
            if p.place.location == name
        ]

        def write(file: BinaryIO) -> None:
            with open(self.places[name], "rb") as source:
                write_patched(file, source, patches)

        return write

    def _add(self, file: BinaryIO) -> None:
        for item in self.additions:
            for tile in item.tiles():
                append(file, tile)
            file.write(bytes(_aligned(item.length) - item.length))


def _identity(path: Path) -> tuple[int, int] | None:
    """Tells a file from another that has taken its name; None where there is none."""
    if not os.path.lexists(path):
        return None
    info = path.lstat()
    return info.st_dev, info.st_ino


def _idle(path: Path) -> bool:
    """Whether no run is about to put a model in its place that refers to this file."""
    if sys.platform == "win32":  # where an open file is not deleted
        return True
    try:
        lock = take(path)
    except OSError:  # a file system without locks
        return True
    if lock is not None:
        os.close(lock)
    return lock is not None


def _data_of(out: Path, tag: str) -> Iterator[Path]:
    """The data files that outputs of this name wrote."""
    own = re.compile(rf"{re.escape(out.name)}\.{tag}\.(\d+|new)\.data")
    return (path for path in out.parent.glob(f"{glob.escape(out.name)}.*.data") if own.fullmatch(path.name))


def _free(out: Path, tag: str) -> str:
    """The tag, or another one where a model has data files by it: the same adapters may have been put into another base."""
    while any(_needed(path) for path in _data_of(out, tag)):
        tag = hashlib.sha256(tag.encode()).hexdigest()[:8]
    return tag


def _needed(data: Path) -> bool:
    """Whether the bytes of a model in the same folder have the data file's name: attached to, or copied from, an older output."""
    models = (path for path in data.parent.glob("*.onnx") if path.is_file() and path.stat().st_size)
    return any(_mentions(path, data.name.encode()) for path in models)


def _mentions(path: Path, name: bytes) -> bool:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name) >= 0


def _aligned(length: int) -> int:
    """Whole pages, so that the next tensor can be mapped."""
    return -(-length // _PAGE) * _PAGE


def check_size(count: int) -> None:
    """LF-703 where a model file of so many bytes cannot be: a message of protobuf holds less than 2 GiB."""
    if count >= _MESSAGE:
        raise _too_large(f"and would have {count:,} bytes")


def _serialized(model: onnx.ModelProto) -> bytes:
    try:
        return bytes(model.SerializeToString())
    except Exception as error:  # protobuf raises EncodeError or ValueError, by implementation
        raise _too_large(str(error)) from None


def _too_large(why: str) -> LoraFormatError:
    fix = "save the base with external data first (onnx.save_model(..., save_as_external_data=True))"
    return fault("LF-703", f"a model file holds less than 2 GiB, {why}", fix=fix)


def _write_all(file: BinaryIO, data: bytes) -> None:
    file.write(data)
