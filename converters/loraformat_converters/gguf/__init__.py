"""GGUF adapters (llama.cpp): one file, named after the tensors of the base's GGUF file.

llama.cpp's own converter (convert_lora_to_gguf.py) makes such a file of a PEFT folder, but reads neither ``use_rslora``
nor ``alpha_pattern``: here every scale is the one that was trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.errors import fault

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from loraformat.adapter import Adapter
    from loraformat.base import Base
    from loraformat.layout import Output, Reading, ReadOptions, WriteOptions
    from loraformat.naming.links import Link
    from loraformat.naming.spaces import Known
    from loraformat.source import Source

__all__ = ["Gguf", "GgufKind", "GgufSpace", "kind", "layout", "space"]


class Gguf:
    """llama.cpp's adapter file."""

    name = "gguf"
    carries = frozenset({"lora"})
    writes = True
    describes = "GGUF (llama.cpp): one file of type adapter"
    scale = "adapter.lora.alpha / r in the metadata, one alpha for all; 0 means a scale of 1"
    markers: frozenset[str] = frozenset()
    endings: tuple[str, ...] = (".gguf",)
    names = frozenset({"gguf"})

    def detect(self, source: Source) -> str | None:
        """The first four bytes, of a file that says that it is an adapter or is too damaged to say what it is."""
        if source.file is None or not source.head.startswith(b"GGUF"):
            return None
        from loraformat_converters.gguf.keys import stated_type

        told = stated_type(source.file)
        return None if told in (None, "model") else f"the file begins with GGUF and is of type {told}"

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """See ``loraformat_converters.gguf.read``."""
        from loraformat_converters.gguf.read import read

        if source.file is None:
            raise fault("LF-501", f"{source.path} is no GGUF file", fix="name the file itself")
        return read(source.file, options)

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """See ``loraformat_converters.gguf.write``."""
        from loraformat_converters.gguf.write import write

        return write(adapter, options)


class GgufKind:
    """A model in GGUF, by its first four bytes."""

    name = "gguf"
    describes = "GGUF model (llama.cpp)"

    def recognises(self, path: Path) -> bool:
        """The first four bytes."""
        if path.suffix != ".gguf" or not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"

    def open(self, path: Path) -> Base:
        """See ``loraformat_converters.gguf.base``."""
        from loraformat_converters.gguf.base import GgufModel

        return GgufModel(path)


class GgufSpace:
    """The names of the tensors in a GGUF model."""

    name = "gguf"
    describes = "the tensors of a GGUF model (llama.cpp)"

    def links(self, known: Known) -> Iterable[Link]:
        """See ``loraformat_converters.gguf.names``."""
        from loraformat_converters.gguf.names import links

        return links(known)


kind = GgufKind()
layout = Gguf()
space = GgufSpace()
