"""Extract an adapter of rank 16 from a pair of checkpoints, against a full singular value decomposition of every linear.

The base is the Llama of random values of ``bench/merge.py``, 0.8 and 1.7 GB in bf16; the tuned one is it with a change
of every linear whose singular values fall like 1/k, as those of a whole fine-tuning do, and the rounding of bf16. The
peer reads both with safetensors and takes ``torch.linalg.svd`` of each difference, as the common scripts do; of the
larger pair it is given one layer, and its time is multiplied. ``python bench/extract.py`` alone runs this one.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import ml_dtypes
import numpy as np

from bench.chart import time_and_memory
from bench.measure import Run, Timing, command, interleave, row
from bench.merge import make_model
from loraformat import container, serializer

RANK = 16
LAYERS = {"0.8 GB": 6, "1.7 GB": 17}
WHOLE = "1.7 GB"

PEER = """
import json, pathlib, sys, torch
from safetensors import safe_open
base, tuned, out = map(pathlib.Path, sys.argv[1:4])
rank = 16
homes = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
kept, lost, moved = {}, 0.0, 0.0
for name, home in homes.items():
    if ".layers.0." not in name or "_proj" not in name:
        continue
    with safe_open(base / home, "pt") as one, safe_open(tuned / home, "pt") as two:
        difference = two.get_tensor(name).float() - one.get_tensor(name).float()
    u, s, vh = torch.linalg.svd(difference, full_matrices=False)
    kept[name] = (u[:, :rank] * s[:rank], vh[:rank])
    moved, lost = moved + float((s**2).sum()), lost + float((s[rank:] ** 2).sum())
out.write_text(json.dumps({"residual": (lost / moved) ** 0.5}))
"""


def tune(base: Path, out: Path) -> Path:
    """The base with a change of every linear."""
    shutil.copytree(base, out)
    draw = np.random.default_rng(5)
    for file in sorted(out.glob("*.safetensors")):
        held = container.Container(file)
        tensors = {name: np.array(tensor) for name, tensor in held.items()}
        for name, tensor in tensors.items():
            if "_proj" in name:
                tensors[name] = (tensor.astype(np.float32) + _change(draw, *tensor.shape)).astype(ml_dtypes.bfloat16)
        with open(file, "wb") as handle:
            serializer.write(handle, tensors, {"format": "pt"})
    return out


def _change(draw: np.random.Generator, out: int, in_: int) -> np.ndarray:
    values = (1.0 / np.arange(1, 129)).astype(np.float32)
    left, right = draw.standard_normal((out, 128), np.float32), draw.standard_normal((128, in_), np.float32)
    return np.float32(4e-4) * (left * values) @ right


def make(folder: Path) -> None:
    """Every pair; in a process of its own, whose memory no measured one inherits (ru_maxrss)."""
    for size, layers in LAYERS.items():
        tune(make_model(folder / size, layers), folder / f"{size} tuned")


def fresh(out: Path, *words: str) -> Run:
    """A runner of a command that writes the file ``out``, which does not exist then."""
    run = command(*words)

    def runner() -> tuple[float, float, int]:
        out.unlink(missing_ok=True)
        return run()

    return runner


def variants(folder: Path, peer: bool) -> Iterator[tuple[str, Run]]:
    python, loraformat = sys.executable, "from loraformat.cli.main import main; main()"
    for size in LAYERS:
        pair = (str(folder / size), str(folder / f"{size} tuned"))
        out = folder / f"{size}.lora.safetensors"
        yield f"extract {size}", fresh(out, python, "-c", loraformat, "extract", *pair, "-r", str(RANK), "-o", str(out))
    if peer:
        pair = (str(folder / WHOLE), str(folder / f"{WHOLE} tuned"))
        yield "SVD 1 layer", fresh(folder / "peer.json", python, "-c", PEER, *pair, str(folder / "peer.json"))


def quality(folder: Path) -> float:
    """Our residual of the first layer over the least that there is, which the peer found."""
    import loraformat as lf

    pair = (lf.open_base(folder / size) for size in (WHOLE, f"{WHOLE} tuned"))
    found = lf.extract(*pair, rank=RANK, only=("layers.0.*_proj",))
    return found.whole / json.loads((folder / "peer.json").read_text())["residual"]


def main(runs: int = 1) -> None:
    peer = importlib.util.find_spec("torch") is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command(sys.executable, __file__, name)()
        timings = interleave(dict(variants(folder, peer)), runs)
        worse = quality(folder) if peer else None
    series: dict[str, dict[float, Timing]] = {"loraformat extract": {}, "torch.linalg.svd": {}}
    for label, timing in timings.items():
        if label.startswith("extract"):
            series["loraformat extract"][float(label.split()[1])] = timing
    if peer:
        one, layers = timings["SVD 1 layer"], LAYERS[WHOLE]
        whole = Timing([layers * s for s in one.seconds], [layers * s for s in one.processor], one.peak)
        series["torch.linalg.svd"][float(WHOLE.split()[0])] = timings[f"SVD {WHOLE}"] = whole
        del timings["SVD 1 layer"]
    for label, timing in timings.items():
        against = timings.get(f"SVD {WHOLE}", timing)
        budget = "peer, one layer × 17" if label.startswith("SVD") else "budget ≤ 0.05 × of 1.7 GB"
        print(row(label, timing, against, budget))
    if worse is not None:
        print(f"residual over the optimum      {worse:.4f}   budget ≤ 1.01")
    time_and_memory("extract", "each checkpoint, GB", {k: v for k, v in series.items() if v}, ())


if __name__ == "__main__":
    make(Path(sys.argv[1])) if sys.argv[1:] else main()
