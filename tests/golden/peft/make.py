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
from pathlib import Path
from typing import Any

if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT writes target_modules, a set, in hash order
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from case import Case
from cases import CASES
from models import Rng, fill_base
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from truth import forward, truth_of, tuner_layers

HERE = Path(__file__).resolve().parent


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


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path)


def save_base(model: nn.Module, folder: Path) -> None:
    """``base/`` of a model of transformers, ``base.safetensors`` of any other."""
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder / "base")
        (folder / "base" / "generation_config.json").unlink(missing_ok=True)
    else:
        write_tensors(model.state_dict(), folder / "base.safetensors")


def adapted_and_filled(case: Case, model: nn.Module, rng: Rng, initial: Path) -> PeftModel:
    """The model with PEFT's layers in it, their values drawn; ``initial``: where PEFT needs to see what they were."""
    adapted = get_peft_model(
        model, copy.deepcopy(case.config), adapter_name=case.adapter_name, autocast_adapter_dtype=case.upcast
    )
    if case.convert:  # PEFT wants the initial adapter marked as one that leaves the base alone
        wanted = adapted.peft_config["default"].init_lora_weights
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(str(initial))
        adapted.peft_config["default"].init_lora_weights = wanted
    fill_adapter(adapted, rng, case.near_init)
    if case.prepare:
        case.prepare(adapted)
    return adapted


def save_adapter(case: Case, adapted: PeftModel, folder: Path, initial: Path) -> None:
    """``adapter/``, whatever PEFT calls its folder."""
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


def check_reloaded(
    case: Case, untouched: nn.Module, folder: Path, base: dict[str, Tensor], x: Tensor, y: Tensor
) -> dict[str, Any]:
    """The files have to hold the whole adapter: PEFT reads them back to the same outputs.

    Where PEFT is known not to, what it makes of them is a truth of its own, and an entry of golden.json.
    """
    paths = {id(module): path for path, module in untouched.named_modules()}
    reloaded = PeftModel.from_pretrained(
        untouched, folder / "adapter", adapter_name=case.adapter_name, autocast_adapter_dtype=case.upcast
    )
    if case.reloads:
        drift = (forward(reloaded, x, case.dtype) - y).abs().max().item()
        assert drift <= 1e-5, f"{case.name}: reloaded, the outputs differ by {drift}"
        return {}
    other, what = truth_of(case, reloaded, tuner_layers(reloaded, paths), base, x)
    assert not torch.equal(other["y"], y)
    write_tensors(other, folder / "truth_reloaded.safetensors")
    return {"targets_reloaded": what["targets"]}


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
    save_base(saved, folder)
    base = {name: tensor.clone() for name, tensor in saved.state_dict().items()}
    untouched = copy.deepcopy(model)

    paths = {id(module): path for path, module in model.named_modules()}
    adapted = adapted_and_filled(case, model, rng, folder / "initial")
    layers = tuner_layers(adapted, paths)
    x = case.x(rng)
    if x.is_floating_point():
        x = x.to(case.dtype)
    save_adapter(case, adapted, folder, folder / "initial")

    tensors, entries = truth_of(case, adapted, layers, base, x)
    if tensors:
        write_tensors(tensors, folder / "truth.safetensors")
        entries |= check_reloaded(case, untouched, folder, base, x, tensors["y"])
    write_golden(case, entries, folder)


def write_golden(case: Case, entries: dict[str, Any], folder: Path) -> None:
    """``golden.json``."""
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
    for case in CASES:
        if wanted and case.name not in wanted:
            continue
        make(case)
        size = sum(file.stat().st_size for file in (HERE / case.name).rglob("*") if file.is_file())
        total += size
        print(f"{case.name:30} {size / 1024:8.1f} KiB", flush=True)
    print(f"{'all':30} {total / 1024:8.1f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
