"""LoRA on every kind of module, and under names that look like PEFT's own."""

from __future__ import annotations

from case import LLAMA_LINEARS, Case, tokens, vectors
from models import chain, gpt2, llama
from peft import LoraConfig, TaskType
from torch import nn
from transformers.pytorch_utils import Conv1D

X20 = vectors(3, 20)
X24 = vectors(3, 24)

MODULES: tuple[Case, ...] = (
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
        "mixed_conv1d_linear",
        chain(
            h__0__attn__c_proj=Conv1D(24, 24),
            h__0__attn__q_proj=nn.Linear(24, 24),
            h__1__mlp__c_fc=Conv1D(30, 24),
            h__1__mlp__up_proj=nn.Linear(30, 18),
        ),
        LoraConfig(r=5, lora_alpha=8, target_modules=["c_proj", "q_proj", "c_fc", "up_proj"]),
        X24,
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
        X20,
        adapter_name="weight_style",
    ),
)
