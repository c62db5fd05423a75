"""Pairs on parameters: experts, attention's fused projections, groups."""

from __future__ import annotations

from case import Case, vectors
from models import Chain, Experts, SelfAttention, TransposedExperts, chain
from peft import LoraConfig
from torch import nn

X20 = vectors(3, 20)

PARAMETERS: tuple[Case, ...] = (
    Case(
        "target_parameters",
        lambda: Chain(
            {
                "model.layers.0.mlp.experts": Experts(3, 20, 13),
                "model.layers.0.proj": nn.Linear(20, 16),
                "model.layers.1.mlp.experts": Experts(3, 16, 11),
            }
        ),
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["proj"],
            target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
        ),
        X20,
    ),
    Case(
        "target_parameters_transposed",
        lambda: Chain({"model.layers.0.mlp.experts": TransposedExperts(3, 20, 13)}),
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=[],
            target_parameters=["experts.down_proj", "experts.router", "experts.gate_up_proj"],
        ),
        X20,
    ),
    Case(
        "grouped_conv",
        chain(net__conv=nn.Conv2d(6, 10, (3, 2), groups=2), net__point=nn.Conv2d(10, 9, 1)),
        LoraConfig(r=4, lora_alpha=6, target_modules=["conv", "point"]),
        vectors(2, 6, 5, 4),
    ),
    Case(
        "multihead_attention",
        lambda: Chain({"layers.0.self": SelfAttention(20, 4), "layers.0.proj": nn.Linear(20, 12)}),
        LoraConfig(r=6, lora_alpha=9, target_modules=["attn", "layers.0.proj"]),
        vectors(2, 5, 20),
        note="PEFT 0.21.2 adds the delta of out_proj twice (huggingface/peft#3774), on merging and in the"
        " unmerged forward pass: merged and y hold base + 2 x delta there",
    ),
    Case(
        "multihead_attention_patterns",
        lambda: Chain({"layers.0.self": SelfAttention(20, 4), "layers.1.self": SelfAttention(20, 5)}),
        LoraConfig(
            r=6,
            lora_alpha=9,
            bias="all",
            target_modules=["attn"],
            rank_pattern={r"layers\.1\.self\.attn": 4, "out_proj": 5},
            alpha_pattern={"0.self.attn": 7, r".*out_proj": 3},
        ),
        vectors(2, 5, 20),
        note="a pattern that means out_proj means nothing; out_proj's delta is added twice (huggingface/peft#3774)",
    ),
    Case(
        "target_parameters_one",
        lambda: Chain({"proj": nn.Linear(20, 16), "mlp.experts": Experts(3, 16, 11)}),
        LoraConfig(
            r=4, lora_alpha=6, use_rslora=True, target_modules=["proj"], target_parameters=["experts.down_proj"]
        ),
        X20,
    ),
)
