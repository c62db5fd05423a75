"""Small models of transformers with every kind of adapter that PEFT trains on them: what is merged, and what to compare.

No two sizes of a model are equal where its architecture lets them differ, so that a turned matrix does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import transformers

IDS = torch.arange(2, 50).reshape(2, 24)


@dataclass(frozen=True)
class Case:
    """A model, and how PEFT adapts it.

    Attributes:
        inputs: what the model is called with.
        kind: PEFT's configuration class, and what it is given.
        vocabulary: the size that the embedding is brought to before the training.
    """

    model: Callable[[], torch.nn.Module]
    inputs: Callable[[], Mapping[str, torch.Tensor]]
    kind: type[peft.PeftConfig]
    options: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: int | None = None


class Convolutions(torch.nn.Module):
    """A plain torch module: convolutions of one, two and three axes, a grouped one, batch norm with its counter."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Conv1d(6, 10, 3, padding=1)
        self.two = torch.nn.Conv2d(5, 9, (3, 2), stride=2)
        self.norm = torch.nn.BatchNorm2d(9)
        self.three = torch.nn.Conv3d(3, 7, (1, 2, 3))
        self.last = torch.nn.Linear(7, 4)

    def forward(self, one: torch.Tensor, two: torch.Tensor, three: torch.Tensor) -> torch.Tensor:
        """The sum of all branches' means."""
        first = self.one(one).mean()
        second = self.norm(self.two(two)).mean()
        return self.last(self.three(three).mean((2, 3, 4))) + first * second


def _llama(*, tied: bool = False) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        tie_word_embeddings=tied,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config)


def _tied() -> torch.nn.Module:
    return _llama(tied=True)


def _gpt2() -> torch.nn.Module:
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 44, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=57, bos_token_id=1, eos_token_id=2, **sizes))


def _bert() -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=5,
    )
    return transformers.BertForSequenceClassification(config)


def _vit() -> torch.nn.Module:
    config = transformers.ViTConfig(
        image_size=12,
        patch_size=4,
        num_channels=3,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config)


def _t5(**more: Any) -> torch.nn.Module:
    config = transformers.T5Config(
        vocab_size=59, d_model=24, d_kv=7, d_ff=40, num_layers=2, num_heads=3, decoder_start_token_id=0, **more
    )
    return transformers.T5ForConditionalGeneration(config)


def _experts(name: str) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        sizes: dict[str, Any] = {
            "vocab_size": 61,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 10,
        }
        if name == "Qwen3Moe":
            sizes |= {"moe_intermediate_size": 14, "num_experts": 6, "num_experts_per_tok": 2}
        else:
            sizes |= {"num_local_experts": 6, "num_experts_per_tok": 2}
        if name == "GptOss":
            sizes |= {"layer_types": ["full_attention"]}
        config = getattr(transformers, f"{name}Config")(**sizes)
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


def _text() -> Mapping[str, torch.Tensor]:
    return {"input_ids": IDS}


def _both() -> Mapping[str, torch.Tensor]:
    return {"input_ids": IDS, "decoder_input_ids": IDS[:, :9]}


def _images() -> Mapping[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 12, 12)}


def _volumes() -> Mapping[str, torch.Tensor]:
    return {"one": torch.randn(2, 6, 11), "two": torch.randn(2, 5, 9, 8), "three": torch.randn(2, 3, 4, 5, 6)}


LORA = {"r": 4, "lora_alpha": 10}
LLAMA = ["q_proj", "k_proj", "o_proj", "down_proj"]


def _lora(model: Callable[[], torch.nn.Module], targets: Any, inputs: Any = _text, **more: Any) -> Case:
    vocabulary = more.pop("vocabulary", None)
    return Case(model, inputs, peft.LoraConfig, {**LORA, "target_modules": targets, **more}, vocabulary)


