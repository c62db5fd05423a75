"""Servers of language models: vLLM, SGLang, TensorRT-LLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraformat.loaders import Reason
from loraformat_converters.loaders import findings

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["Sglang", "TensorRT", "Vllm"]

_HELPER = "vllm 0.32 vllm/lora/peft_helper.py"
_MODEL = "vllm 0.32 vllm/lora/lora_model.py"
_CONFIG = "vllm 0.32 vllm/config/lora.py"


class Vllm:
    """vLLM: PEFT folders; patterns and rsLoRA are understood."""

    name = "vllm"
    version = "0.32"
    describes = "vLLM: a server of language models"
    layouts = ("peft",)

    _RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    _DEFAULT = 16

    def reasons(self, adapter: Adapter) -> Iterator[Reason]:
        """Kinds, ranks; a head that is saved whole is an exception where it is a classifier's."""
        kinds = {"magnitude": _HELPER, "delta": _MODEL, "loha": _MODEL, "lokr": _MODEL, "rows": _MODEL}
        yield from findings.lacking(adapter, kinds)
        yield from findings.lacking(adapter, {"replace": _HELPER}, but=lambda key, _: _head(key) or _embedding(key))
        kept = [key for key, update in adapter.items() if "replace" in update and _embedding(key)]
        if kept:
            what = "an embedding saved whole is ignored: no loss unless it was trained, or resized"
            yield Reason(
                "if", what, kept[0], "merge where it was", "vllm 0.32 vllm/lora/utils.py is_base_embedding_weights"
            )
        yield from findings.convolutions(adapter, "vllm 0.32 vllm/lora/layers: linear and embedding layers only")
        if (found := findings.beyond(adapter, self._RANKS[-1])) is not None:
            what = f"rank {found[1]} is over the largest, {self._RANKS[-1]}"
            yield Reason(
                "no", what, found[0], f"loraformat resize --rank {self._RANKS[-1]}, which says the loss", _CONFIG
            )
        elif (found := findings.beyond(adapter, self._DEFAULT)) is not None:
            setting = next(rank for rank in self._RANKS if rank >= found[1])
            what = f"rank {found[1]} is over its default of {self._DEFAULT}"
            yield Reason("if", what, found[0], f"start it with --max-lora-rank {setting}", _CONFIG)


def _head(key: str) -> bool:
    """vllm 0.32 vllm/lora: of modules_to_save it knows a classification head."""
    return bool({"classifier", "score"} & set(key.split(".")))


def _embedding(key: str) -> bool:
    return key.endswith((".embed_tokens.weight", ".lm_head.weight")) or key in ("embed_tokens.weight", "lm_head.weight")


class Sglang:
    """SGLang: PEFT folders; of the scale it reads lora_alpha / r and nothing else."""

    name = "sglang"
    version = "0.5.23"
    describes = "SGLang: a server of language models"
    layouts = ("peft",)

    def reasons(self, adapter: Adapter) -> Iterator[Reason]:
        """Kinds; patterns and rsLoRA change the scale unseen."""
        source = "sglang 0.5.23 python/sglang/srt/lora/lora.py"
        yield from findings.pairs_alone(adapter, source)
        yield from findings.convolutions(adapter, source)
        yield from findings.scale_of_all(adapter, f"{source}: scaling = lora_alpha / r", _alpha_over_r(adapter))


class TensorRT:
    """TensorRT-LLM's converter of PEFT folders, and what it writes."""

    name = "trtllm"
    version = "05316d33"
    describes = "TensorRT-LLM, by its hf_lora_convert"
    layouts = ("trtllm", "peft")

    def reasons(self, adapter: Adapter) -> Iterator[Reason]:
        """What it drops without an error, one scale for all, and a side told by its size."""
        source = "TensorRT-LLM examples/hf_lora_convert.py at 05316d33"
        yield from findings.pairs_alone(adapter, source, "wrong")
        yield from findings.convolutions(adapter, source)
        yield from findings.stacks(adapter, source)
        config = findings.peft_config(adapter)
        if config:
            yield from findings.scale_of_all(
                adapter, f"{source}: the r of all", _alpha_over_r(adapter, config.get("use_rslora") is True)
            )
        for key, update in adapter.items():
            if "lora" in update and update["lora"].r >= min(update["lora"].matrix_shape()[-2:]):
                what = f"rank {update['lora'].r} is no smaller than a side: it takes the larger for the hidden one"
                yield Reason(
                    "wrong", what, key, "loraformat convert … --to trtllm writes the sides as they are", source
                )
                break


def _alpha_over_r(adapter: Adapter, root: bool = False) -> float | None:
    """The scale that a reader of lora_alpha and r alone computes; without a configuration, that of the first target."""
    config = findings.peft_config(adapter)
    alpha, r = config.get("lora_alpha"), config.get("r")
    if isinstance(alpha, (int, float)) and isinstance(r, int) and r > 0:
        return float(alpha) / (r**0.5 if root else r)
    return next((update["lora"].scale for update in adapter.values() if "lora" in update), None)
