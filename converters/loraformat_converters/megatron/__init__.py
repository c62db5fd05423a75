"""Megatron-Bridge (0.6.2): a distributed checkpoint of torch that holds adapters, with ``run_config.yaml`` beside it.

``….adapter.linear_in.weight`` [r, in] and ``….adapter.linear_out.weight`` [out, r], the layers of a model one over the
other in axis 0 where they are alike. A Linear of Megatron's is query, key and value in one (``linear_qkv``, by groups of
heads), or gate and up (``linear_fc1``): LoRA and DoRA adapt it whole, CanonicalLoRA each part (``adapter_q``).

``read`` is the checkpoint, ``ranks`` undoes what a tensor-parallel run did to the order of rows, ``settings`` is
``run_config.yaml``, ``space`` leads to the names of Hugging Face. Names here are those of Megatron's modules,
``decoder.layers.0.self_attention.linear_qkv``, and those that CanonicalLoRA calls its targets by,
``decoder.layers.0.self_attention.linear_q``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from loraformat.errors import fault

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.layout import Output, Reading, ReadOptions, WriteOptions
    from loraformat.source import Source

__all__ = ["NAMES", "Megatron", "layout"]

NAMES = "com.nvidia.megatron"
"""The name space: the modules of Megatron-Core's models."""

_OWN = re.compile(r".+\.adapter\.(?:adapter_\w+\.)?linear_(?:in|out)\.weight")


class Megatron:
    """Megatron-Bridge's checkpoints of a PEFT run."""

    name = "megatron"
    carries: frozenset[str] = frozenset()
    writes = False
    describes = "Megatron-Bridge: a distributed checkpoint (.metadata, *.distcp), run_config.yaml"
    scale = "alpha / dim in run_config.yaml"
    markers = frozenset({".metadata"})
    endings: tuple[str, ...] = ()
    names = frozenset({NAMES})

    def detect(self, source: Source) -> str | None:
        """A distributed checkpoint with the factors of an adapter."""
        if not source.distributed:
            return None
        found = next((name for name in source.tensors if _OWN.fullmatch(name)), None)
        return f"a distributed checkpoint with {found}" if found else None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """See ``loraformat_converters.megatron.read``."""
        from loraformat_converters.megatron.read import read

        return read(source, options)

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """LF-508: a checkpoint belongs to a run."""
        fix = "--to peft, after retarget --to torch: Megatron-Bridge loads a PEFT folder"
        raise fault("LF-508", "a checkpoint of Megatron-Bridge is read alone", fix=fix)


layout = Megatron()
