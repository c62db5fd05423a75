"""One mapping for every container, told by its content; and back, by the ending of the name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from loraformat import serializer
from loraformat.errors import fault
from loraformat.layout import Output
from loraformat.memory import MemorySource
from loraformat_converters.flax import msgpack, npz, orbax

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.source import Source

    Array = npt.NDArray[Any]

__all__ = ["ENDINGS", "Tree", "nested", "open_tree", "output"]

ENDINGS = (".msgpack", ".npz")
"""Of files that hold a tree and nothing else is called by."""

_VALUE = "/value"
_COLLECTION = "params/"


@dataclass(frozen=True, eq=False)
class Tree(Mapping[str, "Array"]):
    """Path → array.

    Attributes:
        arrays: as stored.
        value: whether every path ended with ``/value``, the field of a flax Variable, which the paths here lack.
        root: what every path begins with that is no part of a name: the collections of Linen around a whole model.
    """

    arrays: Mapping[str, Array]
    value: bool = False
    root: str = ""

    def __getitem__(self, path: str) -> Array:
        return self.arrays[f"{self.root}{path}{_VALUE * self.value}"]

    def __iter__(self) -> Iterator[str]:
        return (path.removeprefix(self.root).removesuffix(_VALUE * self.value) for path in self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def without(self, stored: Collection[str]) -> Tree:
        """The same but for these paths, as stored."""
        return _tree({path: array for path, array in self.arrays.items() if path not in stored})


def open_tree(source: Source) -> Tree | None:
    """The tree in a source, or None where it is something else. Names are read now, arrays when they are asked for.

    Raises:
        LoraFormatError: LF-503 a damaged container; LF-704 what reads it is not installed.
    """
    if "tree" not in source.opened:
        arrays = _arrays(source)
        source.opened["tree"] = _tree(arrays) if arrays else None
    tree: Tree | None = source.opened["tree"]
    return tree


def _tree(arrays: Mapping[str, Array]) -> Tree:
    return Tree(arrays, all(path.endswith(_VALUE) for path in arrays), _root(arrays))


def _root(paths: Collection[str]) -> str:
    """``params/`` as often as all paths begin with it: a Linen collection, and the field of a training state around it."""
    root = ""
    while paths and all(path.startswith(f"{root}{_COLLECTION}") for path in paths):
        root += _COLLECTION
    return root


def _arrays(source: Source) -> Mapping[str, Array] | None:
    if isinstance(source, MemorySource):
        return source.tensors if any("/" in name for name in source.tensors) else None
    if orbax.recognises(source.folder if source.path.is_dir() else source.path):
        return orbax.read(source.path)
    if source.file is None:
        return None
    if source.file.suffix == ".msgpack":
        return msgpack.read(source.file)
    if source.file.suffix == ".npz":
        return npz.read(source.file)
    if source.file.suffix == ".safetensors":
        return source.tensors if any("/" in name for name in source.tensors) else None
    return None


def output(arrays: Mapping[str, Array], ending: str, *, value: bool = False, root: str = "") -> Output:
    """What is written for a name with this ending: ``.msgpack``, ``.npz``, ``.safetensors``, else an Orbax folder."""
    named = {f"{root}{path}{_VALUE * value}": array for path, array in arrays.items()}
    if ending == "":
        return Output(orbax.writers(named), folder=True)
    writers = {".msgpack": msgpack.write, ".npz": npz.write, ".safetensors": _safetensors}
    if ending not in writers:
        raise fault("LF-705", f"a tree is not written as {ending}", fix=f"{', '.join(writers)}, or a folder (Orbax)")

    def write(file: BinaryIO) -> None:
        writers[ending](file, named)

    return Output({"": write}, folder=False)


def _safetensors(file: BinaryIO, arrays: Mapping[str, Array]) -> None:
    serializer.write(file, arrays, {})


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a/b": x}`` as ``{"a": {"b": x}}``."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, leaf = path.split("/")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[leaf] = array
    return tree
