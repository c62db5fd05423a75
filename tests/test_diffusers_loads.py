"""What is written is loaded by diffusers, which then computes what the adapter says."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

import loraformat as lf
from loraformat.testing import relative_error
from loraformat.verbs.convert import save
from loraformat_converters.diffusers import layout

pytestmark = pytest.mark.peer

FILE = "pytorch_lora_weights.safetensors"
MAKE = Path(__file__).parent / "golden" / "diffusers" / "make.py"


@pytest.fixture(scope="module")
def tool():
    """The models of the goldens, and diffusers' own way to load."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    spec = importlib.util.spec_from_file_location("diffusers_goldens", MAKE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def models_of(tool, family):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return {
        "sdxl": lambda: {
            "unet": tool.unet(),
            "text_encoder": tool.clip(CLIPTextModel, 14, 22),
            "text_encoder_2": tool.clip(CLIPTextModelWithProjection, 26, 34),
        },
        "flux": lambda: {"transformer": tool.flux()},
    }[family]


# Modules that lie together, of every kind: Linear, convolution, with and without a bias.
WANTED = {
    "unet": ("attn1.to_q", "attn2.to_k", "to_out.0", "conv1", "proj_in", "ff.net.2", "time_emb_proj", "conv_in", "upsamplers.0.conv"),
    "text_encoder": ("q_proj", "fc2"),
    "text_encoder_2": ("v_proj", "fc1", "text_projection"),
    "transformer": ("attn.to_q", "norm_out.linear", "proj_mlp", "x_embedder", "ff_context.net.0.proj"),
}  # fmt: skip


def adapter_of(models, *, dora=False, text_model="text_model."):
    """Every module another rank and scale; factors (and magnitudes) random."""
    rng = np.random.default_rng(0)
    targets = {}
    for component, model in models.items():
        for n, (name, weight) in enumerate(sorted(model.state_dict().items())):
            module = name.removesuffix(".weight")
            if module == name or not module.endswith(WANTED[component]):
                continue
            shape = tuple(weight.shape)
            place = lf.Placement(shape, (0,), tuple(range(1, len(shape))))
            out, in_ = place.matrix_shape
            rank = 1 + n % 4
            a, b = rng.standard_normal((rank, in_)), rng.standard_normal((out, rank))
            rule = ("alpha/r", "alpha/sqrt(r)", "factor")[n % 3]
            parts = [lf.Lora(a.astype("f4"), b.astype("f4"), 0.3 + n / 100, rule)]
            if dora:
                parts.append(lf.Magnitude((1 + rng.random(out)).astype("f4")))
            prefix = text_model if component == "text_encoder" else ""
            targets[f"{component}:{prefix}{name}"] = lf.Update(tuple(parts), place)
    return lf.Adapter(targets, components=tuple(sorted(models)))


def check(tool, family, adapter, path):
    from diffusers import FluxPipeline, StableDiffusionXLPipeline

    pipeline = FluxPipeline if family == "flux" else StableDiffusionXLPipeline
    fresh = models_of(tool, family)
    bases = {f"{c}:{n}": p.detach().numpy() for c, m in fresh().items() for n, p in m.named_parameters()}
    found = {
        n: t.numpy() for n, t in tool.deltas(fresh(), tool.into(pipeline, path)).items() if not n.startswith("base ")
    }
    wanted = {(k if k in bases else k.replace(":text_model.", ":")): u for k, u in adapter.items()}
    assert found.keys() == wanted.keys()
    for key, update in wanted.items():
        assert relative_error(found[key], update.delta(bases[key])) <= 3e-6, key


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_computes_what_the_adapter_says(tool, family, dora, tmp_path):
    adapter = adapter_of(models_of(tool, family)(), dora=dora)
    assert len({(u.rank, u.scale) for u in adapter.values()}) > 4
    save(adapter, tmp_path / FILE, layout)
    check(tool, family, adapter, tmp_path / FILE)


def test_a_text_encoder_without_its_inner_module_is_loaded_too(tool, tmp_path):
    adapter = adapter_of(models_of(tool, "sdxl")(), text_model="")
    save(adapter, tmp_path / FILE, layout)
    check(tool, "sdxl", adapter, tmp_path / FILE)


def test_a_file_of_the_tool_written_again_is_loaded_alike(tool, tmp_path):
    adapter = lf.load(MAKE.parent / "sdxl" / FILE)
    lf.save(adapter, tmp_path / "a.lora.safetensors")
    lf.convert(tmp_path / "a.lora.safetensors", tmp_path / FILE)
    placed = {}
    shapes = {f"{c}:{n}": tuple(p.shape) for c, m in models_of(tool, "sdxl")().items() for n, p in m.named_parameters()}
    for key, update in adapter.items():
        name = key if key in shapes else key.replace(":text_model.", ":")
        placed[key] = update.placed(lf.Placement.of(shapes[name], "out,in"))
    check(tool, "sdxl", lf.Adapter(placed, components=adapter.components), tmp_path / FILE)


def test_outputs_are_equal_too(tool, tmp_path):
    """A whole forward pass, not weight by weight."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    models = models_of(tool, "sdxl")()
    models = {"unet": models["unet"]}
    adapter = adapter_of(models)
    save(adapter, tmp_path / FILE, layout)
    torch.manual_seed(0)
    inputs = {"sample": torch.randn(1, 3, 8, 8), "timestep": 3, "encoder_hidden_states": torch.randn(1, 6, 14)}
    with torch.no_grad():
        merged = tool.unet()
        for key, update in adapter.items():
            weight = merged.get_parameter(key.removeprefix("unet:"))
            weight += torch.from_numpy(update.delta())
        wanted = merged(**inputs).sample
        tool.into(StableDiffusionXLPipeline, tmp_path / FILE)(models)
        found = models["unet"](**inputs).sample
        plain = tool.unet()(**inputs).sample
    assert relative_error(found.numpy(), wanted.numpy()) < 1e-5
    assert relative_error(found.numpy(), plain.numpy()) > 0.1
