"""Goldens by TensorRT-LLM's own ``hf_lora_convert.py``, of the PEFT adapter ``../peft/llama``.

The script needs an installed TensorRT-LLM, and that a GPU, for four helpers that have nothing to do with the layout.
``python make.py SCRIPT LORA_MANAGER`` runs the script itself (NVIDIA/TensorRT-LLM, examples/hf_lora_convert.py, of a
version without and of one with the column for DoRA) beside stand-ins for the helpers; the numbers of the modules are
taken out of the repository's own lora_manager.py.

``VERSION-DTYPE/model.lora_*.npy``   what it wrote; the ΔW is PEFT's own, in ``../peft/llama/truth.safetensors``
"""

from __future__ import annotations

import ast
import json
import runpy
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent


def numbers(lora_manager: Path) -> dict[str, int]:
    """``LoraManager.LORA_MODULE_IDS``, read off the source."""
    for node in ast.walk(ast.parse(lora_manager.read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LORA_MODULE_IDS":
            found: dict[str, int] = ast.literal_eval(node.value)
            return found
    raise SystemExit("no LORA_MODULE_IDS")


def stand_ins(ids: dict[str, int]) -> None:
    def module(name: str, **members: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)

    module("tensorrt_llm")
    module("tensorrt_llm.models")
    module("tensorrt_llm.lora_manager", LoraManager=type("LoraManager", (), {"LORA_MODULE_IDS": ids}))
    module(
        "tensorrt_llm._utils", str_dtype_to_torch=lambda name: getattr(torch, name), torch_to_numpy=lambda t: t.numpy()
    )
    module(
        "tensorrt_llm.models.convert_utils",
        get_model_path=lambda folder, stem: Path(folder) / f"{stem}.safetensors",
        load_state_dict=load_file,
    )


def main(script: Path, lora_manager: Path) -> None:
    ids = numbers(lora_manager)
    stand_ins(ids)
    convert = runpy.run_path(str(script))["convert_hf_model"]
    version = "dora" if "is_dora" in script.read_text() else "plain"
    for dtype in ("float32", "float16"):
        folder = HERE / f"{version}-{dtype}"
        shutil.rmtree(folder, ignore_errors=True)
        convert(HERE.parent / "peft/llama/adapter", dtype, folder)
    facts = HERE / "golden.json"
    known = json.loads(facts.read_text()) if facts.exists() else {}
    known |= {"made_by": "make.py", "modules": ids, "torch": torch.__version__.split("+")[0]}
    facts.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
