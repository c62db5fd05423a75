"""Programs that run models on one's own machine: MLX, llama.cpp, ONNX Runtime and its GenAI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraformat.loaders import Reason
from loraformat_converters.loaders import findings

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["GenAI", "LlamaCpp", "Mlx", "OnnxRuntime"]


class Mlx:
    """mlx-lm's load_adapters: one rank and one scale for all."""

    name = "mlx"
    version = "0.32.2"
    describes = "mlx-lm, on Apple's machines"
    layouts = ("mlx",)

    def reasons(self, adapter: Adapter) -> Iterator[Reason]:
        """Kinds; an embedding's DoRA is normalised by token, PEFT's by dimension."""
        source = "mlx-lm 0.32.2 tuner/utils.py"
        yield from findings.lacking(adapter, dict.fromkeys(("loha", "lokr", "delta", "rows", "replace"), source))
        yield from findings.convolutions(adapter, source)
        keys = [key for key, update in adapter.items() if "magnitude" in update and update.op == "embedding"]
        if keys and adapter.names != "mlx":
            what = "the magnitude of an embedding is one a token there, one a dimension here"
            yield Reason("no", what, keys[0], findings.MERGE, "mlx-lm 0.32.2 tuner/dora.py")


class LlamaCpp:
    """llama.cpp's --lora: pairs, one alpha for all."""

    name = "llama.cpp"
    version = "0650ea8c"
    describes = "llama.cpp, and what is built on it"
    layouts = ("gguf",)

    def reasons(self, adapter: Adapter) -> Iterator[Reason]:
        """Pairs only; changes of norms are skipped."""
        source = "llama.cpp src/llama-adapter.cpp at 0650ea8c"
        yield from findings.pairs_alone(adapter, source)
        yield from findings.convolutions(adapter, source)


class OnnxRuntime:
    """ONNX Runtime's LoraAdapter, fed to a model that has inputs for it."""

    name = "ort"
    version = "1.31.1"
    describes = "ONNX Runtime: LoraAdapter"
    layouts = ("onnx_adapter",)

    def reasons(self, adapter: Adapter) -> Iterator[Reason]:
        """Its file holds tensors for inputs of one model: pairs, where that model computes B·A·x, and what a DoRA is there."""
        source = "onnxruntime 1.31.1 core/session/lora_adapters.h"
        yield from findings.lacking(adapter, dict.fromkeys(("loha", "lokr", "delta", "rows", "replace"), source))
        if any("magnitude" in update for update in adapter.values()):
            what, fix = "a DoRA takes slots that were made for one", "give it to attach … --mode swap"
            yield Reason("if", what, fix=fix, source=source)
        fix = "loraformat attach … --mode swap makes one; or attach the adapter as a branch, which needs no file"
        yield Reason("if", "the model must have inputs of these names", fix=fix, source=source)


class GenAI(OnnxRuntime):
    """onnxruntime-genai's Adapters: the same file."""

    name = "genai"
    version = "a0c04eb1"
    describes = "ONNX Runtime GenAI: og.Adapters"
