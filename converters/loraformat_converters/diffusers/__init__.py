"""LoRAs of diffusers (0.42.1): pytorch_lora_weights.safetensors, one file for all components of a pipeline.

diffusers has PEFT load what it stores, under PEFT's own LoraConfig in the header; so this layout is a spelling of PEFT's:
``spelling`` is the grammar of its names, ``metadata`` what the header says, and the reader and writer of ``peft`` do the
rest, component by component.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat_converters.diffusers import spelling

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.layout import Output, Reading, ReadOptions, WriteOptions
    from loraformat.source import Source

__all__ = ["Diffusers", "layout"]

_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


class Diffusers:
    """What ``save_lora_weights`` and ``save_lora_adapter`` write and ``load_lora_weights`` reads."""

    name = "diffusers"
    carries = frozenset({"lora", "delta", "magnitude"})
    writes = True
    describes = "diffusers: pytorch_lora_weights.safetensors"
    scale = "lora_alpha / r, or / √r with use_rslora, in the header's lora_adapter_metadata; 1 without it"
    markers = frozenset(_FILES)
    endings: tuple[str, ...] = ("pytorch_lora_weights.safetensors",)
    names = frozenset({"torch"})

    def detect(self, source: Source) -> str | None:
        """The header's own key, or names that only diffusers spells so."""
        if source.file is None or not (source.torch or source.file.suffix == ".safetensors"):
            return None
        if spelling.KEY in source.header:
            return f"the header has {spelling.KEY}"
        return spelling.evidence(source.tensors, own_file=source.file.name in _FILES)

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """See ``loraformat_converters.diffusers.read``."""
        from loraformat_converters.diffusers.read import read

        return read(source, options)

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """See ``loraformat_converters.diffusers.write``."""
        from loraformat_converters.diffusers.write import write

        return write(adapter)


layout = Diffusers()
