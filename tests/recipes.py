"""What PEFT trains on which model: the recipes that the exports are made by, each under its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from exported_models import bert, gpt2, image, llama, minilm, roberta, sound, t5, tokens, two_texts, vit, whisper
from exported_modules import Kinds, Shared, UNet, noise
from peft import LoraConfig, PeftConfig


@dataclass(frozen=True)
class Recipe:
    """How a model is built, what its adapter changes, how many targets that are, what it is fed; ``trained`` as it is.

    ``lora`` is the configuration, ``method`` the class that it is of.
    """

    build: Callable[[], torch.nn.Module]
    lora: Mapping[str, Any]
    targets: int
    inputs: Callable[[], dict[str, torch.Tensor]] = tokens
    trained: bool = False
    method: Callable[..., PeftConfig] = LoraConfig


_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
_SHARED = {"target_modules": ["called_twice", "a"], "r": 2, "lora_alpha": 3}
_KINDS = {"target_modules": ["table", "q", "k", "turned", "bare", "conv", "ff.0", "ff.2"], "r": 3, "lora_alpha": 5}
_SHARED_DORA = {**_SHARED, "use_dora": True}

RECIPES: Mapping[str, Recipe] = {
    "bert": Recipe(
        bert,
        {
            "target_modules": ["query", "key", "value", "dense"],
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "rank_pattern": {"query": 3, r"layer\.1\.output\.dense": 5},
            "alpha_pattern": {"key": 9, "encoder.layer.0.intermediate.dense": 2},
        },
        targets=12,
    ),
    "roberta": Recipe(roberta, {"target_modules": ["query", "value", "dense"], "r": 3, "lora_alpha": 5}, targets=10),
    "minilm": Recipe(
        minilm,
        {
            "target_modules": ["query", "key", "value", "dense"],
            "r": 8,
            "lora_alpha": 12,
            "use_rslora": True,
            "rank_pattern": {"encoder.layer.1.attention.self.value": 5},
        },
        targets=18,
        trained=True,
    ),
    "bert-dora": Recipe(
        bert,
        {
            "target_modules": ["query", "value", "dense"],
            "r": 3,
            "lora_alpha": 5,
            "use_dora": True,
            "modules_to_save": ["LayerNorm"],
        },
        targets=20,
    ),
    "llama-saved": Recipe(
        lambda: llama(tied=False),
        {"target_modules": ["k_proj", "embed_tokens"], "modules_to_save": ["lm_head", "norm"], "r": 3, "lora_alpha": 5},
        targets=9,
    ),
    "llama": Recipe(lambda: llama(tied=False), {"target_modules": _LLAMA, "r": 5, "lora_alpha": 7}, targets=15),
    "llama-tied": Recipe(
        lambda: llama(tied=True),
        {"target_modules": _LLAMA, "r": 3, "lora_alpha": 4, "rank_pattern": {"lm_head": 2}},
        targets=15,
    ),
    "gpt2": Recipe(
        gpt2,
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4, "lora_alpha": 11, "fan_in_fan_out": True},
        targets=8,
    ),
    "vit": Recipe(
        vit,
        {"target_modules": ["q_proj", "v_proj", "o_proj", "fc1", "fc2", "projection"], "r": 3, "lora_alpha": 5},
        targets=11,
        inputs=image,
    ),
    "t5": Recipe(
        t5,
        {"target_modules": ["q", "k", "v", "o", "wi", "wo", "lm_head"], "r": 3, "lora_alpha": 4, "use_rslora": True},
        targets=33,
        inputs=two_texts,
    ),
    "whisper": Recipe(
        whisper,
        # not its conv1 and conv2, whose stride its forward reads: PEFT's layer has none
        {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "r": 3, "lora_alpha": 5},
        targets=22,
        inputs=sound,
    ),
    "unet": Recipe(
        UNet,
        {"target_modules": r"conv_.*|down|time|to_.*|up|shortcut", "r": 3, "lora_alpha": 5},
        targets=10,
        inputs=noise,
    ),
    "kinds": Recipe(Kinds, _KINDS, targets=10, inputs=lambda: {"x": torch.randint(0, 11, (2, 5))}),
    "kinds-dora": Recipe(
        Kinds, {**_KINDS, "use_dora": True}, targets=10, inputs=lambda: {"x": torch.randint(0, 11, (2, 5))}
    ),
    "llama-task": Recipe(
        lambda: llama(tied=False),
        {"target_modules": [*_LLAMA, "embed_tokens"], "r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM"},
        targets=16,
    ),
    "shared-2d": Recipe(Shared, _SHARED, targets=2, inputs=lambda: {"x": torch.randn(3, 5)}),
    "shared-3d": Recipe(Shared, _SHARED, targets=2, inputs=lambda: {"x": torch.randn(2, 3, 5)}),
    "dora-2d": Recipe(Shared, _SHARED_DORA, targets=2, inputs=lambda: {"x": torch.randn(3, 5)}),
    "dora-3d": Recipe(Shared, _SHARED_DORA, targets=2, inputs=lambda: {"x": torch.randn(2, 3, 5)}),
}
