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
    """A plain torch module: convolutions of one, two and three axes, batch norm with its counter."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Conv1d(6, 10, 3, padding=1)
        self.two = torch.nn.Conv2d(5, 9, (3, 2), stride=2)
        self.norm = torch.nn.BatchNorm2d(9)
        self.norm.num_batches_tracked.fill_(2**24 + 1)  # float32 has no such number
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


def _lycoris(model: Callable[[], torch.nn.Module], kind: type[peft.PeftConfig], targets: Any, inputs: Any) -> Case:
    more = {} if model is _llama else {"use_effective_conv2d": True}
    return Case(model, inputs, kind, {"r": 3, "alpha": 5, "target_modules": targets, **more})


CONVOLUTIONS = ["one", "two", "three", "last"]
CASES: Mapping[str, Case] = {
    "llama": _lora(_llama, LLAMA),
    "llama rslora patterns": _patterns(),
    "llama dora": _lora(_llama, [*LLAMA, "embed_tokens"], use_dora=True),
    "llama bias all": _lora(_llama, LLAMA, bias="all"),
    "llama lora_bias": _lora(_llama, ["q_proj", "k_proj"], lora_bias=True),
    "llama saved": _lora(_llama, LLAMA, modules_to_save=["embed_tokens", "lm_head", "input_layernorm"]),
    "llama tokens": _lora(_llama, LLAMA, trainable_token_indices=[3, 40]),
    "llama larger": _lora(_llama, [*LLAMA, "embed_tokens", "lm_head"], vocabulary=67),
    "llama smaller": _lora(_llama, [*LLAMA, "embed_tokens", "lm_head"], vocabulary=55),
    "llama loha": _lycoris(_llama, peft.LoHaConfig, LLAMA, _text),
    "llama lokr": _lycoris(_llama, peft.LoKrConfig, LLAMA, _text),
    "llama vera": Case(_llama, _text, peft.VeraConfig, {"r": 5, "target_modules": ["q_proj", "down_proj"]}),
    "llama adalora": Case(
        _llama, _text, peft.AdaLoraConfig, {"init_r": 5, "lora_alpha": 10, "target_modules": LLAMA, "total_step": 9}
    ),
    "tied": _lora(_tied, LLAMA),
    "tied head": _lora(_tied, ["q_proj", "lm_head"]),
    "tied embedding": _lora(_tied, ["q_proj", "embed_tokens"]),
    "tied both": _lora(_tied, ["embed_tokens", "lm_head"]),
    "tied tokens": _lora(_tied, LLAMA, trainable_token_indices=[3, 40]),
    "tied saved": _lora(_tied, LLAMA, modules_to_save=["lm_head"]),
    "tied saved embedding": _lora(_tied, LLAMA, modules_to_save=["embed_tokens"]),
    "tied saved together": _lora(_tied, LLAMA, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "tied embedding together": _lora(_tied, ["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "tied larger embedding": _lora(_tied, ["q_proj", "embed_tokens"], vocabulary=67),
    "tied larger head": _lora(_tied, ["q_proj", "lm_head"], vocabulary=67),
    "gpt2 dora": _lora(_gpt2, ["c_attn", "c_proj", "wte"], fan_in_fan_out=True, use_dora=True),
    "gpt2 bias all": _lora(_gpt2, ["c_attn", "wpe"], fan_in_fan_out=True, bias="all"),
    "bert head": _lora(_bert, ["query", "value", "dense"], task_type="SEQ_CLS"),
    "bert dora": _lora(_bert, ["query", "word_embeddings"], use_dora=True, bias="all", modules_to_save=["pooler"]),
    "vit patches": _lora(_vit, ["projection"], _images, modules_to_save=["classifier"]),
    "vit patches dora": _lora(_vit, ["projection", "classifier"], _images, use_dora=True),
    "vit patches loha": _lycoris(_vit, peft.LoHaConfig, ["projection", "classifier"], _images),
    "t5": _lora(_t5, ["q", "v", "wo"], _both),
    "t5 tokens": _lora(_t5, ["q"], _both, trainable_token_indices=[3, 40]),
    "convolutions": _lora(Convolutions, CONVOLUTIONS, _volumes, modules_to_save=["norm"]),
    "convolutions dora": _lora(Convolutions, CONVOLUTIONS, _volumes, use_dora=True, bias="all"),
    "convolutions loha": _lycoris(Convolutions, peft.LoHaConfig, ["two", "last"], _volumes),
    "convolutions lokr": _lycoris(Convolutions, peft.LoKrConfig, ["two", "last"], _volumes),
    "gpt-oss experts": _lora(
        _experts("GptOss"), ["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    ),
}

MERGED_OTHERWISE = frozenset(
    {
        "tied head",
        "tied embedding",
        "tied both",
        "tied embedding together",
        "tied larger embedding",
        "tied larger head",
        "gpt2 dora",
    }
)
"""peft 0.21.2 merges into the tensor of both tied modules what acts on one of them: not what its own forward computes."""

REFUSED: Mapping[str, tuple[Case, str, str]] = {
    "a bias where the base has none": (_lora(_llama, ["down_proj"], lora_bias=True), "LF-602", "down_proj.bias"),
    "one of four tied modules": (_lora(_t5, ["q", "lm_head"], _both), "LF-609", "what more than two modules share"),
    "one of four, whole": (
        _lora(_t5, ["q"], _both, modules_to_save=["shared"]),
        "LF-609",
        "what more than two modules share",
    ),
    # transformers 5.23 gives the modules other names than the checkpoint has, and stacks experts, when it loads one.
    "modules of other names": (_lora(_vit, ["q_proj"], _images), "LF-602", "layers.0.attention.q_proj.weight"),
    "stacked experts": (
        _lora(_experts("Mixtral"), ["q_proj"], target_parameters=["experts.down_proj"]),
        "LF-602",
        "stores each expert by itself",
    ),
}
"""What has no right merge: case, rule, words."""
