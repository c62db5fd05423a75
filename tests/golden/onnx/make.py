"""Golden folders of ONNX models that optimum wrote, with what PEFT computes of their models with an adapter.

Run ``python make.py`` with torch, transformers, diffusers, peft and optimum-onnx at the versions in ``golden.json`` to
write both folders again. One folder a case:

``model/``             what optimum exported, from a model that knew of no adapter
``adapter/``           what PEFT's ``save_pretrained`` wrote; one folder a component where there are several
``truth.safetensors``  the inputs, and the outputs of the PEFT model, unmerged, in torch: ``base.…`` without the adapter,
                       ``adapted.…`` with it. Float32, token ids int64
``golden.json``        the case and the versions

No number in these files comes from a formula written here: weights are drawn from a seeded generator and the rest is
what optimum and PEFT return.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT writes target_modules, a set, in hash order
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from optimum.exporters.onnx import main_export, onnx_export_from_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5ForConditionalGeneration

HERE = Path(__file__).resolve().parent
TOOLS = ("torch", "transformers", "diffusers", "peft", "optimum-onnx")


def t5(folder: Path) -> None:
    """An encoder, and a decoder in three files: without a past, with it, and both in one graph."""
    config = T5Config(
        vocab_size=41, d_model=16, d_kv=6, d_ff=28, num_layers=2, num_decoder_layers=1, num_heads=3,
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = randomised(T5ForConditionalGeneration(config))
    exported = copy.deepcopy(model)  # optimum changes the configuration of what it exports
    onnx_export_from_model(exported, folder / "model", task="text2text-generation-with-past", do_validation=False)
    ids = torch.randint(2, 41, (2, 5))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    feeds = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(2, 41, (2, 4))}
    lora = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q", "k", "v", "o", "wi", "wo", "lm_head"], rank_pattern={"k": 2}
    )
    tensors = {**feeds, "base.logits": model(**feeds).logits}
    with adapted(model, lora, folder / "adapter") as peft:
        tensors["adapted.logits"] = peft(**feeds).logits
        tensors["adapted.hidden"] = model.encoder(ids, mask).last_hidden_state
    finish(folder, tensors)


def pipeline(folder: Path) -> None:
    """A text encoder and a denoiser, each with an adapter of its own, and an autoencoder that has none."""
    unet = randomised(
        UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8,), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
        )
    )  # fmt: skip
    vae = randomised(AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=16))
    config = CLIPTextConfig(
        vocab_size=48, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=18, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    encoder = randomised(CLIPTextModel(config))
    whole = StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=tokenizer(), unet=unet, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None,
    )  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as empty,
        contextlib.chdir(empty),
    ):  # the files hold the name of what was exported
        whole.save_pretrained("tiny")
        main_export("tiny", folder / "model", task="text-to-image", do_validation=False)
    ids = torch.randint(2, 48, (2, 7)).to(torch.int64)
    feeds = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(2, 7, 12),
    }
    unet_lora = LoraConfig(r=3, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"])
    text_lora = LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "v_proj", "fc1"])
    tensors = {"input_ids": ids, **feeds}
    tensors |= {"base.hidden": encoder(ids).last_hidden_state, "base.noise": unet(**feeds).sample}
    with adapted(encoder, text_lora, folder / "adapter" / "text_encoder"):
        tensors["adapted.hidden"] = encoder(ids).last_hidden_state
    with adapted(unet, unet_lora, folder / "adapter" / "unet"):
        tensors["adapted.noise"] = unet(**feeds).sample
    finish(folder, tensors)


def tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvw"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=18)


def randomised(model: nn.Module, only: str = "") -> nn.Module:
    """Normal values everywhere: a fresh bias, norm or B is constant, and constants hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.normal_(1.0 if "norm" in name.lower() and parameter.ndim == 1 else 0.0, 0.25)
    return model.eval()


@contextlib.contextmanager
def adapted(model: nn.Module, lora: LoraConfig, folder: Path) -> Iterator[PeftModel]:
    """The model with random factors beside its weights, which PEFT saves."""
    peft = randomised(get_peft_model(model, lora), only="lora_")
    peft.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    yield peft.eval()


def finish(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, folder / "truth.safetensors")
    versions = {tool: importlib.metadata.version(tool) for tool in TOOLS}
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    (folder / "golden.json").write_text(json.dumps({"case": folder.name, "versions": versions}, indent=2) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    for number, make in enumerate((t5, pipeline)):
        torch.manual_seed(number)
        folder = HERE / make.__name__
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with torch.no_grad():
            make(folder)


if __name__ == "__main__":
    main()
