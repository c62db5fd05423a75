"""Convert an adapter of 2 GB from layout to layout, against a plain copy: every layout costs a read and a write.

A language model's (rank 256 on the seven linears of each layer, bfloat16) goes from PEFT to the native file and back, to
MLX, whose factors lie transposed, and to GGUF, whose rows of q and k lie in another order; an image model's (SDXL's
attentions, float32) from diffusers to kohya and back, and Flux. The copy is ``cp -r`` and a sync, as a conversion syncs what it
writes. Of Flux (rank 256 on every Linear of its blocks, bfloat16) a file of kohya's has q, k and v in one pair of three times
the rank, and the MLP in a fourth block of it: it is 1.8 times as large. Memory is what is a process's own (RssAnon): what it reads is mapped, and the system's to keep or not.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import ml_dtypes
import numpy as np

import loraformat as lf
from bench.measure import Run, command, interleave, row
from loraformat import registry
from loraformat.verbs.convert import save
from loraformat_converters.spaces.mmdit import flux
from loraformat_converters.spaces.unet import unet

HIDDEN, INNER, NARROW, LAYERS, RANK = 4096, 14336, 1024, 48, 256
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": LAYERS,
}
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (NARROW, HIDDEN),
    "self_attn.v_proj": (NARROW, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
"""Module → (out, in)."""

CASES = {
    "PEFT → native": ("peft", "native", "out.safetensors"),
    "native → PEFT": ("native", "peft", "out"),
    "PEFT → MLX": ("peft", "mlx", "out"),
    "PEFT → GGUF": ("peft", "gguf", "out.gguf"),
    "diffusers → kohya": ("diffusers", "kohya", "out.safetensors"),
    "kohya → diffusers": ("kohya", "diffusers", "out.safetensors"),
    "diffusers → kohya, Flux": ("flux.diffusers", "kohya", "out.safetensors"),
    "kohya → diffusers, Flux": ("flux.kohya", "diffusers", "out.safetensors"),
}
"""Name → source, whose ending is its layout, target, the name of what is written."""

LARGER = {"diffusers → kohya, Flux": "flux.kohya"}
"""What is compared with a copy of what it writes, which is 1.8 times what it reads."""


def language() -> Iterator[tuple[str, tuple[int, int]]]:
    """Parameter → [out, in] of a model of language."""
    for i in range(LAYERS):
        yield from ((f"model.layers.{i}.{name}.weight", shape) for name, shape in LINEARS.items())


def image() -> Iterator[tuple[str, tuple[int, int]]]:
    """Parameter → [out, in] of the Linears of SDXL's attentions."""
    for line in unet((320, 640, 1280), (0, 2, 10), 10, added=True):
        name, leaf = line.torch.rpartition(".")[::2]
        if leaf != "weight" or ".transformer_blocks." not in name or ".norm" in name:
            continue
        width = 640 if name.startswith(("down_blocks.1", "up_blocks.1")) else 1280
        known = {"to_k": (width, 2048), "to_v": (width, 2048)} if ".attn2." in name else {}
        known |= {"proj": (8 * width, width), "2": (width, 4 * width)} if ".ff." in name else {}
        yield f"unet:{name}.weight", known.get(name.rpartition(".")[2], (width, width))


def blocks() -> Iterator[tuple[str, tuple[int, int]]]:
    """Parameter → [out, in] of the Linears of Flux's blocks."""
    width, inner = 3072, 12288
    known = {
        "proj": (inner, width),
        "2": (width, inner),
        "proj_mlp": (inner, width),
        "proj_out": (width, width + inner),
    }
    for line in flux():
        name, leaf = line.torch.rpartition(".")[::2]
        if leaf == "weight" and "transformer_blocks." in name and ".norm" not in name:
            yield f"transformer:{name}.weight", known.get(name.rpartition(".")[2], (width, width))


def adapter(shapes: Iterator[tuple[str, tuple[int, int]]], dtype: type, components: tuple[str, ...] = ()) -> lf.Adapter:
    """Pairs that share their factors in memory, but not on the disk."""
    draw, factors, targets = np.random.default_rng(0), {}, {}
    for name, shape in shapes:
        if shape not in factors:
            values = (0.02 * draw.standard_normal(size, np.float32) for size in ((RANK, shape[1]), (shape[0], RANK)))
            factors[shape] = [factor.astype(dtype) for factor in values]
        targets[name] = lf.Update((lf.Lora(*factors[shape], 2.0 * RANK, "alpha/r"),))
    return lf.Adapter(targets, components=components)


def make(folder: Path) -> None:
    """The sources; in a process of its own, whose memory no measured one inherits."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    made = adapter(language(), ml_dtypes.bfloat16)
    save(made, folder / "peft", registry.layout("peft"))
    save(made, folder / "native.safetensors", registry.layout("native"))
    made = adapter(image(), np.float32, ("unet",))
    save(made, folder / "diffusers.safetensors", registry.layout("diffusers"))
    lf.convert(folder / "diffusers.safetensors", folder / "kohya.safetensors", to_layout="kohya")
    made = adapter(blocks(), ml_dtypes.bfloat16, ("transformer",))
    save(made, folder / "flux.diffusers.safetensors", registry.layout("diffusers"))
    lf.convert(folder / "flux.diffusers.safetensors", folder / "flux.kohya.safetensors", to_layout="kohya")


def fresh(out: Path, run: Run) -> Run:
    """A runner of what writes ``out``, which does not exist then."""

    def runner() -> tuple[float, float, int]:
        done = run()
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        return done

    return runner


def variants(folder: Path) -> dict[str, Run]:
    found, python = {}, sys.executable
    command(python, __file__, str(folder))()
    program = "from loraformat.cli.main import main; main()"
    for what, (source, to, name) in CASES.items():
        file, layout = next(folder.glob(f"{source}*")), source.rpartition(".")[2]
        out = folder / name
        words = ["convert", str(file), str(out), "--from", layout, "--to", to]
        words += ["--base", str(folder / "config.json")] if to in ("mlx", "gguf") else []
        if file not in {Path(key) for key in found}:
            copy = 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +'
            found[str(file)] = fresh(
                folder / "copy", command("/bin/sh", "-c", copy, "sh", str(file), str(folder / "copy"))
            )
        found[what] = fresh(out, command(python, "-c", program, *words, anonymous=True))
    return found


def main(runs: int = 3) -> None:
    with tempfile.TemporaryDirectory() as name:
        timings = interleave(variants(Path(name)), runs)
        copies = {
            Path(label).name.removesuffix(".safetensors"): timing
            for label, timing in timings.items()
            if label[0] == "/"
        }
    for source, timing in copies.items():
        print(row(f"copy of {source}", timing, timing, "the limit"))
    for what, (source, _, _) in CASES.items():
        print(row(what, timings[what], copies[LARGER.get(what, source)], "budget ≤ 2.0 ×, ≤ 200 MiB anonymous"))


if __name__ == "__main__":
    make(Path(sys.argv[1])) if sys.argv[1:] else main()
