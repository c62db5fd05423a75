"""Golden adapters written by kohya's sd-scripts itself, with the ΔW that its own code computes from them.

Run ``python make_sd_scripts.py`` with a checkout of github.com/kohya-ss/sd-scripts at ``COMMIT`` in PYTHONPATH, and
torch, diffusers, transformers and safetensors installed. One folder per case:

``adapter.safetensors``  what ``save_weights`` of ``networks/lora.py`` or ``lora_flux.py`` wrote; for ``old`` the alphas
                         were taken out again, as files had none before sd-scripts 0.4
``truth.safetensors``    ``delta.<key>``: ``get_weight`` of the modules that ``create_network_from_weights`` made of the
                         file; for ``split_qkv`` also ``trained.<key>``: what the trained modules add to an output
``golden.json``          the case, the versions, each module's scale, whether the file is refused
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

assert AutoencoderKL
# What its modules import besides, and no LoRA code of it calls.
UNUSED = (
    "torchvision",
    "torchvision.transforms",
    "cv2",
    "imagesize",
    *(f"library.{xl}lpw_stable_diffusion" for xl in ("", "sdxl_")),
)
for name in UNUSED:
    if name not in sys.modules:
        stub = MagicMock()
        stub.__spec__, stub.__path__ = importlib.machinery.ModuleSpec(name, None), []
        sys.modules[name] = stub

from library import sai_model_spec  # noqa: E402
from networks import lora, lora_flux  # noqa: E402

HERE = Path(__file__).resolve().parent
COMMIT = "48d368fa557731ad0488c07304dfeba8c07910eb"
VERSIONS = {"sd-scripts": COMMIT, "torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}  # fmt: skip
PIPELINE = HERE.parent / "onnx" / "pipeline" / "model"


def unet() -> UNet2DConditionModel:
    """Of the tiny pipeline whose ONNX files are in the goldens beside these."""
    return UNet2DConditionModel.from_config(json.loads((PIPELINE / "unet" / "config.json").read_text()))


class TextEncoder(nn.Module):
    """With the level ``text_model`` that transformers 4 has, which sd-scripts asks for, and transformers 5 has not."""

    def __init__(self) -> None:
        super().__init__()
        config = CLIPTextConfig(**json.loads((PIPELINE / "text_encoder" / "config.json").read_text()))
        self.text_model = CLIPTextModel(config)


def header(network: nn.Module, args: dict) -> dict[str, str]:
    """As train_network.py writes it, of the strings that say something here."""
    said = {
        "ss_network_module": "networks.lora", "ss_network_dim": network.lora_dim, "ss_network_alpha": network.alpha,
        "ss_network_args": json.dumps(args), "ss_output_name": "harbour", "ss_sd_model_name": "tiny.safetensors",
        "ss_base_model_version": "sd_v1", "ss_v2": False, "ss_learning_rate": 1e-4, "ss_training_comment": None,
        "ss_tag_frequency": json.dumps({"1_hrbr": {"boat": 3, "ship, \"tall\"": 1}}),
    }  # fmt: skip
    spec = sai_model_spec.build_metadata(
        None, False, False, False, True, False, 0, title="Harbour sketches", license="CC-BY-4.0",
        tags="ink, harbour", optional_metadata={"trigger_phrase": "hrbr", "usage_hint": "0.7 is enough"},
    )  # fmt: skip
    return {**{key: str(value) for key, value in said.items()}, **spec}


@torch.no_grad()
def fill(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.normal_().mul_(0.4)


def write(case: str, network: nn.Module, models: tuple, args: dict, dtype: torch.dtype | None) -> Path:
    """The network trained, and saved."""
    (HERE / case).mkdir(exist_ok=True)
    network.apply_to(*models)
    fill(network)
    file = HERE / case / "adapter.safetensors"
    network.save_weights(str(file), dtype, header(network, args))
    return file


def truth(case: str, file: Path, module: object, models: tuple, more: dict[str, torch.Tensor]) -> None:
    """What sd-scripts reads in the file."""
    network, weights = module.create_network_from_weights(1.0, str(file), None, *models, for_inference=True)
    network.apply_to(*models)
    network.load_weights(str(file))
    loras = [*network.text_encoder_loras, *network.unet_loras]
    assert {m.lora_name for m in loras} == {key.split(".")[0] for key in weights}
    tensors = {f"delta.{m.lora_name}.weight": m.get_weight().detach().contiguous() for m in loras}
    save_file(tensors | more, HERE / case / "truth.safetensors")
    scales = {m.lora_name: float(m.scale) for m in loras}
    facts = {"case": case, "versions": VERSIONS, "refused": False, "made_from": "file", "scales": scales}
    (HERE / case / "golden.json").write_text(json.dumps(facts, indent=2) + "\n")


def sd15() -> None:
    """Linear and convolution, one text encoder, float16, the alpha of the convolutions rounded in it."""
    args = {"conv_dim": "2", "conv_alpha": "7.3"}
    encoder, model = TextEncoder(), unet()
    network = lora.create_network(1.0, 3, 4.5, None, encoder, model, **args)
    file = write("sd15", network, (encoder, model), args, torch.float16)
    truth("sd15", file, lora, (TextEncoder(), unet()), {})


def encoders() -> None:
    """Two text encoders (lora_te1_, lora_te2_) and no dtype given."""
    encoders, model = [TextEncoder(), TextEncoder()], unet()
    network = lora.create_network(1.0, 2, 1, None, encoders, model)
    file = write("encoders", network, (encoders, model), {}, None)
    truth("encoders", file, lora, ([TextEncoder(), TextEncoder()], unet()), {})


def old() -> None:
    """Without any alpha, and without a header."""
    encoder, model = TextEncoder(), unet()
    network = lora.create_network(1.0, 2, 1, None, encoder, model)
    file = write("old", network, (encoder, model), {}, None)
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.endswith(".alpha")}, file)
    truth("old", file, lora, (TextEncoder(), unet()), {})


class SingleStreamBlock(nn.Module):
    """The names of Flux; its sizes are far from here."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(12, 28, bias=False)
        self.linear2 = nn.Linear(17, 10, bias=False)


