"""Writes the golden files: LoRAs that diffusers 0.42.1 saves, and the ΔW that it computes when it loads and fuses them.

    python tests/golden/diffusers/make.py

Needs the extra ``peers``. Every size differs from every other; every factor is random, B too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import loraformat as lf

HERE = Path(__file__).parent
FILE = "pytorch_lora_weights.safetensors"


def unet() -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=5,
        block_out_channels=(12, 20),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        cross_attention_dim=14,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def clip(kind: type, hidden: int, inner: int) -> torch.nn.Module:
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=31,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=9,
        projection_dim=11,
    )
    return kind(config)


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(3)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=10,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=14,
        pooled_projection_dim=18,
        axes_dims_rope=(2, 2, 4),
    )


def trained(model: torch.nn.Module, seed: int, **config: Any) -> torch.nn.Module:
    """The model with an adapter of random factors (and magnitudes) in it."""
    inject_adapter_in_model(LoraConfig(**config), model)
    model.peft_config = {"default": LoraConfig(**config)}
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=generator)
        elif "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return model


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if "lora_" not in name
    }


def deltas(
    models: Mapping[str, torch.nn.Module], load: Callable[[Mapping[str, torch.nn.Module]], None]
) -> dict[str, Any]:
    """What the tool changes: component:parameter → ΔW; and the weights that a magnitude is divided by the norm of."""
    before = {name: weights(model) for name, model in models.items()}
    load(models)
    found = {}
    for component, model in models.items():
        dora = any("lora_magnitude" in name for name, _ in model.named_parameters())
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
        for name, tensor in weights(model).items():
            if not torch.equal(tensor, before[component][name]):
                key = f"{component}:{name}" if component else name
                found[key] = tensor - before[component][name]
                if dora:
                    found[f"base {key}"] = before[component][name]
    return found


def into(pipeline: Any, path: Path) -> Callable[[Mapping[str, torch.nn.Module]], None]:
    """Load a file as the pipeline's ``load_lora_weights`` does, without the rest of a pipeline."""

    def load(models: Mapping[str, torch.nn.Module]) -> None:
        more = {"return_alphas": True} if pipeline is FluxPipeline else {}
        state, alphas, metadata = pipeline.lora_state_dict(path, return_lora_metadata=True, **more)
        for name, model in models.items():
            if name == "unet":
                pipeline.load_lora_into_unet(state, alphas, model, metadata=metadata)
            elif name == "transformer":
                pipeline.load_lora_into_transformer(state, alphas, model, metadata=metadata)
            else:
                pipeline.load_lora_into_text_encoder(state, alphas, model, prefix=name, metadata=metadata)

    return load


def case(name: str, pipeline: Any, fresh: Callable[[], dict[str, torch.nn.Module]]) -> None:
    folder = HERE / name
    save_file(deltas(fresh(), into(pipeline, folder / FILE)), folder / "delta.safetensors")


def config_of(model: Any) -> dict[str, Any]:
    """As the training scripts of diffusers collate it."""
    value = model.peft_config["default"].to_dict()
    return {key: list(item) if isinstance(item, set) else item for key, item in value.items()}


UNET = {"r": 3, "lora_alpha": 7, "target_modules": ["to_q", "to_out.0", "conv1", "proj_in", "time_emb_proj"]}
PATTERNS = {"rank_pattern": {"conv1": 2}, "alpha_pattern": {"down_blocks.0.attentions.0.proj_in": 5, "conv1": 9}}
TEXT = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "out_proj", "fc1"]}


def sd(name: str, *, header: bool) -> None:
    """A pipeline's file of two components; the text encoder's names as the training scripts convert them."""
    config = UNET | PATTERNS if header else {"r": 3, "target_modules": ["to_q", "to_out.0"]}
    one, two = trained(unet(), 5, **config), trained(clip(CLIPTextModel, 14, 22), 6, **TEXT)
    layers = get_peft_model_state_dict(one, adapter_name="default")
    metadata = {"unet_lora_adapter_metadata": config_of(one), "text_encoder_lora_adapter_metadata": config_of(two)}
    StableDiffusionPipeline.save_lora_weights(
        HERE / name,
        unet_lora_layers=layers if header else convert_state_dict_to_diffusers(layers),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(two)),
        **(metadata if header else {}),
    )
    case(name, StableDiffusionPipeline, lambda: {"unet": unet(), "text_encoder": clip(CLIPTextModel, 14, 22)})


