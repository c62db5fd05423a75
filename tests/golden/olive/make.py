"""What Olive writes of one adapter: ``convert-adapters`` out of PEFT's folder, ExtractAdapters out of an export of the model.

``extracted.onnx`` is the graph that goes with the second; in ``required.onnx``, of a smaller model, the inputs have no
default, but tensors at a place that does not exist.

The first multiplies the scale into B. The second takes the tensors as the graph has them, which goes on to multiply by
the scale itself. Nothing in the files tells the two apart. Run with olive-ai 0.13.0 (it needs torchmetrics, optuna and
opentelemetry-sdk besides) beside the peers: python tests/golden/olive/make.py
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import olive
import peft
from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.extract_adapters import ExtractAdapters
from safetensors.numpy import load_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from exports import unmerged  # noqa: E402


def main() -> None:
    """Both files, and ΔW = alpha / r · B @ A of PEFT's own tensors."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        path, adapter = unmerged("llama", "torchscript", folder)
        taken = create_pass_from_dict(ExtractAdapters, {}, disable_search=True)
        taken.run(ONNXModelHandler(str(path)), str(folder / "taken" / "model.onnx"))
        (HERE / "extracted.onnx_adapter").write_bytes((folder / "taken" / "adapter_weights.onnx_adapter").read_bytes())
        (HERE / "extracted.onnx").write_bytes((folder / "taken" / "model.onnx").read_bytes())
        (folder / "other").mkdir()
        other, _ = unmerged("shared-2d", "torchscript", folder / "other")
        taken = create_pass_from_dict(ExtractAdapters, {"optional_inputs": False}, disable_search=True)
        taken.run(ONNXModelHandler(str(other)), str(folder / "required" / "model.onnx"))
        (HERE / "required.onnx").write_bytes((folder / "required" / "model.onnx").read_bytes())
        words = ["convert-adapters", "--adapter_path", str(adapter), "--output_path", str(folder / "converted")]
        subprocess.run([sys.executable, "-m", "olive", *words], check=True)
        (found,) = folder.glob("converted*")
        (HERE / "converted.onnx_adapter").write_bytes(found.read_bytes())
        config = json.loads((adapter / "adapter_config.json").read_text())
        tensors = load_file(adapter / "adapter_model.safetensors")
    told = {"olive": olive.__version__, "peft": peft.__version__, "alpha": config["lora_alpha"], "r": config["r"]}
    (HERE / "golden.json").write_text(json.dumps(told, indent=2) + "\n")
    deltas = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            deltas[f"{module}.weight"] = config["lora_alpha"] / config["r"] * b @ a
    np.savez_compressed(HERE / "deltas.npz", **deltas)


if __name__ == "__main__":
    main()
