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
from cases import Case, cases
from models import Rng, fill_base
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

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
