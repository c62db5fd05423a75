"""loralib (0.1.2, github.com/microsoft/LoRA): what ``lora_state_dict`` gives, saved by ``torch.save`` or safetensors.

- Linear, Embedding: ``<module>.lora_A`` [r, in], ``<module>.lora_B`` [out, r].
- MergedLinear, a fused projection of which ``enable_lora`` says which of its equal parts are adapted:
  A [n·r, in], B [n·out/parts, r] for n enabled parts, block by block. Exactly a pair of rank n·r.
- Conv2d of a kernel k × k: A [r·k, in·k], B [out·k/groups, r·k], and ΔW is B·A *viewed* as the kernel. Exactly a pair
  of rank r·k² (r·k·groups/k of a depthwise one).
- Trained biases (``bias="all"``, ``"lora_only"``) and whatever a script saved besides stand under their own names.

No file holds alpha, and none the rank that alpha is divided by, where a module may be a Conv2d or a MergedLinear.
``enable_lora`` is a member of the base's ``config.json``, of ``--base``: a list for every MergedLinear, or an object of
patterns with a list each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.layout import Output, Reading, ReadOptions, WriteOptions
    from loraformat.source import Source

__all__ = ["Loralib", "layout"]


class Loralib:
    """loralib's state dict."""

    name = "loralib"
    carries = frozenset({"replace", "lora"})
    writes = True
    describes = "loralib (microsoft/LoRA): a state dict of lora_A and lora_B"
    scale = "nowhere: lora_alpha / r in the code; --alpha, --rank, --scale-rule"
    markers: frozenset[str] = frozenset()
    endings: tuple[str, ...] = ()
    names = frozenset({"torch"})

    def detect(self, source: Source) -> str | None:
        """Keys that end exactly with ``.lora_A``, and none of what tools with the same ending have besides."""
        from loraformat_converters.loralib.read import claims

        return claims(source)

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """See ``loraformat_converters.loralib.read``."""
        from loraformat_converters.loralib.read import read

        return read(source, options)

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """See ``loraformat_converters.loralib.write``."""
        from loraformat_converters.loralib.write import write

        return write(adapter, options)


layout = Loralib()
