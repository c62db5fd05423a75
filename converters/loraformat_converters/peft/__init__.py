"""PEFT adapters (peft 0.21.2): a folder with adapter_config.json and adapter_model.safetensors.

- Keys are ``base_model.model.<module>.lora_A.weight`` [r, in] and ``.lora_B.weight`` [out, r]; the adapter's name is
  dropped on save. An embedding has ``.lora_embedding_A`` [r, vocab] and ``.lora_embedding_B`` [dim, r].
- A convolution has A [r, in, *kernel] and B [out, r, 1, …].
- Linear and Conv1D look the same on disk, and ``fan_in_fan_out`` proves nothing: both are read unplaced.
- Scale: ``lora_alpha / r``, or ``/ sqrt(r)`` with ``use_rslora``; ``rank_pattern`` and ``alpha_pattern`` are regular
  expressions matched at the end of the module's path, and the first match in the file's order wins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat_converters.peft import config

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.layout import Output, Reading, ReadOptions
    from loraformat.source import Source

__all__ = ["Peft", "layout"]


class Peft:
    """PEFT's folder: adapter_config.json, adapter_model.safetensors."""

    name = "peft"
    carries = frozenset({"lora"})

    def detect(self, source: Source) -> str | None:
        """A configuration with ``peft_type``, or the key endings of PEFT in a bare file."""
        if config.has_type(source):
            return f"{config.FILE} has peft_type"
        if source.file is None or source.file.suffix != ".safetensors":
            return None
        if any(name.endswith((".lora_A.weight", ".lora_embedding_A")) for name in source.tensors):
            return "keys end with .lora_A.weight"
        return None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """See ``loraformat_converters.peft.read``."""
        from loraformat_converters.peft.read import read

        return read(source, options)

    def write(self, adapter: Adapter) -> Output:
        """See ``loraformat_converters.peft.write``."""
        from loraformat_converters.peft.write import write

        return write(adapter)


layout = Peft()
