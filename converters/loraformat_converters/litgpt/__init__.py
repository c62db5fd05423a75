"""litgpt (0.5.13): ``lit_model.pth.lora``, with ``hyperparameters.yaml`` and ``model_config.yaml`` beside it.

``<module>.lora_A`` [r, in], ``<module>.lora_B`` [out, r] under litgpt's own names, which are a name space of its own
(``transformer.h.0.mlp.fc_1``). Query, key and value are one Linear, ``attn.qkv``, of which ``lora_query``, ``lora_key``
and ``lora_value`` say what is adapted: A [n·r, in], B [rows of the n adapted parts, r], block by block. Exactly a pair of
rank n·r, where the numbers of heads are known. ``read`` and ``write`` are the file, ``files`` the two beside it; ``fused``
puts the parts of a pair together and takes them apart, ``complete`` finds what else a switch of litgpt means; ``space``
leads to the names of Hugging Face.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.layout import Output, Reading, ReadOptions, WriteOptions
    from loraformat.source import Source

__all__ = ["NAMES", "Litgpt", "is_adapted", "layout"]

NAMES = "ai.lightning.litgpt"
"""The name space: litgpt's own modules, query, key and value in one."""

# litgpt 0.5.13 lora.py: the modules that its GPT adapts
_MODULES = re.compile(
    r"lm_head|transformer\.h\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|(experts\.\d+\.)?(fc|fc_1|fc_2|proj)))"
)
_FACTOR = re.compile(rf"({_MODULES.pattern})\.lora_[AB]")


def is_adapted(module: str) -> bool:
    """Whether litgpt makes pairs for a module of this path."""
    return _MODULES.fullmatch(module) is not None


class Litgpt:
    """litgpt's factors."""

    name = "litgpt"
    carries = frozenset({"lora"})
    writes = True
    describes = "litgpt: lit_model.pth.lora, hyperparameters.yaml"
    scale = "lora_alpha / lora_r in hyperparameters.yaml"
    markers = frozenset({"lit_model.pth.lora"})
    endings: tuple[str, ...] = ()
    names = frozenset({NAMES})

    def detect(self, source: Source) -> str | None:
        """The modules of litgpt's GPT, with factors that are parameters of the module itself."""
        if source.file is None or not (source.torch or source.file.suffix == ".safetensors"):
            return None
        if "loraformat" in source.header or source.sidecar("adapter_config.json") is not None:
            return None
        found = next((n for n in source.tensors if n.startswith("transformer.h.") and _FACTOR.fullmatch(n)), None)
        return f"a key of litgpt's GPT: {found}" if found else None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """See ``loraformat_converters.litgpt.read``."""
        from loraformat_converters.litgpt.read import read

        return read(source, options)

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """See ``loraformat_converters.litgpt.write``."""
        from loraformat_converters.litgpt.write import write

        return write(adapter, options)


layout = Litgpt()
