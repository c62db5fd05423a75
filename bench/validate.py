"""``loraformat validate`` with every value read against ``cat FILE >/dev/null``, warm cache: a gate costs a read.

Adapters of 1.9 GB in each float dtype that tools write, with values as adapters have them, below 2; one with larger
values, which take a second look; and others of 0.9 and 3.8 GB. About 0.2 s of each is the start of Python, click and numpy.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from bench.chart import time_and_memory
from bench.measure import Timing, command, interleave, row
from loraformat import metadata
from loraformat.adapter import Adapter
from loraformat.parts import Lora
from loraformat.serializer import write
from loraformat.updates import Update

TARGETS, WIDTH = 7 * 32, 8192
VARIANTS = {
    "float32": (np.float32, 128, 0.02),
    "bfloat16": (ml_dtypes.bfloat16, 256, 0.02),
    "float16": (np.float16, 256, 0.02),
    "float16, values > 2": (np.float16, 256, 1.0),
    "float16, rank 512": (np.float16, 512, 0.02),
    "float16, rank 128": (np.float16, 128, 0.02),
}
"""Name → dtype, rank, standard deviation of the values."""


def make_file(path: Path, dtype: type, rank: int, sigma: float) -> None:
    """Targets that share two factors in memory, written without the checks."""
    draw = np.random.default_rng(0)
    a, b = ((draw.standard_normal(shape) * sigma).astype(dtype) for shape in ((rank, WIDTH), (WIDTH, rank)))
    update = Update((Lora(a, b, 16, "alpha/r"),))
    keys = [f"layers.{i}.weight" for i in range(TARGETS)]
    tensors = {f"{key}.{role}": tensor for key in keys for role, tensor in (("lora_A", a), ("lora_B", b))}
    with open(path, "wb") as file:
        write(file, tensors, {"loraformat": metadata.render(Adapter(dict.fromkeys(keys, update)))})


def main(runs: int = 7) -> None:
    cat, tool = shutil.which("cat"), str(Path(sys.executable).with_name("loraformat"))
    assert cat is not None
    series: dict[str, dict[float, Timing]] = {"cat": {}, "loraformat validate (float16)": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, variant in VARIANTS.items():
            file = Path(folder) / "a.lora.safetensors"
            make_file(file, *variant)
            words = {"cat": command(cat, str(file)), "validate": command(tool, "validate", str(file))}
            timings = interleave(words, runs)
            size = file.stat().st_size / 1e9
            print(row(f"cat, {size:.1f} GB {name}", timings["cat"], timings["cat"], "the limit"))
            print(row("loraformat validate", timings["validate"], timings["cat"], "budget ≤ 2 ×"))
            if name.startswith("float16") and ">" not in name:
                for label, timing in zip(series, timings.values(), strict=True):
                    series[label][size] = timing
    ordered = {label: dict(sorted(of.items())) for label, of in series.items()}
    time_and_memory("validate", "adapter, GB", ordered, ("cat",))


if __name__ == "__main__":
    main()
