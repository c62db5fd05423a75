"""TensorRT-LLM's numbered modules and Hugging Face's names, of models with the modules of Llama."""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.errors import fault
from loraformat.naming.links import Link, Seat
from loraformat.naming.spaces import TORCH, Known
from loraformat.naming.templates import Templates
from loraformat_converters.trtllm import NAMES

__all__ = ["space"]

# NVIDIA/TensorRT-LLM examples/hf_lora_convert.py hf_modules_to_trtllm_modules, of modules that are not fused
_TABLE = Templates(
    [
        ("model.layers.{}.self_attn.q_proj.weight", "layers.{}.attn_q"),
        ("model.layers.{}.self_attn.k_proj.weight", "layers.{}.attn_k"),
        ("model.layers.{}.self_attn.v_proj.weight", "layers.{}.attn_v"),
        ("model.layers.{}.self_attn.o_proj.weight", "layers.{}.attn_dense"),
        ("model.layers.{}.mlp.gate_proj.weight", "layers.{}.mlp_h_to_4h"),
        ("model.layers.{}.mlp.down_proj.weight", "layers.{}.mlp_4h_to_h"),
        ("model.layers.{}.mlp.up_proj.weight", "layers.{}.mlp_gate"),
    ]
)
_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")


class TrtllmNames:
    """See ``loraformat.spaces.Space``."""

    name = NAMES
    describes = "TensorRT-LLM's modules (layers.0.attn_q)"

    def links(self, known: Known) -> Iterator[Link]:
        """By the converter's table. A number does not say what a model calls its module: the config.json does."""
        model = known.config.get("model_type")
        if known.adapter.names != TORCH and not known.names and model not in _MODELS:
            what = f"what a module is called depends on the model, and model_type is {model!r}"
            fix = f"give --base DIR or --base config.json; known are {', '.join(_MODELS)}; or --names MAP"
            raise fault("LF-604", what, fix=fix)
        for key in known.torch_keys(lambda own: next(_TABLE.here(own), None)):
            for own in _TABLE.there(key):
                yield Link(Seat(key, axes="out,in"), Seat(own, axes="out,in"), "table: hf_lora_convert")


space = TrtllmNames()
