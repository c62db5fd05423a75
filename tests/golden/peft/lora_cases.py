"""LoRA: ranks, scales, patterns, kinds of module."""

from __future__ import annotations

import torch
from case import BLOCK_LINEARS, LLAMA_LINEARS, Case, tokens, vectors
from models import blocks, chain, gpt2, llama, numbered
from peft import LoraConfig, TaskType
from torch import nn
from transformers.pytorch_utils import Conv1D


def lora() -> list[Case]:
    """LoRA: ranks, scales, patterns, kinds of module."""
    x20 = vectors(3, 20)
    x24 = vectors(3, 24)
    return [
        Case("linear", blocks(), LoraConfig(r=6, lora_alpha=9, target_modules=BLOCK_LINEARS), x20),
        Case(
            "linear_square",
            blocks(square=True),
            LoraConfig(r=5, lora_alpha=8, target_modules=BLOCK_LINEARS),
            x24,
        ),
        Case(
            "rslora",
            blocks(),
            LoraConfig(r=5, lora_alpha=7, use_rslora=True, target_modules=BLOCK_LINEARS),
            x20,
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
            x20,
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
            x20,
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
            x20,
        ),
        Case(
            "embedding",
            chain(tok__embed__0=nn.Embedding(37, 20), lm__proj_2=nn.Linear(20, 12)),
            LoraConfig(r=6, lora_alpha=9, target_modules=["embed.0", "proj_2"]),
            tokens(37, 2, 5),
        ),
        Case(
            "conv",
            chain(
                net__1d__conv=nn.Conv1d(6, 10, 3, padding=1),
                net__to_2d=nn.Unflatten(2, (4, 5)),
                net__2d__conv=nn.Conv2d(10, 7, (3, 2), stride=(1, 1), padding=(1, 0)),
                net__2d__point=nn.Conv2d(7, 9, 1),
                net__to_3d=nn.Unflatten(3, (2, 2)),
                net__3d__conv=nn.Conv3d(9, 12, (3, 1, 2), padding=(1, 0, 0)),
                net__back=nn.Flatten(2),
                net__1d__point=nn.Conv1d(12, 8, 1),
            ),
            LoraConfig(r=4, lora_alpha=6, target_modules=["conv", "point"]),
            vectors(2, 6, 20),
        ),
        Case(
            "gpt2",
            gpt2,
            LoraConfig(
                r=5,
                lora_alpha=8,
                task_type=TaskType.CAUSAL_LM,
                fan_in_fan_out=True,
                target_modules=["c_attn", "attn.c_proj", "mlp.c_fc"],
            ),
            tokens(51, 2, 7),
        ),
        Case(
            "llama",
            llama(2),
            LoraConfig(r=3, lora_alpha=5, task_type=TaskType.CAUSAL_LM, target_modules=LLAMA_LINEARS),
            tokens(31, 2, 7),
        ),
        Case(
            "bf16",
            blocks(),
            LoraConfig(r=6, lora_alpha=9, target_modules=BLOCK_LINEARS),
            x20,
            dtype=torch.bfloat16,
            upcast=False,
        ),
        Case(
            "bf16_upcast",
            blocks(),
            LoraConfig(r=6, lora_alpha=9, target_modules=BLOCK_LINEARS),
            x20,
            dtype=torch.bfloat16,
        ),
        Case(
            "mixed_conv1d_linear",
            chain(
                h__0__attn__c_proj=Conv1D(24, 24),
                h__0__attn__q_proj=nn.Linear(24, 24),
                h__1__mlp__c_fc=Conv1D(30, 24),
                h__1__mlp__up_proj=nn.Linear(30, 18),
            ),
            LoraConfig(r=5, lora_alpha=8, target_modules=["c_proj", "q_proj", "c_fc", "up_proj"]),
            x24,
        ),
        Case(
            "dotted",
            chain(
                lora_block__weight_proj__default=nn.Linear(20, 28),
                lora_A__base_model__weight=nn.Linear(28, 14),
                default__lora_B__0__weight__weight=nn.Linear(14, 22),
                base_model__model__model__q_proj=nn.Linear(22, 16),
                lora_head=nn.Linear(16, 11),
            ),
            LoraConfig(
                r=6,
                lora_alpha=9,
                target_modules=["weight_proj.default", "lora_A.base_model.weight", "weight.weight", "q_proj"],
            ),
            x20,
            adapter_name="weight_style",
        ),
        Case("bin", blocks(), LoraConfig(r=6, lora_alpha=9, target_modules=BLOCK_LINEARS), x20, safe=False),
        Case(
            "pissa",
            blocks(bias=False),
            LoraConfig(r=6, lora_alpha=9, init_lora_weights="pissa", target_modules=BLOCK_LINEARS),
            x20,
            near_init=True,
            note="PEFT changes the base weights on loading: delta is merged minus base.safetensors, and"
            " get_delta_weight alone is under pissa_delta.<parameter>",
        ),
        Case(
            "pissa_converted",
            blocks(bias=False),
            LoraConfig(r=3, lora_alpha=4, init_lora_weights="pissa", target_modules=BLOCK_LINEARS),
            x20,
            near_init=True,
            convert=True,
            note="saved with path_initial_model_for_weight_conversion: a plain LoRA of twice the rank on the base as it"
            " was; delta is merged minus base.safetensors",
        ),
    ]
