"""What is made: for each case a model, a configuration of PEFT, an input, and how to save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from models import (
    Chain,
    Experts,
    Rng,
    SelfAttention,
    TransposedExperts,
    blocks,
    chain,
    gpt2,
    its_causal_base,
    its_smaller_base,
    kernels,
    llama,
    llama_classifier,
    numbered,
    prune,
    resized_llama,
)
from peft import LoraConfig, PeftConfig, PeftModel, TaskType
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Case:
    """One folder: a model, a PEFT configuration, an input, and how to save."""

    name: str
    model: Callable[[], nn.Module]
    config: PeftConfig
    x: Callable[[Rng], Tensor]
    adapter_name: str = "default"
    dtype: torch.dtype = torch.float32
    upcast: bool = True
    safe: bool = True
    near_init: bool = False
    base: Callable[[nn.Module], nn.Module] | None = None
    reloads: bool = True
    prepare: Callable[[PeftModel], None] | None = None
    save_embeddings: bool | str = "auto"
    convert: bool = False
    note: str = ""


def vectors(*shape: int) -> Callable[[Rng], Tensor]:
    return lambda rng: rng.normal(*shape)


def tokens(vocabulary: int, *shape: int) -> Callable[[Rng], Tensor]:
    return lambda rng: rng.ids(1, vocabulary, *shape)


LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLOCK_LINEARS = ["proj_1", "mlp.fc"]


def cases() -> list[Case]:
    """Every case. Sizes of one case differ from each other wherever the model lets them."""
    return [*lora(), *trained(), *parameters(), *methods()]


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


def trained() -> list[Case]:
    """What is trained or stored beside the pairs: biases, modules, tokens, resized vocabularies."""
    x20 = vectors(3, 20)
    return [
        Case(
            "embedding_saved",
            llama(1),
            LoraConfig(
                r=5,
                lora_alpha=8,
                task_type=TaskType.CAUSAL_LM,
                target_modules=["embed_tokens", "lm_head", "k_proj"],
            ),
            tokens(31, 2, 5),
            note="save_embedding_layers='auto' wrote the base weights of the embeddings beside A and B",
        ),
        Case(
            "lora_bias",
            blocks(),
            LoraConfig(r=6, lora_alpha=9, lora_bias=True, init_lora_weights=False, target_modules=BLOCK_LINEARS),
            x20,
        ),
        Case("bias_all", blocks(), LoraConfig(r=6, lora_alpha=9, bias="all", target_modules=BLOCK_LINEARS), x20),
        Case(
            "bias_lora_only",
            blocks(),
            LoraConfig(r=6, lora_alpha=9, bias="lora_only", target_modules=BLOCK_LINEARS),
            x20,
        ),
        Case(
            "modules_to_save",
            blocks(),
            LoraConfig(r=6, lora_alpha=9, modules_to_save=["head"], target_modules=BLOCK_LINEARS),
            x20,
        ),
        Case(
            "seq_cls",
            llama_classifier,
            LoraConfig(r=5, lora_alpha=8, task_type=TaskType.SEQ_CLS, target_modules=["q_proj", "v_proj"]),
            tokens(31, 2, 7),
            base=its_causal_base,
            note="the base is the language model, which has lm_head.weight and no score.weight",
        ),
        Case(
            "trainable_tokens",
            chain(tok__embed=nn.Embedding(37, 20), lm__proj_2=nn.Linear(20, 12)),
            LoraConfig(
                r=6,
                lora_alpha=9,
                target_modules=["proj_2"],
                trainable_token_indices={"tok.embed": [30, 3, 11]},
            ),
            lambda rng: torch.cat([torch.tensor([[3, 11, 30]]), rng.ids(1, 37, 1, 3)], dim=1),
        ),
        Case(
            "trainable_tokens_tied",
            llama(1, tied=True),
            LoraConfig(
                r=5,
                lora_alpha=8,
                task_type=TaskType.CAUSAL_LM,
                target_modules=["q_proj"],
                trainable_token_indices=[7, 3],
            ),
            lambda rng: torch.cat([torch.tensor([[3, 7]]), rng.ids(1, 31, 1, 4)], dim=1),
        ),
        Case(
            "vocabulary_resized",
            resized_llama,
            LoraConfig(r=5, lora_alpha=8, task_type=TaskType.CAUSAL_LM, target_modules=["k_proj"]),
            tokens(34, 2, 5),
            base=its_smaller_base,
            save_embeddings=True,
            note="three tokens were added before training: the base has 31 rows, the adapter holds all 34 of both"
            " embeddings, under their own names",
        ),
        Case(
            "tokens_resized",
            resized_llama,
            LoraConfig(
                r=5,
                lora_alpha=8,
                task_type=TaskType.CAUSAL_LM,
                target_modules=["k_proj"],
                trainable_token_indices=[33, 5, 31],
            ),
            lambda rng: torch.cat([torch.tensor([[33, 5, 31, 32]]), rng.ids(1, 34, 1, 3)], dim=1),
            base=its_smaller_base,
            save_embeddings=True,
        ),
        Case(
            "tokens_alone",
            chain(tok__embed=nn.Embedding(37, 20), lm__proj_2=nn.Linear(20, 12)),
            peft.TrainableTokensConfig(token_indices=[30, 3, 11], target_modules=["tok.embed"]),
            lambda rng: torch.cat([torch.tensor([[3, 11, 30]]), rng.ids(1, 37, 1, 3)], dim=1),
        ),
        Case(
            "lora_bias_and_bias",
            blocks(),
            LoraConfig(
                r=6,
                lora_alpha=9,
                bias="lora_only",
                lora_bias=True,
                init_lora_weights=False,
                target_modules=BLOCK_LINEARS,
            ),
            x20,
        ),
    ]


def parameters() -> list[Case]:
    """Pairs on parameters: experts, attention's fused projections, groups."""
    x20 = vectors(3, 20)
    return [
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
            x20,
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
            x20,
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
            x20,
        ),
    ]


def methods() -> list[Case]:
    """Other methods: DoRA, AdaLoRA, LoHa, LoKr, VeRA, BD-LoRA, and two that multiply the base."""
    x20 = vectors(3, 20)
    return [
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
            x20,
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
            x20,
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
            x20,
        ),
        Case("vera", blocks(), peft.VeraConfig(r=6, target_modules=BLOCK_LINEARS), x20),
        Case(
            "ia3",
            blocks(),
            peft.IA3Config(target_modules=BLOCK_LINEARS, feedforward_modules=["mlp.fc"]),
            x20,
        ),
        Case("oft", blocks(), peft.OFTConfig(oft_block_size=4, target_modules=BLOCK_LINEARS), x20),
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
            x20,
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
            x20,
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
            x20,
        ),
        Case(
            "loha_flat",
            kernels,
            peft.LoHaConfig(r=3, alpha=5, target_modules=["fc", "square", "line"]),
            x20,
        ),
        Case(
            "lokr_whole",
            kernels,
            peft.LoKrConfig(
                r=32, alpha=5, target_modules=["fc", "square"], decompose_factor=4, rank_pattern={"fc": 25}
            ),
            x20,
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
            x20,
        ),
    ]