class Flux(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.single_blocks = nn.ModuleList([SingleStreamBlock(), SingleStreamBlock()])


def split_qkv() -> None:
    """Four pairs fused into one, with the alpha of one.

    NOTE: the double blocks' three pairs cannot be written: their ``(split_dims,) = …[:3]`` raises in this commit.
    """
    lora_flux.LoRANetwork.get_qkv_mlp_split_dims = classmethod(lambda cls: [5, 5, 5, 13])
    model = Flux()
    args = {"split_qkv": "True"}
    network = lora_flux.LoRANetwork([], model, 1.0, lora_dim=2, alpha=3, split_qkv=True, in_dims=[0] * 5)
    file = write("split_qkv", network, ([], model, False, True), args, None)
    trained = {}
    for module in network.unet_loras:
        width = module.lora_down[0].in_features if module.split_dims else module.lora_down.in_features
        eye = torch.eye(width)
        trained[f"trained.{module.lora_name}.weight"] = (module(eye) - module.org_forward(eye)).T.detach().contiguous()
    again = Flux()
    made, weights = lora_flux.create_network_from_weights(1.0, str(file), None, [], again, for_inference=True)
    made.apply_to([], again, False, True)
    made.load_weights(str(file))
    tensors = {f"delta.{m.lora_name}.weight": m.get_weight().detach().contiguous() for m in made.unet_loras}
    assert len(tensors) == 4 == len({key.split(".")[0] for key in weights})
    save_file(tensors | trained, HERE / "split_qkv" / "truth.safetensors")
    scales = {m.lora_name: float(m.scale) for m in made.unet_loras}
    facts = {"case": "split_qkv", "versions": VERSIONS, "refused": False, "made_from": "file", "scales": scales}
    (HERE / "split_qkv" / "golden.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    torch.manual_seed(20)
    cases = {"sd15": sd15, "encoders": encoders, "old": old, "split_qkv": split_qkv}
    for name in sys.argv[1:] or cases:
        cases[name]()
