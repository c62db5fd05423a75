"""Tinker (tinker-cookbook 0.6.1): a folder like PEFT's, with names and stacked experts of its own.

``<module>.lora_A.weight`` [r, in] and ``….lora_B.weight`` [out, r] as PEFT has them; the head is ``unembed_tokens``; of
experts ``experts.w1.lora_A.weight`` is [E, r, in] and ``….lora_B.weight`` [E, out, r], expert by expert, E being 1 on the
side that all experts share. ``read`` and ``write`` are the folder, ``space`` leads to the names of Hugging Face. A folder
that has none of these names is PEFT's own, and is read as such.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.layout import Output, Reading, ReadOptions, WriteOptions
    from loraformat.source import Source

__all__ = ["NAMES", "Tinker", "is_stack", "layout"]

NAMES = "ai.thinkingmachines.tinker"
"""The name space: Tinker's modules, experts stacked under w1, w2 and w3."""

_OWN = re.compile(r"\.experts\.w[123]\.lora_[AB]\.weight$|\.unembed_tokens\.lora_[AB]\.weight$")
_STACK = re.compile(r"(.+\.)?experts\.w[123]")


def is_stack(module: str) -> bool:
    """Whether a module of this path is a stack of experts."""
    return _STACK.fullmatch(module) is not None


class Tinker:
    """Tinker's downloaded adapters."""

    name = "tinker"
    carries = frozenset({"lora"})
    writes = True
    describes = "Tinker: adapter_config.json, adapter_model.safetensors, with its own names and stacked experts"
    scale = "lora_alpha / r in adapter_config.json"
    markers: frozenset[str] = frozenset()  # PEFT's, whose folders look alike
    endings: tuple[str, ...] = ()
    names = frozenset({NAMES})

    def detect(self, source: Source) -> str | None:
        """Experts under w1, w2, w3, or a head called unembed_tokens."""
        if source.file is None or source.torch or source.file.suffix != ".safetensors":
            return None
        found = next((name for name in source.tensors if _OWN.search(name)), None)
        return f"a key of Tinker's: {found}" if found else None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """See ``loraformat_converters.tinker.read``."""
        from loraformat_converters.tinker.read import read

        return read(source, options)

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """See ``loraformat_converters.tinker.write``."""
        from loraformat_converters.tinker.write import write

        return write(adapter)


layout = Tinker()
