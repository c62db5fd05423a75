"""Models as torch exports them, adapters as PEFT saves them, and the outputs that PEFT computes.

Needs the peers (torch, transformers, peft, onnxscript).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exported_models import gpt2, llama, tokens
from peft import get_peft_model
from recipes import RECIPES, Recipe
from safetensors.torch import save_file

__all__ = [
    "EXPORTERS",
    "RECIPES",
    "Export",
    "Recipe",
    "export",
    "gpt2",
    "llama",
    "made",
    "randomise",
    "tokens",
    "unmerged",
]

EXPORTERS = ("torchscript", "dynamo")


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
        randomise(model)
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
            randomise(adapted, deviation=0.05 if recipe.trained else 0.25)
            truth = model(**inputs).numpy()  # PEFT put its layers into the model itself
        # By itself PEFT 0.21 writes the whole base lm_head beside its factors.
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    fed = {key: value.numpy() for key, value in feeds.items()}
    return Export(path, folder / "checkpoint", folder / "adapter", fed, base, truth, recipe.targets)


def unmerged(name: str, exporter: str, folder: Path, *, fresh: bool = False, whole: bool = False) -> tuple[Path, Path]:
    """(the model with PEFT's layers in it, exported as it is; the folder that PEFT wrote).

    ``fresh``: B is still zero. ``whole``: PEFT's own model around it is exported too, and the bare one as ``base.onnx``.
    """
    torch.manual_seed(sum(map(ord, name)))
    torch.set_num_threads(1)
    recipe = RECIPES[name]
    model, inputs = recipe.build().eval(), recipe.inputs()
    randomise(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if whole:
            _write(model, inputs, exporter, folder / "base.onnx")
        adapted = get_peft_model(getattr(model, "m", model), recipe.method(**recipe.lora)).eval()
        if whole and hasattr(model, "m"):
            model.m = adapted
        elif whole:
            model = adapted
        if not fresh:
            randomise(adapted)
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
        _write(model, inputs, exporter, folder / "unmerged.onnx")
    return folder / "unmerged.onnx", folder / "adapter"


def randomise(model: torch.nn.Module, deviation: float = 0.25) -> None:
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
