"""PEFT adapters (peft 0.21.2): a folder with adapter_config.json and adapter_model.safetensors.

``names`` is the grammar of the tensors' names, ``config``, ``settings`` and ``methods`` what the configuration says;
there is one reader a method (``lora`` with ``attention``, ``blocks`` and ``experts``; ``adalora``, ``lycoris``,
``vera``), and ``trained`` for what stands beside any of them. ``to_lora`` and ``to_others`` lead back.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from loraformat_converters.peft import config

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.layout import Output, Reading, ReadOptions, WriteOptions
    from loraformat.source import Source

__all__ = ["Peft", "layout"]


def _is_pipeline(source: Source) -> bool:
    """Whether diffusers wrote it, by PEFT's names: its header, or components of a pipeline that no model has as modules."""
    own_file = source.file is not None and source.file.stem == "pytorch_lora_weights"
    if own_file or "lora_adapter_metadata" in source.header:
        return True
    roots = {name.partition(".")[0] for name in source.tensors}
    blocks = {name.split(".")[1] for name in source.tensors if name.startswith("transformer.") and name.count(".") > 1}
    return bool(roots & {"unet", "text_encoder", "text_encoder_2", "text_encoder_3"}) or bool(
        blocks & {"transformer_blocks", "single_transformer_blocks"}
    )


class Peft:
    """PEFT's folder: adapter_config.json, adapter_model.safetensors."""

    name = "peft"
    carries = frozenset({"replace", "lora", "loha", "lokr", "delta", "magnitude", "rows"})
    writes = True
    describes = "Hugging Face PEFT: adapter_config.json, adapter_model.safetensors"
    scale = "lora_alpha / r, or / √r with use_rslora, in adapter_config.json"
    markers = frozenset({config.FILE, "adapter_model.safetensors", "adapter_model.bin"})
    endings: tuple[str, ...] = ()
    names = frozenset({"torch"})

    def detect(self, source: Source) -> str | None:
        """A configuration with ``peft_type``, or the key endings of PEFT in a bare file."""
        if config.has_type(source):
            return None if _is_anothers(source) else f"{config.FILE} has peft_type"
        if source.file is None or not (source.torch or source.file.suffix == ".safetensors"):
            return None
        if any(_is_own(name) for name in source.tensors):
            others = _is_pipeline(source) or _is_anothers(source)
            return None if others else "keys end with .lora_A.weight"
        return None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """See ``loraformat_converters.peft.read``."""
        from loraformat_converters.peft.read import read

        return read(source, options)

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """See ``loraformat_converters.peft.write``."""
        from loraformat_converters.peft.write import write

        return write(adapter)


# kohya's and LyCORIS' modules, whose dots are underscores: ComfyUI takes PEFT's words behind them too.
_MANGLED = re.compile(r"(lora_(unet|te\d?|transformer|prior_unet|prior_te)|lycoris)_[^.]+\.lora_A\.weight")


def _is_own(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_embedding_A")) and not _MANGLED.fullmatch(name)


def _is_anothers(source: Source) -> bool:
    """Whether the tensors beside a configuration have names that PEFT has not.

    tinker-cookbook 0.6.1: experts stacked under w1 … w3, another word for the head, and the same two files. torchtune
    0.6.1 puts its own ``adapter_model.pt`` beside the folder that it exports for PEFT.
    """
    if source.file is None:  # MaxText keeps PEFT's configuration beside its own arrays
        return (source.folder / "0" / "items").is_dir()
    if not (source.torch or source.file.suffix == ".safetensors"):
        return False
    own = (".experts.w", ".unembed_tokens.", ".lora_a.weight")
    return any(word in name for name in source.tensors for word in own)


layout = Peft()
