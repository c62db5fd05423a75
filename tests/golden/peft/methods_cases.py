"""Other methods: DoRA, AdaLoRA, LoHa, LoKr, VeRA, BD-LoRA, and two that multiply the base."""

from __future__ import annotations

import peft
from case import BLOCK_LINEARS, Case, tokens, vectors
from models import blocks, chain, its_smaller_base, kernels, prune, resized_llama
from peft import LoraConfig, TaskType
from torch import nn
from transformers.pytorch_utils import Conv1D

X20 = vectors(3, 20)

METHODS: tuple[Case, ...] = (
    Case(
        "dora",
        chain(
            embed__0=nn.Embedding(37, 20),
            proj=nn.Linear(20, 28),
            to_2d=nn.Unflatten(2, (7, 4)),
            conv=nn.Conv2d(6, 9, (3, 2)),
            back=nn.Flatten(2),
            c_fc=Conv1D(26, 15),
        ),
        LoraConfig(r=5, lora_alpha=8, use_dora=True, target_modules=["embed.0", "proj", "conv", "c_fc"]),
        tokens(37, 2, 6),
    ),
    Case(
        "adalora",
        blocks(),
        peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=9, total_step=10, target_modules=BLOCK_LINEARS),
        X20,
    ),
    Case(
        "loha",
        chain(
            net__fc=nn.Linear(20, 28),
            net__to_2d=nn.Unflatten(1, (4, 7)),
            net__grow=nn.Unflatten(2, (7, 1)),
            net__conv=nn.Conv2d(4, 10, (3, 1)),
            net__point=nn.Conv2d(10, 9, 1),
        ),
        peft.LoHaConfig(r=3, alpha=5, use_effective_conv2d=True, target_modules=["fc", "conv", "point"]),
        X20,
    ),
    Case(
        "lokr",
        chain(
            net__fc=nn.Linear(20, 28),
            net__to_2d=nn.Unflatten(1, (4, 7)),
            net__grow=nn.Unflatten(2, (7, 1)),
            net__conv=nn.Conv2d(4, 10, (3, 1)),
        ),
        peft.LoKrConfig(r=2, alpha=3, decompose_factor=4, decompose_both=True, target_modules=["fc", "conv"]),
        X20,
    ),
    Case("vera", blocks(), peft.VeraConfig(r=6, target_modules=BLOCK_LINEARS), X20),
    Case(
        "ia3",
        blocks(),
        peft.IA3Config(target_modules=BLOCK_LINEARS, feedforward_modules=["mlp.fc"]),
        X20,
    ),
    Case("oft", blocks(), peft.OFTConfig(oft_block_size=4, target_modules=BLOCK_LINEARS), X20),
    Case(
        "dora_embedding_resized",
        resized_llama,
        LoraConfig(
            r=5,
            lora_alpha=8,
            use_dora=True,
            task_type=TaskType.CAUSAL_LM,
            target_modules=["embed_tokens", "lm_head", "k_proj"],
        ),
        tokens(34, 2, 5),
        base=its_smaller_base,
    ),
    Case(
        "bdlora",
        blocks(bias=False),
        LoraConfig(
            r=6,
            lora_alpha=9,
            target_modules=BLOCK_LINEARS,
            use_bdlora=peft.tuners.lora.config.BdLoraConfig(
                target_modules_bd_a=["mlp.fc"], target_modules_bd_b=["proj_1"], nblocks=2
            ),
        ),
        X20,
    ),
    Case(
        "adalora_pruned",
        chain(
            net__fc=nn.Linear(20, 28),
            net__up=nn.Linear(28, 32),
            net__to_2d=nn.Unflatten(1, (4, 8)),
            net__grow=nn.Unflatten(2, (4, 2)),
            net__conv=nn.Conv2d(4, 10, (3, 2)),
        ),
        peft.AdaLoraConfig(
            init_r=5, target_r=3, lora_alpha=7, total_step=10, target_modules=["net.fc", "net.up", "net.conv"]
        ),
        X20,
        prepare=prune,
        note="the budget left fc ranks 0, 2 and 3 of five, and none to up: PEFT's masks, set by hand",
    ),
    Case(
        "loha_kernels",
        kernels,
        peft.LoHaConfig(
            r=3,
            alpha=5,
            use_effective_conv2d=True,
            target_modules=["fc", "square", "line"],
            alpha_pattern={"net.square": 4, "fc": 7},
            rank_pattern={"line": 2},
        ),
        X20,
    ),
    Case(
        "loha_flat",
        kernels,
        peft.LoHaConfig(r=3, alpha=5, target_modules=["fc", "square", "line"]),
        X20,
    ),
    Case(
        "lokr_whole",
        kernels,
        peft.LoKrConfig(r=32, alpha=5, target_modules=["fc", "square"], decompose_factor=4, rank_pattern={"fc": 25}),
        X20,
        note="every factor is whole, and yet the scale is alpha / r of the configuration",
    ),
    Case(
        "lokr_core",
        kernels,
        peft.LoKrConfig(
            r=2,
            alpha=3,
            target_modules=["fc", "square", "line"],
            use_effective_conv2d=True,
            decompose_both=True,
            decompose_factor=8,
        ),
        X20,
    ),
)
