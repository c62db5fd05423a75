"""Golden adapters written by llama.cpp's own converter, with the change that it makes in a model of llama.cpp.

Run ``python make.py LLAMA_CPP`` with torch, transformers and peft at the versions in ``golden.json``, and the
folder of a llama.cpp (the one in the source package of llama-cpp-python 0.3.36). One folder per case:

``peft/``              the adapter as PEFT saves it, less its README.md
``config.json``        of the base model
``adapter.gguf``       what convert_lora_to_gguf.py makes of it; not of the cases where it is known to be wrong: it reads
                       neither use_rslora nor alpha_pattern, and turns the factors of a Conv1D with its weight
``truth.safetensors``  ``delta.<tensor>``: what convert_hf_to_gguf.py makes of the merged model minus what it makes of
                       the base, for each tensor that differs
``base.gguf``          where the model is run too: what convert_hf_to_gguf.py makes of the base, with a vocabulary of
                       made-up words, which llama.cpp wants; ``x``, ``y``, ``y_base`` are then in truth.safetensors:
                       tokens, and the logits of PEFT's model with and without the adapter
``golden.json``        the case and the versions

PEFT merges; of experts, which PEFT no longer reaches by their old names, the sum stands here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from gguf_models import CASES, Case
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
LLAMA_CPP = Path(sys.argv[1]).resolve()
sys.path[:0] = [str(LLAMA_CPP), str(LLAMA_CPP / "gguf-py")]
import gguf  # noqa: E402
from conversion import get_model_class  # noqa: E402


@torch.no_grad()
def fill(parameters: Any, draw: np.random.Generator, size: float) -> None:
    for parameter in parameters:
        parameter.copy_(torch.from_numpy(size * draw.standard_normal(tuple(parameter.shape))))


def converted(folder: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors that llama.cpp's converter makes of a checkpoint, by their names in GGUF."""

    known = get_model_class(config["architectures"][0])

    class Model(known):
        model_arch = known.model_arch

        def set_vocab(self) -> None:
            """A tiny model has no tokenizer: words that are made up."""
            count = self.hparams["vocab_size"]
            self.gguf_writer.add_tokenizer_model("llama")
            self.gguf_writer.add_token_list([*("<unk>", "<s>", "</s>"), *(f"w{n}" for n in range(3, count))])
            self.gguf_writer.add_token_scores([0.0] * count)
            self.gguf_writer.add_token_types([2, 3, 3, *([1] * (count - 3))])

    words = {"model": {"vocab": dict.fromkeys(range(config["vocab_size"]))}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(words))  # of Gemma 3 the converter counts them
    out = folder / "model.gguf"
    Model(
        folder, gguf.LlamaFileType.ALL_F32, out, eager=True, hparams=json.loads((folder / "config.json").read_text())
    ).write()
    reader = gguf.GGUFReader(out)
    return {t.name: t.data.reshape(tuple(int(n) for n in t.shape[::-1])).astype(np.float32) for t in reader.tensors}


def with_experts(case: Case, base: Path, merged: Path, adapter: Path, draw: np.random.Generator) -> None:
    """Pairs on the experts' own projections, under the names of the checkpoint."""
    tensors = load_file(base / "model.safetensors")
    pairs = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    whole = load_file(merged / "model.safetensors")
    for name in sorted(n for n in tensors if ".experts." in n):
        out, inner = tensors[name].shape
        a, b = (torch.from_numpy(draw.standard_normal(s)).float() for s in ((config["r"], inner), (out, config["r"])))
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        pairs |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        whole[name] = tensors[name] + config["lora_alpha"] / config["r"] * (b @ a)
    save_file(pairs, adapter / "adapter_model.safetensors", {"format": "pt"})
    save_file(whole, merged / "model.safetensors", {"format": "pt"})
    config["target_modules"] = sorted(
        {*config["target_modules"], "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
    )
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def make(case: Case) -> None:
    draw = np.random.default_rng(zlib.crc32(case.name.encode()))
    folder = HERE / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        base, merged = Path(scratch, "base"), Path(scratch, "merged")
        model = transformers.AutoModelForCausalLM.from_config(case.config())
        fill(model.parameters(), draw, 0.2)
        model.save_pretrained(base)
        adapted = peft.get_peft_model(model, case.lora)
        fill((p for p in adapted.parameters() if p.requires_grad), draw, 0.4)
        adapted.save_pretrained(str(folder / "peft"), save_embedding_layers=False)
        (folder / "peft" / "README.md").unlink()
        x = torch.from_numpy(draw.integers(3, 40, (1, 9)))
        with torch.no_grad(), adapted.disable_adapter():
            y_base = adapted.eval()(x).logits
        with torch.no_grad():
            y = adapted(x).logits
        adapted.merge_and_unload().save_pretrained(merged)
        if case.experts:
            with_experts(case, base, merged, folder / "peft", draw)
        shutil.copy(base / "config.json", folder)
        config = json.loads((base / "config.json").read_text())
        before, after = converted(base, config), converted(merged, config)
        delta = {
            f"delta.{n}": torch.from_numpy(after[n] - v) for n, v in before.items() if not np.array_equal(after[n], v)
        }
        if case.logits:
            shutil.copy(base / "model.gguf", folder / "base.gguf")
            if case.experts:
                with torch.no_grad():
                    y = transformers.AutoModelForCausalLM.from_pretrained(merged)(x).logits
            delta |= {"x": x, "y": y, "y_base": y_base}
        save_file({name: tensor.contiguous() for name, tensor in delta.items()}, folder / "truth.safetensors")
        if case.right:
            words = [
                "convert_lora_to_gguf.py",
                "--base",
                str(base),
                "--outfile",
                str(folder / "adapter.gguf"),
                "--outtype",
                case.outtype,
            ]
            subprocess.run(
                [sys.executable, *words, str(folder / "peft")], cwd=LLAMA_CPP, check=True, capture_output=True
            )
    golden = {
        "case": case.name, "peft": peft.__version__, "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0], "llama.cpp": "as in llama-cpp-python 0.3.36", "made_by": "make.py",
    }  # fmt: skip
    (folder / "golden.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    for case in CASES:
        if not sys.argv[2:] or case.name in sys.argv[2:]:
            make(case)
            print(
                case.name,
                sum(file.stat().st_size for file in (HERE / case.name).rglob("*") if file.is_file()),
                flush=True,
            )