def sdxl() -> None:
    """Two text encoders, one with its inner module text_model."""
    models = {
        "unet": trained(unet(), 7, r=5, lora_alpha=2.5, use_rslora=True, target_modules=["to_k", "to_v"]),
        "text_encoder": trained(clip(CLIPTextModel, 14, 22), 8, **TEXT),
        "text_encoder_2": trained(clip(CLIPTextModelWithProjection, 26, 34), 9, **{**TEXT, "lora_alpha": 3}),
    }
    states = {name: get_peft_model_state_dict(model) for name, model in models.items()}
    StableDiffusionXLPipeline.save_lora_weights(
        HERE / "sdxl",
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=convert_state_dict_to_diffusers(states["text_encoder"]),
        text_encoder_2_lora_layers=convert_state_dict_to_diffusers(states["text_encoder_2"]),
        **{f"{name}_lora_adapter_metadata": config_of(model) for name, model in models.items()},
    )

    def fresh() -> dict[str, torch.nn.Module]:
        two = clip(CLIPTextModelWithProjection, 26, 34)
        return {"unet": unet(), "text_encoder": clip(CLIPTextModel, 14, 22), "text_encoder_2": two}

    case("sdxl", StableDiffusionXLPipeline, fresh)


def transformer(name: str, **config: Any) -> None:
    model = trained(flux(), 10, **config)
    layers = get_peft_model_state_dict(model)
    FluxPipeline.save_lora_weights(HERE / name, layers, transformer_lora_adapter_metadata=config_of(model))
    case(name, FluxPipeline, lambda: {"transformer": flux()})


def alphas() -> None:
    """A transformer's file with an ``.alpha`` for each module, as other trainers write beside diffusers' names."""
    model = trained(flux(), 11, r=3, lora_alpha=3, target_modules=["to_k", "proj_mlp"])
    state = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(model).items()}
    modules = sorted({key.partition(".lora_")[0] for key in state})
    state |= {f"{module}.alpha": torch.tensor(1.5 + i) for i, module in enumerate(modules)}
    (HERE / "alphas").mkdir(exist_ok=True)
    save_file(state, HERE / "alphas" / FILE, {"format": "pt"})
    case("alphas", FluxPipeline, lambda: {"transformer": flux()})


