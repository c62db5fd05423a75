"""TensorRT-LLM's numbered modules and Hugging Face's names, of models with the modules of Llama."""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.errors import fault
from loraformat.naming.decoders import number
from loraformat.naming.links import Link, Seat
from loraformat.naming.spaces import TORCH, Known
from loraformat.naming.templates import Templates, numbered
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
# lora_manager.py get_default_trtllm_modules_to_hf_modules, of Mixtral's modules
_ROUTER = Templates([("model.layers.{}.block_sparse_moe.gate.weight", "layers.{}.moe_router")])
_EXPERT, _STACKS = "model.layers.{{}}.block_sparse_moe.experts.{{}}.{}.weight", "layers.{{}}.{}"
_EXPERTS = {"w1": "moe_h_to_4h", "w2": "moe_4h_to_h", "w3": "moe_gate"}
_MODELS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2")


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
        for key in _torch_keys(known):
            for own in (*_TABLE.there(key), *_ROUTER.there(key)):
                yield Link(Seat(key, axes="out,in"), Seat(own, axes="out,in"), "table: hf_lora_convert")
            for leaf, module in _EXPERTS.items():
                if match := numbered(_EXPERT.format(leaf)).fullmatch(key):
                    own = _STACKS.format(module).format(match[1])
                    seat = Seat(own, index=(int(match[2]), _count(own, known)), axes="batch,out,in")
                    yield Link(Seat(key, axes="out,in"), seat, "table: LoraManager")


def _torch_keys(known: Known) -> Iterator[str]:
    """The torch keys that matter; of a stack, one for each expert."""
    yield from known.torch_keys(lambda own: next(iter((*_TABLE.here(own), *_ROUTER.here(own))), None))
    for own in known.adapter if known.adapter.names != TORCH and not known.names else ():
        for leaf, module in _EXPERTS.items():
            if match := numbered(_STACKS.format(module)).fullmatch(own):
                yield from (_EXPERT.format(leaf).format(match[1], e) for e in range(_count(own, known)))


def _count(own: str, known: Known) -> int:
    """How many experts there are: by the stack itself, else by the model's config.json."""
    shape = known.adapter[own].matrix_shape() if own in known.adapter else None
    return shape[0] if shape is not None and len(shape) == 3 else number(known.config, ("num_local_experts",), own)


space = TrtllmNames()
