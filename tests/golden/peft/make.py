"""Golden adapters written by PEFT itself, with the weights and outputs that PEFT computes from them.

Run ``python make.py`` (torch, transformers, peft and safetensors at the versions in ``golden.json``) to write
every folder again; ``python make.py linear conv`` writes only those. One folder per case:

``adapter/``           what ``save_pretrained`` wrote, less its README.md
``base.safetensors``   the base model before PEFT touched it (transformers: ``base/``, by ``save_pretrained``)
``truth.safetensors``  ``delta.<parameter>``: ``layer.get_delta_weight``, or merged minus base where PEFT has
                       no delta to add to the base (``delta_from`` in ``golden.json`` says which);
                       ``merged.<parameter>``: each parameter that ``merge_and_unload`` changed or added;
                       ``x``, ``y``: an input and the output of the model with the adapter, unmerged.
                       All float32, token ids int64
``golden.json``        the case, the versions, and rank and scaling as the PEFT layers hold them

No number in these files comes from a formula written here: weights are drawn from a seeded generator and the
rest is what PEFT returns. Another processor may change the last bit of a product, or the sign of a singular
vector.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT writes target_modules, a set, in hash order
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

HERE = Path(__file__).resolve().parent


class Rng:
    """Seeded normal numbers and token ids; numpy's, since they are the same on every machine."""

    def __init__(self, seed: str) -> None:
        self._rng = np.random.default_rng(zlib.crc32(seed.encode()))

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.from_numpy(self._rng.standard_normal(shape, dtype=np.float32)) * std

    def ids(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.from_numpy(self._rng.integers(low, high, shape))


# ----------------------------------------------------------------------------------------------------- models


class Chain(nn.Module):
    """Modules at dotted paths, applied one after the other with a tanh after each linear or convolution."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.paths = list(modules)
        for path, module in modules.items():
            parent: nn.Module = self
            *above, last = path.split(".")
            for part in above:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, module)

    def forward(self, x: Tensor) -> Tensor:
        for path in self.paths:
            module = self.get_submodule(path)
            x = module(x)
            if path != self.paths[-1] and not isinstance(module, nn.Flatten | nn.Unflatten):
                x = torch.tanh(x)
        return x


class SelfAttention(nn.Module):
    """An nn.MultiheadAttention with its three arguments the same."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    """Gated experts with stacked parameters (expert, out, in), each token through each expert."""

    def __init__(self, experts: int, dim: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, dim))
        self.down_proj = nn.Parameter(torch.empty(experts, dim, inner))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("bi,eoi->beo", x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("beo,edo->bd", torch.tanh(gate) * up, self.down_proj)


class TransposedExperts(nn.Module):
    """The same stored (expert, in, out), as gpt-oss does, behind a 2-D router parameter."""

    is_transposed = True

    def __init__(self, experts: int, dim: int, inner: int) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.empty(experts, dim))
        self.gate_up_proj = nn.Parameter(torch.empty(experts, dim, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(experts, inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        share = torch.softmax(x @ self.router.T, dim=-1)
        gate, up = torch.einsum("bi,eio->beo", x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("be,beo,eod->bd", share, torch.tanh(gate) * up, self.down_proj)


def chain(**modules: nn.Module) -> Callable[[], nn.Module]:
    """A Chain from keywords, with ``__`` for the dots of a path."""
    return lambda: Chain({path.replace("__", "."): module for path, module in modules.items()})


def blocks(square: bool = False, bias: bool = True) -> Callable[[], nn.Module]:
    """Two blocks of linears; their names hold digits and repeat components."""
    d, h = (24, 24) if square else (20, 28)
    return lambda: Chain(
        {
            "blocks.0.attn.attn.proj_1": nn.Linear(d, h, bias=bias),
            "blocks.0.mlp.fc": nn.Linear(h, d, bias=bias),
            "blocks.10.attn.attn.proj_1": nn.Linear(d, h, bias=bias),
            "blocks.10.mlp.fc": nn.Linear(h, d, bias=bias),
            "head": nn.Linear(d, 7),
        }
    )


def numbered(*layers: int) -> Callable[[], nn.Module]:
    """Layers with the numbers given, each of two projections."""
    modules: dict[str, nn.Module] = {}
    for i in layers:
        modules[f"model.layers.{i}.self_attn.q_proj"] = nn.Linear(20, 28, bias=False)
        modules[f"model.layers.{i}.mlp.up_proj"] = nn.Linear(28, 20, bias=False)
    return lambda: Chain(modules)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=51,
        n_positions=16,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_inner=40,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def llama_config(layers: int, tied: bool = False) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )


def llama(layers: int, tied: bool = False) -> Callable[[], nn.Module]:
    return lambda: transformers.LlamaForCausalLM(llama_config(layers, tied))


def llama_classifier() -> nn.Module:
    config = llama_config(1)
    config.num_labels = 3
    return transformers.LlamaForSequenceClassification(config)


def its_causal_base(model: nn.Module) -> nn.Module:
    """The language model a classifier was made of: same body, a language head, no ``score``."""
    base = transformers.LlamaForCausalLM(llama_config(1))
    fill_base(base, Rng("its_causal_base"))
    missing, _ = base.load_state_dict(model.state_dict(), strict=False)
    assert missing == ["lm_head.weight"], missing
    return base


def resized_llama() -> nn.Module:
    """A language model whose vocabulary grew by three tokens."""
    model = llama(1)()
    model.resize_token_embeddings(34)
    return model


def its_smaller_base(model: nn.Module) -> nn.Module:
    """The model before its vocabulary grew."""
    base = llama(1)()
    weights = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:31].clone()
    base.load_state_dict(weights)
    return base


def kernels() -> nn.Module:
    """A linear and convolutions of both kinds, whose kernels have sizes of their own."""
    return chain(
        net__fc=nn.Linear(20, 168),
        net__to_2d=nn.Unflatten(1, (6, 28)),
        net__grow=nn.Unflatten(2, (7, 4)),
        net__square=nn.Conv2d(6, 10, (3, 2)),
        net__flat=nn.Flatten(2),
        net__line=nn.Conv1d(10, 9, 5),
    )()


@torch.no_grad()
def prune(model: PeftModel) -> None:
    """What AdaLoRA's allocator does at the end of its budget: masked singular values are zero, the rest is kept."""
    masks = {"net.fc": [True, False, True, True, False], "net.up": [False] * 5, "net.conv": [True] * 4 + [False]}
    for module, mask in masks.items():
        values = model.base_model.model.get_submodule(module).lora_E["default"]
        values[~torch.tensor(mask)] = 0
    model.peft_config["default"].rank_pattern = {f"{module}.lora_E": mask for module, mask in masks.items()}


# ------------------------------------------------------------------------------------------------------ cases


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
    x20, x24 = vectors(3, 20), vectors(3, 24)
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
            "multihead_attention",
            lambda: Chain({"layers.0.self": SelfAttention(20, 4), "layers.0.proj": nn.Linear(20, 12)}),
            LoraConfig(r=6, lora_alpha=9, target_modules=["attn", "layers.0.proj"]),
            vectors(2, 5, 20),
            note="PEFT 0.21.2 adds the delta of out_proj twice (huggingface/peft#3774), on merging and in the"
            " unmerged forward pass: merged and y hold base + 2 x delta there",
        ),
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
            "pissa_converted",
            blocks(bias=False),
            LoraConfig(r=3, lora_alpha=4, init_lora_weights="pissa", target_modules=BLOCK_LINEARS),
            x20,
            near_init=True,
            convert=True,
            note="saved with path_initial_model_for_weight_conversion: a plain LoRA of twice the rank on the base as it"
            " was; delta is merged minus base.safetensors",
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
            "target_parameters_one",
            lambda: Chain({"proj": nn.Linear(20, 16), "mlp.experts": Experts(3, 16, 11)}),
            LoraConfig(
                r=4, lora_alpha=6, use_rslora=True, target_modules=["proj"], target_parameters=["experts.down_proj"]
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


# ---------------------------------------------------------------------------------------------------- writing


@torch.no_grad()
def fill_base(model: nn.Module, rng: Rng) -> None:
    """Normal weights and biases; the weights of norms are normal about one."""
    for name, parameter in sorted(model.named_parameters()):
        noise = rng.normal(*parameter.shape)
        if parameter.dim() > 1:
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(0.1 * noise + (0 if name.endswith("bias") else 1))


@torch.no_grad()
def fill_adapter(model: nn.Module, rng: Rng, near_init: bool) -> None:
    """Stand in for training: every trainable parameter becomes normal, or drifts from its start value."""
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            continue
        noise = rng.normal(*parameter.shape)
        if near_init:
            parameter.add_(0.1 * noise)
        elif "lora_magnitude_vector" in name or "ia3_l" in name:
            parameter.mul_(1 + 0.3 * noise)
        elif "oft_R" in name:
            parameter.copy_(0.1 * noise)
        else:
            parameter.copy_(0.4 * noise)


def forward(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        y = model.eval()(x.to(dtype) if x.is_floating_point() else x)
    return (y if isinstance(y, Tensor) else y.logits).float()


def tuner_layers(model: PeftModel, paths: dict[int, str]) -> list[tuple[str, Any]]:
    """Pairs of base parameter name and PEFT layer, matched by the identity of the base module."""
    found: list[tuple[str, Any]] = []
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            which = getattr(module, "parameter_name", None)
            if which is None:
                which = "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight"
            found.append((f"{paths[id(base)]}.{which}", module))
    return sorted(found, key=lambda pair: pair[0])


def own_delta(layer: Any, adapter: str) -> Tensor | None:
    """What get_delta_weight says, where that is a tensor to add to the base weight."""
    multiplies = isinstance(layer, peft.tuners.oft.layer.OFTLayer)
    grouped = getattr(layer.get_base_layer(), "groups", 1) > 1
    variant = adapter in getattr(layer, "lora_variant", {})
    if multiplies or grouped or variant or not hasattr(layer, "get_delta_weight"):
        return None
    with torch.no_grad():
        delta: Tensor = layer.get_delta_weight(adapter)
        return delta.float()


def truth_of(
    case: Case, model: PeftModel, layers: list[tuple[str, Any]], base: dict[str, Tensor], x: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Merge the model; the tensors of truth.safetensors and the entries of golden.json that go with them."""
    adapter = case.adapter_name
    targets: dict[str, dict[str, Any]] = {}
    deltas: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for name, layer in layers:
        known = {field: getattr(layer, field, {}) for field in ("r", "scaling")}
        entry = {field: value[adapter] for field, value in known.items() if adapter in value}
        if entry:
            targets[name] = entry
        delta = own_delta(layer, adapter)
        if delta is not None:
            (extra if case.near_init else deltas)[f"pissa_delta.{name}" if case.near_init else name] = delta
    y = forward(model, x, case.dtype)
    try:
        merged = model.merge_and_unload().state_dict()
    except NotImplementedError as error:
        return {}, {"targets": targets, "refused_by_peft": str(error)}

    tensors = {"x": x.float() if x.is_floating_point() else x, "y": y, **extra}
    source: dict[str, str] = {}
    for name, value in merged.items():
        if name in base and torch.equal(value, base[name]):
            assert name not in deltas or not deltas[name].any(), f"{case.name}: {name} did not change"
            deltas.pop(name, None)
            continue
        tensors[f"merged.{name}"] = value.float()
        if name in deltas:
            tensors[f"delta.{name}"] = deltas[name]
            source[name] = "get_delta_weight"
        elif name in base and base[name].shape == value.shape:
            tensors[f"delta.{name}"] = (value.double() - base[name].double()).float()
            source[name] = "merged minus base"
    if missing := set(deltas) - set(merged):
        raise AssertionError(f"{case.name}: no merged {missing}")
    return tensors, {"targets": targets, "delta_from": source}


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path)


def make(case: Case) -> None:
    """Write the folder of one case."""
    folder = HERE / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rng = Rng(case.name)
    torch.manual_seed(zlib.crc32(case.name.encode()))

    model = case.model()
    fill_base(model, rng)
    model = model.to(case.dtype).eval()
    saved = case.base(model) if case.base else model
    if isinstance(saved, transformers.PreTrainedModel):
        saved.save_pretrained(folder / "base")
        (folder / "base" / "generation_config.json").unlink(missing_ok=True)
    else:
        write_tensors(saved.state_dict(), folder / "base.safetensors")
    base = {name: tensor.clone() for name, tensor in saved.state_dict().items()}
    untouched = copy.deepcopy(model)

    paths = {id(module): path for path, module in model.named_modules()}
    adapted = get_peft_model(
        model, copy.deepcopy(case.config), adapter_name=case.adapter_name, autocast_adapter_dtype=case.upcast
    )
    layers = tuner_layers(adapted, paths)
    initial = folder / "initial"
    if case.convert:  # PEFT wants the initial adapter marked as one that leaves the base alone
        wanted = adapted.peft_config["default"].init_lora_weights
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(str(initial))
        adapted.peft_config["default"].init_lora_weights = wanted
    fill_adapter(adapted, rng, case.near_init)
    if case.prepare:
        case.prepare(adapted)
    x = case.x(rng)
    if x.is_floating_point():
        x = x.to(case.dtype)

    staging = folder / "staging"
    adapted.save_pretrained(
        str(staging),
        safe_serialization=case.safe,
        save_embedding_layers=case.save_embeddings,
        path_initial_model_for_weight_conversion=str(initial) if case.convert else None,
    )
    shutil.rmtree(initial, ignore_errors=True)
    written = staging if case.adapter_name == "default" else staging / case.adapter_name
    written.rename(folder / "adapter")
    shutil.rmtree(staging, ignore_errors=True)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)

    tensors, entries = truth_of(case, adapted, layers, base, x)
    if tensors:
        write_tensors(tensors, folder / "truth.safetensors")

    # The files have to hold the whole adapter: PEFT reads them back to the same outputs.
    again = copy.deepcopy(untouched)
    paths = {id(module): path for path, module in again.named_modules()}
    reloaded = PeftModel.from_pretrained(
        again, folder / "adapter", adapter_name=case.adapter_name, autocast_adapter_dtype=case.upcast
    )
    if tensors and case.reloads:
        drift = (forward(reloaded, x, case.dtype) - tensors["y"]).abs().max().item()
        assert drift <= 1e-5, f"{case.name}: reloaded, the outputs differ by {drift}"
    elif tensors:
        other, what = truth_of(case, reloaded, tuner_layers(reloaded, paths), base, x)
        assert not torch.equal(other["y"], tensors["y"])
        write_tensors(other, folder / "truth_reloaded.safetensors")
        entries["targets_reloaded"] = what["targets"]

    golden = {
        "case": case.name,
        "peft": peft.__version__,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "made_by": "make.py",
        **({"note": case.note} if case.note else {}),
        **({"adapter_name": case.adapter_name} if case.adapter_name != "default" else {}),
        **entries,
    }
    (folder / "golden.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


def main(wanted: list[str]) -> None:
    """Write all cases, or the named ones, and print their sizes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    total = 0
    for case in cases():
        if wanted and case.name not in wanted:
            continue
        make(case)
        size = sum(file.stat().st_size for file in (HERE / case.name).rglob("*") if file.is_file())
        total += size
        print(f"{case.name:30} {size / 1024:8.1f} KiB", flush=True)
    print(f"{'all':30} {total / 1024:8.1f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
