"""GGUF adapters (llama.cpp): one file, named after the tensors of the base's GGUF file.

llama.cpp's own converter (convert_lora_to_gguf.py) makes such a file of a PEFT folder, but reads neither ``use_rslora``
nor ``alpha_pattern``: here every scale is the one that was trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.errors import fault

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loraformat.adapter import Adapter
    from loraformat.layout import Output, Reading, ReadOptions, WriteOptions
    from loraformat.links import Link
    from loraformat.source import Source
    from loraformat.spaces import Known

__all__ = ["Gguf", "GgufSpace", "layout", "space"]


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
        """The first four bytes."""
        return "the file begins with GGUF" if source.head.startswith(b"GGUF") else None

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


class GgufSpace:
    """The names of the tensors in a GGUF model."""

    name = "gguf"
    describes = "the tensors of a GGUF model (llama.cpp)"

    def links(self, known: Known) -> Iterable[Link]:
        """See ``loraformat_converters.gguf.names``."""
        from loraformat_converters.gguf.names import links

        return links(known)


layout = Gguf()
space = GgufSpace()
