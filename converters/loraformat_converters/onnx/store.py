"""Writing a changed model: the graph, and those external data files that it changes or takes along."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import onnx

from loraformat.atomic import check_free, write_file
from loraformat.errors import fault
from loraformat_converters.onnx.model import External, external, graphs

if TYPE_CHECKING:
    from loraformat.atomic import Writer

__all__ = ["Patch", "Storage"]

_COPY = 8 << 20


@dataclass(frozen=True)
class Patch:
    """New bytes for the external range of one tensor."""

    place: External
    tiles: Callable[[], Iterator[memoryview]]


class Storage:
    """What it takes to write ``model``, read from ``source``, as ``out``."""

    def __init__(self, model: onnx.ModelProto, source: Path, out: Path, patches: Sequence[Patch], tag: str) -> None:
        self.model, self.out, self.patches = model, out, patches
        self.folder = source.parent
        self.same_folder = out.parent.resolve() == self.folder.resolve()
        self.places: dict[str, Path] = {}
        self.tensors: dict[str, list[onnx.TensorProto]] = {}
        for tensor in _tensors(model):
            if (place := external(tensor, self.folder)) is not None:
                self.places[place.location] = place.path
                self.tensors.setdefault(place.location, []).append(tensor)
        touched = {patch.place.location for patch in patches}
        # A changed data file gets a name of its own, so that an older output is whole until the model is renamed.
        self.renamed = {name: f"{out.name}.{tag}.{i}.data" for i, name in enumerate(sorted(touched))}
        self.copied = [] if self.same_folder else sorted(self.places.keys() - touched)

    def check(self, force: bool) -> None:
        """Every refusal that needs no writing."""
        check_free(self.out, force)
        for name in self.copied:
            target = self.out.parent / name
            if target.parent != self.out.parent and not target.parent.is_dir():
                raise fault(
                    "LF-703", f"external data needs the folder {target.parent}", fix=f"mkdir -p {target.parent}"
                )
            check_free(target, force)

    @property
    def data_bytes(self) -> int:
        """Bytes of external data that will be written."""
        return sum(self.places[name].stat().st_size for name in [*self.renamed, *self.copied])

    def write(self, force: bool) -> int:
        """Data files first, the model last; the bytes written."""
        self.check(force)
        for name in self.copied:
            write_file(self.out.parent / name, self._copier(name, []), force=force)
        for name, new in self.renamed.items():
            patches = sorted((p for p in self.patches if p.place.location == name), key=lambda p: p.place.offset)
            write_file(self.out.parent / new, self._copier(name, patches), force=True)
            for tensor in self.tensors[name]:
                next(e for e in tensor.external_data if e.key == "location").value = new
        data = _serialized(self.model)
        write_file(self.out, lambda file: _write_all(file, data), force=force)
        return len(data) + self.data_bytes

    def _copier(self, name: str, patches: Sequence[Patch]) -> Writer:
        def write(file: BinaryIO) -> None:
            with open(self.places[name], "rb") as source:
                end = os.fstat(source.fileno()).st_size
                for patch in patches:
                    _copy(source, file, patch.place.offset - source.tell())
                    for tile in patch.tiles():
                        file.write(tile)
                    source.seek(patch.place.offset + patch.place.length)
                _copy(source, file, end - source.tell())

        return write


def _copy(source: BinaryIO, file: BinaryIO, count: int) -> None:
    while count > 0:
        chunk = source.read(min(count, _COPY))
        if not chunk:
            raise OSError("the data file became shorter while it was copied")
        file.write(chunk)
        count -= len(chunk)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph, _ in graphs(model):
        yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _serialized(model: onnx.ModelProto) -> bytes:
    try:
        return bytes(model.SerializeToString())
    except Exception as error:  # protobuf raises EncodeError or ValueError, by implementation
        fix = "save the base with external data first (onnx.save_model(..., save_as_external_data=True))"
        raise fault("LF-703", f"a model file holds less than 2 GiB: {error}", fix=fix) from None


def _write_all(file: BinaryIO, data: bytes) -> None:
    file.write(data)