def _patterns(**more: Any) -> Case:
    ranks = {"rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 6}, "alpha_pattern": {"k_proj": 5}}
    return _lora(_llama, LLAMA, use_rslora=True, **ranks, **more)


CASES: Mapping[str, Case] = {
    "llama": _lora(_llama, LLAMA),
    "llama rslora patterns": _patterns(),
    "llama dora": _lora(_llama, [*LLAMA, "embed_tokens"], use_dora=True),
    "llama bias all": _lora(_llama, LLAMA, bias="all"),
    "llama bias lora_only": _lora(_llama, LLAMA, bias="lora_only"),
    "llama saved": _lora(_llama, LLAMA, modules_to_save=["embed_tokens", "lm_head", "input_layernorm"]),
    "llama tokens": _lora(_llama, LLAMA, trainable_token_indices=[3, 40]),
    "llama resized": _lora(_llama, [*LLAMA, "embed_tokens", "lm_head"], vocabulary=67),
    "llama smaller": _lora(_llama, [*LLAMA, "embed_tokens", "lm_head"], vocabulary=55),
    "llama lora_bias": _lora(_llama, LLAMA, lora_bias=True),
    "llama loha": Case(_llama, _text, peft.LoHaConfig, {"r": 3, "alpha": 5, "target_modules": LLAMA}),
    "llama lokr": Case(_llama, _text, peft.LoKrConfig, {"r": 3, "alpha": 5, "target_modules": LLAMA}),
    "llama vera": Case(_llama, _text, peft.VeraConfig, {"r": 5, "target_modules": ["q_proj", "down_proj"]}),
    "llama adalora": Case(
        _llama, _text, peft.AdaLoraConfig, {"init_r": 5, "lora_alpha": 10, "target_modules": LLAMA, "total_step": 9}
    ),
    "tied": _lora(_tied, LLAMA),
    "tied head": _lora(_tied, ["q_proj", "lm_head"]),
    "tied tokens": _lora(_tied, LLAMA, trainable_token_indices=[3, 40]),
    "tied saved": _lora(_tied, LLAMA, modules_to_save=["lm_head"]),
    "tied saved together": _lora(_tied, LLAMA, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "tied embedding together": _lora(_tied, ["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "tied resized": _lora(_tied, ["q_proj", "embed_tokens"], vocabulary=67),
    "gpt2": _lora(_gpt2, ["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    "gpt2 dora": _lora(_gpt2, ["c_attn", "c_proj", "wte"], fan_in_fan_out=True, use_dora=True),
    "gpt2 bias all": _lora(_gpt2, ["c_attn"], fan_in_fan_out=True, bias="all"),
    "gpt2 wpe": _lora(_gpt2, ["wpe", "c_fc"], fan_in_fan_out=True),
    "gpt2 loha": Case(_gpt2, _text, peft.LoHaConfig, {"r": 3, "alpha": 5, "target_modules": ["c_attn", "c_fc"]}),
    "bert head": _lora(_bert, ["query", "value", "dense"], task_type="SEQ_CLS"),
    "bert pooler": _lora(_bert, ["query"], modules_to_save=["classifier", "pooler"]),
    "bert dora bias": _lora(_bert, ["query", "word_embeddings"], use_dora=True, bias="all"),
    "vit": _lora(_vit, ["q_proj", "v_proj", "query", "value", "projection"], _images, modules_to_save=["classifier"]),
    "vit dora": _lora(_vit, ["q_proj", "query", "projection"], _images, use_dora=True),
    "vit loha": Case(_vit, _images, peft.LoHaConfig, {"r": 3, "alpha": 5, "target_modules": ["query", "q_proj", "projection"]}),
    "t5": _lora(_t5, ["q", "v", "wo"], _both),
    "t5 shared saved": _lora(_t5, ["q"], _both, modules_to_save=["shared"]),
    "t5 shared": _lora(_t5, ["q", "shared"], _both),
    "t5 head": _lora(_t5, ["q", "lm_head"], _both),
    "t5 tokens": _lora(_t5, ["q"], _both, trainable_token_indices=[3, 40]),
    "t5 resized": _lora(_t5, ["q"], _both, vocabulary=67, modules_to_save=["shared"]),
    "convolutions": _lora(Convolutions, ["one", "two", "three", "last"], _volumes, modules_to_save=["norm"]),
    "convolutions dora": _lora(Convolutions, ["one", "two", "three", "last"], _volumes, use_dora=True, bias="all"),
    "convolutions loha": Case(
        Convolutions, _volumes, peft.LoHaConfig, {"r": 3, "alpha": 5, "target_modules": ["two", "last"], "use_effective_conv2d": True}
    ),
    "convolutions lokr": Case(
        Convolutions, _volumes, peft.LoKrConfig, {"r": 3, "alpha": 5, "target_modules": ["two", "last"], "use_effective_conv2d": True}
    ),
    **{
        f"{name} experts": _lora(
            _experts(name), ["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
        )
        for name in ("Mixtral", "Qwen3Moe", "GptOss")
    },
    **{
        f"{name} {parameter}": _lora(_experts(name), ["q_proj"], target_parameters=[f"experts.{parameter}"])
        for name in ("Mixtral", "Qwen3Moe", "GptOss") for parameter in ("gate_up_proj", "down_proj")
    },
    "Mixtral router": _lora(_experts("Mixtral"), ["q_proj", "gate"]),
}
