"""LoRA on linear layers: ranks, scales, patterns, starts, and how they are saved."""

from __future__ import annotations

import torch
from case import BLOCK_LINEARS, Case, vectors
from models import blocks, numbered
from peft import LoraConfig

X20 = vectors(3, 20)
X24 = vectors(3, 24)

LORA: tuple[Case, ...] = (
    Case("linear", blocks(), LoraConfig(r=6, lora_alpha=9, target_modules=BLOCK_LINEARS), X20),
    Case(
        "linear_square",
        blocks(square=True),
        LoraConfig(r=5, lora_alpha=8, target_modules=BLOCK_LINEARS),
        X24,
    ),
    Case(
        "rslora",
        blocks(),
        LoraConfig(r=5, lora_alpha=7, use_rslora=True, target_modules=BLOCK_LINEARS),
        X20,
    ),
    Case(
        "patterns",
        numbered(1, 2, 11),
        LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=["q_proj", "up_proj"],
            rank_pattern={
                r".*\.1\.self_attn\.q_proj": 2,
                r"layers\.\d+\.self_attn\.q_proj": 4,
                "q_proj": 6,
            },
            alpha_pattern={
                "(self_attn|mlp).q_proj": 11,
                r"layers\.1\..*": 13,
                r"model\.layers\.[0-9]\.mlp\.up_proj": 9,
                "up_proj": 14,
            },
        ),
        X20,
        note="keys are in the order of the file, which PEFT sorts; the first of those that match counts",
    ),
    Case(
        "patterns_resorted",
        numbered(1, 11),
        LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=["q_proj", "up_proj"],
            alpha_pattern={"q_proj": 11, r"layers\.1\.self_attn\.q_proj": 4, "layers.1.mlp.up_proj": 7},
        ),
        X20,
        reloads=False,
        note="PEFT sorts the keys of adapter_config.json, so the pattern that counts on loading is not"
        " the one that counted in training: truth.safetensors is the trained model,"
        " truth_reloaded.safetensors what PeftModel.from_pretrained makes of the files",
    ),
    Case(
        "rslora_patterns",
        numbered(1, 11),
        LoraConfig(
            r=3,
            lora_alpha=5,
            use_rslora=True,
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2, "up_proj": 7},
            alpha_pattern={r".*11\.mlp\.up_proj": 2.5, "layers.11.self_attn.q_proj": 10},
        ),
        X20,
    ),
    Case(
        "bf16",
        blocks(),
        LoraConfig(r=6, lora_alpha=9, target_modules=BLOCK_LINEARS),
        X20,
        dtype=torch.bfloat16,
        upcast=False,
    ),
    Case(
        "bf16_upcast",
        blocks(),
        LoraConfig(r=6, lora_alpha=9, target_modules=BLOCK_LINEARS),
        X20,
        dtype=torch.bfloat16,
    ),
    Case("bin", blocks(), LoraConfig(r=6, lora_alpha=9, target_modules=BLOCK_LINEARS), X20, safe=False),
    Case(
        "pissa",
        blocks(bias=False),
        LoraConfig(r=6, lora_alpha=9, init_lora_weights="pissa", target_modules=BLOCK_LINEARS),
        X20,
        near_init=True,
        note="PEFT changes the base weights on loading: delta is merged minus base.safetensors, and"
        " get_delta_weight alone is under pissa_delta.<parameter>",
    ),
    Case(
        "pissa_converted",
        blocks(bias=False),
        LoraConfig(r=3, lora_alpha=4, init_lora_weights="pissa", target_modules=BLOCK_LINEARS),
        X20,
        near_init=True,
        convert=True,
        note="saved with path_initial_model_for_weight_conversion: a plain LoRA of twice the rank on the base as it"
        " was; delta is merged minus base.safetensors",
    ),
)
