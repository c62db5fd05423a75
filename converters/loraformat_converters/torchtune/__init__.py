"""torchtune (0.6.1): ``adapter_model.pt`` (``adapter_N.pt`` of older versions), or the same as safetensors.

``<module>.lora_a.weight`` [r, in], ``<module>.lora_b.weight`` [out, r], of DoRA ``<module>.magnitude`` [out]; the modules
are torchtune's own (``layers.0.attn.output_proj``), which is a name space of its own. Only Linears are adapted, so that
every target is placed. alpha is in no tensor; ``adapter_config.json`` has it where the recipe knew a PEFT model type.

``read`` and ``write`` are the files; ``space`` leads to the names of Hugging Face, where the rows of q and k lie in
another order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.layout import Output, Reading, ReadOptions, WriteOptions
    from loraformat.source import Source

__all__ = ["NAMES", "Torchtune", "layout"]

NAMES = "org.pytorch.torchtune"
"""The name space: torchtune's own modules, rows of q and k in its rotary order."""


class Torchtune:
    """torchtune's own adapter file."""

    name = "torchtune"
    carries = frozenset({"lora", "magnitude"})
    writes = True
    describes = "torchtune: adapter_model, with torchtune's own names"
    scale = "lora_alpha / r in adapter_config.json, where there is one; else --alpha, --scale-rule"
    markers: frozenset[str] = frozenset()
    endings: tuple[str, ...] = ()
    names = frozenset({NAMES})

    def detect(self, source: Source) -> str | None:
        """Keys that end with ``.lora_a.weight``, in small letters."""
        if source.file is None or not (source.torch or source.file.suffix == ".safetensors"):
            return None
        found = any(name.endswith(".lora_a.weight") for name in source.tensors)
        return "keys end with .lora_a.weight" if found else None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """See ``loraformat_converters.torchtune.read``."""
        from loraformat_converters.torchtune.read import read

        return read(source, options)

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """See ``loraformat_converters.torchtune.write``."""
        from loraformat_converters.torchtune.write import write

        return write(adapter, options)


layout = Torchtune()
