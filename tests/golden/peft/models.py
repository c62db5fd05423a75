"""The models that the goldens are made of, and the numbers that fill them."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn


class Rng:
    """Seeded normal numbers and token ids; numpy's, since they are the same on every machine."""

    def __init__(self, seed: str) -> None:
        self._rng = np.random.default_rng(zlib.crc32(seed.encode()))

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.from_numpy(self._rng.standard_normal(shape, dtype=np.float32)) * std

    def ids(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.from_numpy(self._rng.integers(low, high, shape))


@torch.no_grad()
def fill_base(model: nn.Module, rng: Rng) -> None:
    """Normal weights and biases; the weights of norms are normal about one."""
    for name, parameter in sorted(model.named_parameters()):
        noise = rng.normal(*parameter.shape)
        if parameter.dim() > 1:
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(0.1 * noise + (0 if name.endswith("bias") else 1))


class Chain(nn.Module):
    """Modules at dotted paths, applied one after the other with a tanh after each linear or convolution."""

    __module__ = "__main__"  # PEFT writes it into the configuration (parent_library), as of any script's model

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