def processors() -> None:
    """Attention processors as diffusers before 0.22 saved them: no component, ``to_out_lora`` for ``to_out.0``."""
    model = trained(unet(), 12, r=3, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    state = {}
    for key, value in get_peft_model_state_dict(model).items():
        module, _, factor = key.removesuffix(".weight").rpartition(".")
        above, _, leaf = module.removesuffix(".0").rpartition(".")
        state[f"{above}.processor.{leaf}_lora.{ {'lora_A': 'down', 'lora_B': 'up'}[factor] }.weight"] = value
    (HERE / "processors").mkdir(exist_ok=True)
    save_file(state, HERE / "processors" / FILE, {"format": "pt"})

    def load(models: Mapping[str, torch.nn.Module]) -> None:
        models[""].load_lora_adapter(load_file(HERE / "processors" / FILE), prefix=None)

    save_file(deltas({"": unet()}, load), HERE / "processors" / "delta.safetensors")


def bare() -> None:
    """``save_lora_adapter`` of one model."""
    model = trained(unet(), 13, r=4, lora_alpha=6, target_modules=["to_q", "conv2"])
    model._hf_peft_config_loaded = True
    model.save_lora_adapter(HERE / "bare", adapter_name="default")

    def load(models: Mapping[str, torch.nn.Module]) -> None:
        models[""].load_lora_adapter(HERE / "bare", prefix=None, use_safetensors=True)

    save_file(deltas({"": unet()}, load), HERE / "bare" / "delta.safetensors")


def stored(model: torch.nn.Module, component: str, base: Any) -> torch.nn.Module:
    """The model with the weights that an exported graph holds, by whichever names and in whichever orientation."""
    prefix = "text_model." if component == "text_encoder" else ""  # as it was called when it was exported
    held = base.parameters()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            key = f"{component}/model.onnx:{prefix}{name}"
            if key in held:
                parameter.copy_(torch.from_numpy(base.read(key).copy()))
                continue
            change = lf.Update((lf.Delta(np.ones(parameter.shape, "f4")),))
            name = f"{component}:{prefix}{name}"
            if parameter.ndim == 2:
                hints = lf.Hints(axes={"*": "in,out"})
            else:  # a group norm was exported as a plain one and a Mul and an Add behind it
                module, _, leaf = name.partition(":")[2].rpartition(".")
                scope = re.sub(r"\.(?!\d)", "/", module)
                hints = lf.Hints({name: f"/{scope}/{'Mul' if leaf == 'weight' else 'Add'}"})
            probe = lf.Adapter({name: change}, components=(component,))
            ((match, *_),) = base.resolve(probe, hints).require().targets.values()
            value = torch.from_numpy(base.read(f"{match.file}:{match.weight}").copy())
            parameter.copy_(value.T if parameter.ndim == 2 else value.reshape(parameter.shape))
    return model.eval()


def onnx() -> None:
    """A kohya file of both models of a pipeline that lies exported beside the ONNX goldens, and what diffusers computes.

    The models get the weights of the graphs; that they are those the graphs were exported from, their outputs show.
    """
    folder, exported = HERE.parent / "kohya" / "onnx", HERE.parent / "onnx" / "pipeline"
    base, truth = lf.open_base(exported / "model"), load_file(exported / "truth.safetensors")
    configs = {c: json.loads((exported / "model" / c / "config.json").read_text()) for c in ("unet", "text_encoder")}
    models = {
        "unet": stored(UNet2DConditionModel.from_config(configs["unet"]), "unet", base),
        "text_encoder": stored(CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])), "text_encoder", base),
    }

    def outputs() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            inputs = {name: truth[name] for name in ("sample", "timestep", "encoder_hidden_states")}
            hidden = models["text_encoder"](truth["input_ids"]).last_hidden_state
            return {"hidden": hidden.clone(), "noise": models["unet"](**inputs).sample.clone()}

    for name, tensor in outputs().items():
        torch.testing.assert_close(tensor, truth[f"base.{name}"], rtol=1e-4, atol=1e-5)
    generator = torch.Generator().manual_seed(14)
    state = {}
    for component, prefix, wanted in (
        ("unet", "lora_unet", ("to_q", "to_out.0", "ff.net.2", "conv1", "proj_in", "time_emb_proj")),
        ("text_encoder", "lora_te_text_model", ("q_proj", "out_proj", "fc1")),
    ):
        for n, (name, weight) in enumerate(sorted(models[component].state_dict().items())):
            module, rank = name.removesuffix(".weight"), 1 + n % 3
            if module != name and module.endswith(wanted):
                stem = f"{prefix}_{module.replace('.', '_')}"
                down = torch.randn(rank, *weight.shape[1:], generator=generator) / 4
                up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator) / 4
                state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
                # diffusers 0.42.1 gives the commonest alpha to modules whose own it looks for under another name: those
                # of attention processors, and, with transformers 5, of the whole text encoder
                own = 0.5 + n % 5 if component == "unet" and ".attn" not in module else 1.5
                state[f"{stem}.alpha"] = torch.tensor(own)
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "kohya.safetensors", {"ss_network_module": "networks.lora"})
    into(StableDiffusionPipeline, folder / "kohya.safetensors")(models)
    save_file({f"adapted.{name}": tensor for name, tensor in outputs().items()}, folder / "truth.safetensors")


def main() -> None:
    sd("sd", header=True)
    sd("sd-no-header", header=False)
    sdxl()
    transformer(
        "flux", r=4, lora_alpha=6, target_modules=["to_q", "proj_mlp", "norm_out.linear"], init_lora_weights=True
    )
    transformer("flux-dora", r=2, lora_alpha=5, target_modules=["to_v", "to_add_out"], use_dora=True)
    transformer("flux-bias", r=2, lora_alpha=5, target_modules=["to_v"], lora_bias=True)
    alphas()
    processors()
    bare()
    onnx()
    for path in sorted(HERE.glob("*/*")):
        print(path.relative_to(HERE), path.stat().st_size)
    print(json.dumps({"diffusers": __import__("diffusers").__version__, "peft": __import__("peft").__version__}))


if __name__ == "__main__":
    main()
